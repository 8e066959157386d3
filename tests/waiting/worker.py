"""One process of the churn: opens locks at random, checks what it is granted, is interrupted and
killed. Run as a program; see test_churn.py for what the parent does.

What is checked with every grant, against a record outside of dlmfs:

* Exclusion. An owner that holds a lock says so by POSIX locks on bytes of a common file, and looks
  whether an owner that it excludes says the same. POSIX locks, since the kernel drops them before
  any RELEASE of a process that is killed reaches a daemon (flock's would be dropped after).
* Tokens. Each owner notes its grants' tokens in a slot of its own; a new one must be larger than
  all that conflicting owners noted.

With holder=node the processes of a node are one owner, with holder=file each process is (it holds
one open file at a time, unless it is waiting for a conversion).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import signal
import struct
import sys
from typing import Final

EX: Final = os.O_RDWR
PR: Final = os.O_RDONLY
FLOCK: Final = struct.Struct("@hhqqi")
SLOT: Final = struct.Struct("=QQQQ")
"""Rounds, grants, and two unused; then for each lock the last token at PR and at EX."""
SLOT_SIZE: Final = 256
LOCKS: Final = 3
OWNERS: Final = 64
STOP_AT: Final = 0
"""Where in the table the parent says that it is time for the last round."""

libc = ctypes.CDLL(None, use_errno=True)


class Violation(Exception):
    pass


class Record:
    """The common file: byte ranges for the claims, and a table with a slot per worker."""

    def __init__(self, path: str, slot: int, owner: int) -> None:
        self.fd = os.open(path, os.O_RDWR)
        self.table = mmap.mmap(self.fd, SLOT_SIZE * OWNERS)
        self.base = slot * SLOT_SIZE
        self.owner = owner
        """Workers of one owner do not exclude each other."""

    def _byte(self, lock: int, mode: int, owner: int) -> int:
        return (1 << 20) + (lock * 2 + (mode == EX)) * OWNERS + owner

    def _set(self, kind: int, at: int) -> None:
        fcntl.fcntl(self.fd, fcntl.F_SETLK, FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))

    def _others(self, lock: int, mode: int) -> int:
        """The process of another owner that claims the lock in that mode; 0 if none does."""
        first = self._byte(lock, mode, 0)
        for begin, end in ((0, self.owner), (self.owner + 1, OWNERS)):
            if begin < end:
                ask = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first + begin, end - begin, 0)
                kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(self.fd, fcntl.F_GETLK, ask))
                if kind != fcntl.F_UNLCK:
                    return int(pid)
        return 0

    def claim(self, lock: int, mode: int) -> None:
        # First say, then look: of two that do so at once at least one sees the other.
        self._set(fcntl.F_RDLCK, self._byte(lock, mode, self.owner))
        for other in (EX, PR) if mode == EX else (EX,):
            pid = self._others(lock, other)
            if pid:
                raise Violation(f"lock {lock} mode {mode}: process {pid} has it in mode {other}")

    def unclaim(self, lock: int, mode: int) -> None:
        self._set(fcntl.F_UNLCK, self._byte(lock, mode, self.owner))

    def note(self, lock: int, mode: int, token: int, owners: list[int]) -> None:
        """Compare the token with those of conflicting owners, and write it down."""
        at = SLOT.size + (lock * 2 + (mode == EX)) * 8
        for slot, owner in enumerate(owners):
            if owner == self.owner:
                continue
            for other in (EX, PR) if mode == EX else (EX,):
                place = (slot + 1) * SLOT_SIZE + SLOT.size + (lock * 2 + (other == EX)) * 8
                (past,) = struct.unpack_from("=Q", self.table, place)
                if past >= token:
                    raise Violation(f"lock {lock}: token {token} after {past} of slot {slot + 1}")
        struct.pack_into("=Q", self.table, self.base + at, token)

    def count(self, what: int) -> None:
        at = self.base + 8 * what
        (n,) = struct.unpack_from("=Q", self.table, at)
        struct.pack_into("=Q", self.table, at, n + 1)

    @property
    def stopping(self) -> bool:
        return self.table[STOP_AT] != 0


class Worker:
    def __init__(self, folder: str, record: Record, owners: list[int], rng: random.Random) -> None:
        self.folder = folder
        self.record = record
        self.owners = owners
        self.rng = rng
        self.by_node = len(set(owners)) < len(owners)

    def open(self, lock: int, flags: int, *, patient: bool) -> int:
        """A descriptor, or minus an errno. `patient`: tries again after a signal."""
        path = f"{self.folder}/c{lock}"
        if patient:
            try:
                return os.open(path, flags | os.O_CREAT)
            except OSError as error:
                return -(error.errno or 1)
        fd = int(libc.open(path.encode(), flags | os.O_CREAT, 0o644))
        return fd if fd >= 0 else -ctypes.get_errno()

    def alarm(self) -> None:
        if self.rng.random() < 0.5:
            every = self.rng.choice((0, 0.002))
            signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(0.0001, 0.02), every)

    def quiet(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def use(self, fd: int, lock: int, mode: int) -> None:
        """What a holder does: check that it may, and hold for a moment."""
        self.record.claim(lock, mode)
        if not self.by_node or mode == EX:
            # Of several holders of a node the attribute tells the largest token.
            token = int(os.getxattr(fd, "user.dlmfs.token"))
            self.record.note(lock, mode, token, self.owners)
        self.record.count(1)
        for _ in range(self.rng.choice((0, 0, 10, 1000))):
            pass
        if mode == EX and self.rng.random() < 0.2:
            os.pwrite(fd, b"%d" % os.getpid(), 0)

    def convert(self, fd: int, lock: int) -> None:
        """A reader asks for more. It may be told EDEADLK; with holder=file it waits for itself, and
        only its alarm ends that."""
        signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(0.001, 0.01), 0.002)
        second = self.open(lock, EX, patient=False)
        self.quiet()
        if second >= 0:
            if not self.by_node:
                raise Violation(f"lock {lock}: exclusive beside its own shared descriptor")
            self.use(second, lock, EX)
            self.record.unclaim(lock, EX)
            os.close(second)
        elif -second not in (errno.EINTR, errno.EDEADLK):
            raise Violation(f"conversion: {os.strerror(-second)}")

    def round(self) -> None:
        rng = self.rng
        lock, mode = rng.randrange(LOCKS), rng.choice((EX, EX, PR))
        trying = rng.random() < 0.2
        self.alarm()
        fd = -errno.EINTR
        for _ in range(rng.choice((1, 1, 2, 5))):
            fd = self.open(lock, mode | (trying and os.O_NONBLOCK), patient=rng.random() < 0.3)
            if fd != -errno.EINTR:
                break
            if rng.random() < 0.1:
                lock = rng.randrange(LOCKS)  # its place at the other one is left behind
        self.quiet()
        self.record.count(0)
        if fd < 0:
            if -fd != errno.EINTR and not (trying and -fd == errno.ETXTBSY):
                raise Violation(f"open: {os.strerror(-fd)}")
            return
        self.use(fd, lock, mode)
        if mode == PR and rng.random() < 0.1:
            self.convert(fd, lock)
        self.record.unclaim(lock, mode)
        os.close(fd)

    def last(self) -> None:
        """When all is over: each lock in turn, waiting as long as it takes."""
        for lock in range(LOCKS):
            fd = self.open(lock, EX, patient=True)
            if fd < 0:
                raise Violation(f"last open: {os.strerror(-fd)}")
            self.use(fd, lock, EX)
            self.record.unclaim(lock, EX)
            os.close(fd)


def main(folder: str, path: str, slot: int, owners: list[int], seed: int) -> str:
    # The record's descriptor is lower than any lock's: it is closed first when we are killed.
    record = Record(path, slot + 1, owners[slot])
    worker = Worker(folder, record, owners, random.Random(seed))
    for number in (signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    try:
        while not record.stopping:
            worker.round()
        worker.last()
    except Violation as violation:
        return f"violation by slot {slot + 1}: {violation}"
    return "done"


if __name__ == "__main__":
    said = main(
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        list(map(int, sys.argv[4].split(","))),
        int(sys.argv[5]),
    )
    print(said, flush=True)
