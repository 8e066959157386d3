"""Real daemons on a real etcd, some of them in network namespaces of their own.

Set DLMFS_TEST_LOGS to a folder to have what each daemon logs kept there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dlmfs import control
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry
from tests.etcd.server import PATIENCE_S, Etcd, state_of
from tests.fs.nodes import DLMFS, Holder, Nodes

TTL: Final = 5.0
"""The shortest that may be asked for."""
MNT_DETACH: Final = 2
LOGS: Final = os.environ.get("DLMFS_TEST_LOGS")


def until(condition: Callable[[], bool], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Wait for what no event announces."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.02)


def errno_of(path: Path, flags: int = os.O_RDWR) -> int:
    """What an open answers; 0: it was granted, and is closed again."""
    try:
        os.close(os.open(path, flags | os.O_CREAT))
    except OSError as error:
        return error.errno or -1
    return 0


def trylock(path: Path, flags: int = os.O_RDWR) -> int:
    return errno_of(path, flags | os.O_NONBLOCK)


def take(path: Path, flags: int = os.O_RDWR) -> None:
    """Have the lock, as soon as this node may: after a fence it first has to come back."""
    until(lambda: errno_of(path, flags) == 0, f"{path} cannot be opened")


def put(path: Path, value: bytes) -> None:
    """Write all 64 bytes of the lock's value."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert os.pwrite(fd, value.ljust(64, b"\0"), 0) == 64
    finally:
        os.close(fd)


def value(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT)
    try:
        return os.pread(fd, 64, 0).rstrip(b"\0")
    finally:
        os.close(fd)


def gone(fd: int, within_s: float = PATIENCE_S) -> bool:
    """Whether poll says of a descriptor that its lock is lost; that it is wanted does not count."""
    poll = select.poll()
    poll.register(fd, 0)
    events = poll.poll(within_s * 1000)
    return bool(events) and events[0][1] & (select.POLLERR | select.POLLHUP) == (
        select.POLLERR | select.POLLHUP
    )


def is_lost(fd: int) -> bool:
    """Whether both reading and writing are refused with EIO."""
    refused = 0
    for use in (lambda: os.pread(fd, 64, 0), lambda: os.pwrite(fd, b"late", 0)):
        try:
            use()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            refused += 1
    assert refused in (0, 2), "lost for reading or for writing only"
    return refused == 2


class EtcdNodes(Nodes):
    """Mounts over one lock space of an etcd."""

    def __init__(self, folder: Path, etcd: Etcd, cluster: str = "test") -> None:
        super().__init__(folder)
        self.etcd = etcd
        self.cluster = cluster
        self.daemons: dict[Path, int] = {}
        self.helpers: set[int] = set()
        """Watchdogs: they outlive a daemon."""

    # -- nodes --------------------------------------------------------------------------------

    def mount(
        self, name: str, *options: str, source: str | None = None, enter: Sequence[str] = ()
    ) -> Path:
        """`enter`: a command before ours, as for a network namespace."""
        where = self.folder / name
        where.mkdir(exist_ok=True)
        if where not in self.mounts:
            self.mounts.append(where)
        chosen = {"node": name, "ttl": f"{TTL:g}"} | dict(o.split("=", 1) for o in options)
        opts = ",".join(f"{key}={value}" for key, value in chosen.items())
        source = source or self.etcd.source(self.cluster)
        command = [*enter, *DLMFS, "mount", source, str(where), "-o", opts]
        if LOGS:
            self._mount_loudly(command, where)
        else:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
        self.daemons[where] = self.pid(where)
        children = Path(f"/proc/{self.pid(where)}/task/{self.pid(where)}/children")
        self.helpers.update(int(pid) for pid in children.read_text().split())
        return where

    def _mount_loudly(self, command: list[str], where: Path) -> None:
        with open(f"{LOGS}/{self.cluster}-{where.name}.log", "ab") as log:
            daemon = subprocess.Popen([*command, "-f", "-v"], stdout=log, stderr=log)
        self.children.append(daemon)

        def ready() -> bool:
            entry = fuse_mount.find(str(where))
            if entry is None or entry.mountpoint != str(where):
                assert daemon.poll() is None
                return False
            with contextlib.suppress(Exception):
                return bool(control.ask(entry, {"cmd": "status"}))
            return False

        until(ready)

    def pair(self, *options: str) -> tuple[Path, Path]:
        """Two nodes in the domain `dom`."""
        a, b = self.mount("a", *options), self.mount("b", *options)
        for node in (a, b):
            (node / "dom").mkdir()
        return a, b

    def entry(self, where: Path) -> MountEntry:
        entry = fuse_mount.find(str(where))
        assert entry is not None
        assert entry.mountpoint == str(where)
        return entry

    def ask(self, where: Path, cmd: str, **more: object) -> Any:
        """The daemon's own answer, without a program in between."""
        return control.ask(self.entry(where), {"cmd": cmd, **more}, timeout_s=PATIENCE_S)

    def status(self, where: Path) -> dict[str, Any]:
        report: dict[str, Any] = self.ask(where, "status")
        return report

    def lease(self, where: Path) -> str:
        return str(self.status(where)["lease"]["state"])

    def until_told(self, where: Path, text: str, *, told: bool = True) -> None:
        """Wait until a node says `text` in its status, or says it no more. Its log remembers."""

        def says() -> bool:
            return text in str(self.status(where) | {"log": None})

        until(lambda: says() is told, f"{where}: {text} ({told})")

    def is_healthy(self, where: Path) -> bool:
        return self.lease(where) == "HEALTHY"

    def all_keys(self) -> list[str]:
        """What this lock space has in the store."""
        return self.etcd.all_keys(f"dlmfs/{self.cluster}/") + self.etcd.all_keys(
            f"dlmfs/{self.cluster}!/"
        )

    def reason(self, where: Path) -> str:
        return str(self.status(where)["lease"]["reason"])

    def fences(self, where: Path) -> int:
        return int(self.status(where)["lease"]["fences"])

    def info(self, path: Path) -> dict[str, Any]:
        domain, lock = path.parts[-2:]
        report: dict[str, Any] = self.ask(path.parent.parent, "info", domain=domain, lock=lock)
        return report

    def pid(self, where: Path) -> int:
        pid = control.daemon_pid(self.entry(where))
        assert pid is not None
        return pid

    def queue(self, path: Path, flags: int = os.O_RDWR) -> Holder:
        """A process that waits for a lock: returns when it stands in the queue, in the store too."""
        holder = self.hold(path, flags)
        node = self.status(path.parent.parent)["node"]

        def queued() -> bool:
            info = self.info(path)
            here = [claim["pid"] for claim in info["local_waiters"]]
            return holder.process.pid in here and node in [w["node"] for w in info["waiters"]]

        until(queued, f"nobody waits for {path}")
        assert not holder.poll(0)
        return holder

    # -- harm ---------------------------------------------------------------------------------

    def kill(self, where: Path) -> None:
        """SIGKILL; returns when the process is no more."""
        pid = self.daemons.pop(where)
        _kill(pid)

    def stop(self, where: Path) -> None:
        """SIGSTOP; returns when every thread stands still."""
        pid = self.daemons[where]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state_of(pid) == "T")

    def cont(self, where: Path) -> None:
        os.kill(self.daemons[where], signal.SIGCONT)

    # -- the end ------------------------------------------------------------------------------

    def umount(self, where: Path) -> None:
        """A clean end, by the program."""
        done = subprocess.run(
            [*DLMFS, "umount", str(where)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        del self.daemons[where]

    def close(self) -> None:
        """Quick and without questions: the etcd may be gone, the daemon stopped."""
        for child in self.children:
            if child.poll() is None:
                child.kill()
        for pid in (*self.daemons.values(), *self.helpers):
            with contextlib.suppress(ProcessLookupError):
                _kill(pid)
        libc = ctypes.CDLL(None)
        for where in self.mounts:
            libc.umount2(os.fsencode(where), MNT_DETACH)
        for child in self.children:
            child.wait(PATIENCE_S)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


def _kill(pid: int) -> None:
    """Returns when it is a zombie at most: the parent may not have looked yet."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], PATIENCE_S)[0]
    finally:
        os.close(handle)
