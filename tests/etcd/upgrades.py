"""Servers that are upgraded under running nodes: what the nodes and their programs notice.

`python -m tests.etcd.upgrades NEW OLD...` (paths of etcd programs); see scripts/test-etcd-upgrades.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final, NamedTuple

from tests.etcd.mounts import EtcdNodes, put, until, value
from tests.etcd.server import Etcd, loopback, running, scratch
from tests.etcd.test_access import Certificates, credentials, with_users

TTL: Final = "ttl=15"
SETTLE_S: Final = 2.0
"""How long a member has been up before the next one's turn comes."""


class Seen(NamedTuple):
    """`writes` of a value under an exclusive lock by turns on two nodes, the `longest` time that one of
    them took, and what the nodes say of themselves at the end."""

    writes: int
    longest_s: float
    fences: int
    held: bool
    versions: list[str]
    troubles: list[str]


class Turns:
    """Takes a lock on each node in turn, reads the number that it guards, and writes the next one."""

    def __init__(self, paths: list[Path]) -> None:
        self.writes = 0
        self.longest_s = 0.0
        self.error: BaseException | None = None
        self._paths = paths
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                began = time.monotonic()
                path = self._paths[self.writes % len(self._paths)]
                assert int(value(path) or b"0") == self.writes, "a write is lost"
                put(path, b"%d" % (self.writes + 1))
                self.writes += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)
        except BaseException as error:
            self.error = error

    def more(self) -> None:
        """Wait until it has gone on."""
        before = self.writes
        until(lambda: self.writes > before + 1 or self.error is not None, "it does not go on")
        self.check()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        self._end.set()
        self._thread.join(120)
        self.check()


def upgrade(old: Path, new: Path, size: int) -> Seen:
    """From one program to the other under two nodes of an ordinary user of etcd, over TLS."""
    with ExitStack() as stack:
        folder, mounts = (stack.enter_context(scratch()) for _ in range(2))
        ours = Certificates(folder, "ours")
        etcd = ours.etcd(folder, *(loopback() for _ in range(size)))
        for member in etcd.members:
            member.program = old
        stack.enter_context(running(etcd))
        with_users(etcd)
        nodes = stack.enter_context(closing(EtcdNodes(mounts, etcd)))
        files = {"ca": "ca.crt", "cert": "client.crt", "key": "client.key"}
        options = [f"{option}={ours.path(name)}" for option, name in files.items()]
        a, b = nodes.pair(*options, credentials(folder, "dlm"), TTL)
        fd = os.open(a / "dom/held", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"held", 0)
        waiter = nodes.queue(b / "dom/held")
        turns = Turns([a / "dom/n", b / "dom/n"])
        try:
            turns.more()
            _replace(etcd, new, turns)
        finally:
            turns.end()
        held = os.pread(fd, 4, 0) == b"held" and os.pwrite(fd, b"on", 0) == 2
        os.close(fd)
        held = held and waiter.wait() == "held"
        stores = [nodes.status(where)["store"] for where in (a, b)]
        return Seen(
            turns.writes,
            turns.longest_s,
            sum(nodes.fences(where) for where in (a, b)),
            held,
            [str(store["version"]) for store in stores],
            [str(store["trouble"]) for store in stores if store["trouble"]],
        )


def _replace(etcd: Etcd, new: Path, turns: Turns) -> None:
    for member in etcd.members:
        member.end()
        member.program = new
        etcd.start()
        turns.more()
        time.sleep(SETTLE_S)
    turns.more()


def version_of(program: Path) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.split()[2]


def main(new: Path, olds: list[Path]) -> int:
    code = 0
    for old in olds:
        for size in (1, 3):
            seen = upgrade(old, new, size)
            good = seen.held and not seen.fences and not seen.troubles
            code |= not good
            print(
                f"{version_of(old)} to {version_of(new)}, members: {size}, with TLS and users: "
                f"{'no lock lost' if good else 'LOST'} (fences {seen.fences}, held {seen.held}, "
                f"{' '.join(seen.troubles) or 'no trouble'}); {seen.writes} hand-overs, the longest "
                f"{seen.longest_s:.1f} s; the nodes say version {' '.join(sorted(set(seen.versions)))}",
                flush=True,
            )
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), [Path(path).absolute() for path in sys.argv[2:]]))
