"""An etcd cluster of one member or more that a test may kill, stop, cut off, compact and wipe.

Each member has a loopback address of its own and etcd's usual ports: those are below the range of
ephemeral ports, so nobody's outgoing connection sits on them while a member is down.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

PROGRAM: Final = Path(sys.executable).with_name("etcd")
CONTROL: Final = Path(sys.executable).with_name("etcdctl")
PATIENCE_S: Final = 30.0
CLIENT_PORT: Final = 2379
PEER_PORT: Final = CLIENT_PORT + 1


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory: what is in it is gone afterwards."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="dlmfs-etcd-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


_numbers = itertools.count(1)


def loopback() -> str:
    """An address of 127/8 that no other test of this run, or of another, listens on."""
    while True:
        host = f"127.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}.{next(_numbers)}"
        with contextlib.suppress(OSError):
            for port in (CLIENT_PORT, PEER_PORT):
                socket.create_server((host, port)).close()
            return host


class Member:
    """One server process with its data. `enter`: a command before it, as for a network namespace;
    `options`: further ones of etcd's."""

    def __init__(
        self, folder: Path, name: str, address: tuple[str, int], *, enter: Sequence[str]
    ) -> None:
        self.name = name
        host, self.port = address
        self.host = f"[{host}]" if ":" in host else host
        self.data = folder / name
        self.log = folder / f"{name}.log"
        self.enter = list(enter)
        self.options: dict[str, str] = {}
        self.program = PROGRAM
        self.known = False
        """Whether the list of members tells its address; else a node that a test sends through a proxy
        would find the way around it."""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def scheme(self) -> str:
        return "https" if "cert-file" in self.options else "http"

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.port + 1}"

    def start(self, cluster: str) -> None:
        assert self.process is None
        client = f"{self.scheme}://{self.endpoint}"
        options = {
            "name": self.name,
            "data-dir": str(self.data),
            "listen-client-urls": client,
            "advertise-client-urls": client if self.known else f"{self.scheme}://0.0.0.0:1",
            "listen-peer-urls": self.peer_url,
            "initial-advertise-peer-urls": self.peer_url,
            "initial-cluster": cluster,
            "log-level": "error",
            "heartbeat-interval": "50",
            "election-timeout": "500",
            "bcrypt-cost": "4",
            **self.options,
        }
        command = [*self.enter, str(self.program), "--unsafe-no-fsync"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As by a power failure: nothing is said to anybody."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.wait(PATIENCE_S)
            self.process = None

    def end(self) -> None:
        """As a service manager ends it."""
        assert self.process is not None
        self._signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)
        self.process = None

    def stop(self) -> None:
        """Silence: connections stay, nothing is answered. Returns when it really stands still."""
        self._signal(signal.SIGSTOP)
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while state_of(self.process.pid) != "T":
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def cont(self) -> None:
        self._signal(signal.SIGCONT)


def state_of(pid: int) -> str:
    """The process's state letter; "" if there is none such."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


class Etcd:
    """The whole cluster. `close` ends it, whatever state it is in."""

    def __init__(
        self,
        folder: Path,
        size: int = 1,
        *,
        hosts: Sequence[str] = (),
        port: int = CLIENT_PORT,
        enter: Sequence[str] = (),
        options: dict[str, str] | None = None,
        control: Sequence[str] = (),
        known: bool = False,
    ) -> None:
        self.folder = folder
        self.enter = list(enter)
        self.control = list(control)
        names = list(hosts) or [loopback() for _ in range(size)]
        self.members = [
            Member(folder, f"m{number}", (host, port), enter=enter)
            for number, host in enumerate(names)
        ]
        for member in self.members:
            member.options = options or {}
            member.known = known

    @property
    def endpoints(self) -> str:
        return ",".join(member.endpoint for member in self.members)

    @property
    def _initial(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def source(self, cluster: str = "test") -> str:
        """What a mount calls it."""
        return f"etcd://{self.endpoints}/{cluster}"

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every member that is down; return when the cluster answers."""
        for member in self.members:
            if member.process is None:
                member.start(self._initial)
        self.wait()

    def restart(self, member: Member) -> None:
        member.kill()
        member.start(self._initial)
        self.wait()

    def add(self, host: str) -> Member:
        """A further member, on another address; returns when it serves."""
        number = 1 + max(int(member.name[1:]) for member in self.members)
        new = Member(self.folder, f"m{number}", (host, CLIENT_PORT), enter=self.enter)
        new.known = self.members[0].known
        new.options = {**self.members[0].options, "initial-cluster-state": "existing"}
        self.ctl("member", "add", new.name, f"--peer-urls={new.peer_url}")
        self.members.append(new)
        new.start(self._initial)
        deadline = time.monotonic() + PATIENCE_S
        while not self._healthy(new):
            assert time.monotonic() < deadline, f"{new.name} does not answer: {self.logs()}"
            time.sleep(0.02)
        return new

    def remove(self, member: Member) -> None:
        """Take a member out for good; it ends by itself, and its address is nobody's then."""
        self.members.remove(member)
        found = json.loads(self.ctl("member", "list", "-w", "json"))["members"]
        number = next(each["ID"] for each in found if each.get("name") == member.name)
        self.ctl("member", "remove", f"{number:x}")
        member.kill()

    def wait(self) -> None:
        """Until a quorum serves linearizable requests."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(self._healthy(m) for m in self.members if m.process is not None):
            assert time.monotonic() < deadline, f"etcd does not answer: {self.logs()}"
            time.sleep(0.02)

    def _healthy(self, member: Member) -> bool:
        if self.enter or member.scheme == "https":
            return self.try_ctl("endpoint", "health", timeout_s=3) is not None
        with contextlib.suppress(OSError, ValueError):
            url = f"http://{member.endpoint}/health"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(json.load(answer).get("health") == "true")
        return False

    def logs(self) -> str:
        return "\n".join(m.log.read_text()[-2000:] for m in self.members if m.log.exists())

    def close(self) -> None:
        for member in self.members:
            member.kill()

    # -- what an operator does ------------------------------------------------------------------

    def ctl(self, *args: str, timeout_s: float = 10.0, at: Member | None = None) -> str:
        """etcdctl at the members that run, or at one. Raises CalledProcessError, TimeoutExpired."""
        running = [m for m in self.members if m.process and state_of(m.process.pid) != "T"]
        running = running if at is None else [at]
        scheme = self.members[0].scheme
        endpoints = ",".join(f"{scheme}://{m.endpoint}" for m in running)
        command = [*self.enter, str(CONTROL), f"--endpoints={endpoints}", *self.control, *args]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=True
        )
        return done.stdout

    def try_ctl(self, *args: str, timeout_s: float = 10.0) -> str | None:
        with contextlib.suppress(subprocess.SubprocessError):
            return self.ctl(*args, timeout_s=timeout_s)
        return None

    def passwd(self, user: str, password: str) -> None:
        """Another password for a user, as root."""
        running = next(m for m in self.members if m.process is not None)
        command = [*self.enter, str(CONTROL), f"--endpoints={running.scheme}://{running.endpoint}"]
        command += [*self.control, "user", "passwd", user, "--interactive=false"]
        subprocess.run(
            command, input=f"{password}\n", text=True, capture_output=True, timeout=10, check=True
        )

    def all_keys(self, prefix: str = "") -> list[str]:
        """All keys there are, not only ours: nothing may be left anywhere but a lock space's stamp, by
        which a node that was away knows it again."""
        where = [prefix] if prefix else [""]
        lines = self.ctl("get", *where, "--prefix", "--keys-only").splitlines()
        return [line for line in lines if line and not line.endswith("/t/stamp")]

    def leases(self) -> list[str]:
        return self.ctl("lease", "list").splitlines()[1:]

    def wait_for_no_key(self, prefix: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while found := self.all_keys(prefix):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    def lease_of(self, key: str) -> str:
        """In hexadecimal, as etcdctl wants it."""
        answer = json.loads(self.ctl("get", key, "-w", "json"))
        return f"{answer['kvs'][0]['lease']:x}"

    def revision(self) -> int:
        answer: dict[str, Any] = json.loads(self.ctl("get", "nothing", "-w", "json"))
        return int(answer["header"]["revision"])

    def compact(self) -> None:
        """Forget all history: a watch that is behind cannot go on."""
        self.ctl("compact", str(self.revision()), "--physical")

    def leader(self) -> Member:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self.try_ctl("endpoint", "status", "-w", "json")
            for row in json.loads(answer) if answer else []:
                status = row["Status"]
                if status.get("leader") and status["leader"] == status["header"]["member_id"]:
                    return next(m for m in self.members if m.endpoint in row["Endpoint"])
            assert time.monotonic() < deadline, "no leader"
            time.sleep(0.05)

    def snapshot(self) -> Path:
        path = self.folder / "snapshot.db"
        path.unlink(missing_ok=True)
        self.ctl("snapshot", "save", str(path), at=self.members[0])
        return path

    def restore(self, snapshot: Path | None, *, bumped_by: Path | None = None) -> None:
        """Back to a snapshot, or to nothing; with revisions that go on where those of before cannot have
        been, as etcd's documents advise, if there is an etcdutl that can (`bumped_by`)."""
        for member in self.members:
            member.kill()
            shutil.rmtree(member.data)
        program = [str(bumped_by or CONTROL), "snapshot", "restore", str(snapshot)]
        if bumped_by is not None:
            program += ["--bump-revision", "1000000000", "--mark-compacted"]
        for member in self.members if snapshot is not None else ():
            command = [
                *(*program, "--name", member.name, "--data-dir", str(member.data)),
                *("--initial-cluster", self._initial),
                *("--initial-advertise-peer-urls", member.peer_url),
            ]
            subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
        self.start()


@contextlib.contextmanager
def running(etcd: Etcd) -> Iterator[Etcd]:
    """Started, and gone at the end."""
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.close()
