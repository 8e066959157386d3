"""The folder STATE.d, where each session has its lock file and its bell; and the proof of deaths.

That a session lives is proved by the POSIX lock that its daemon holds on its file. (Not flock and not an
OFD lock: those would be inherited by children.) A POSIX lock goes with the first close of *any*
descriptor of the file in its process, so a daemon never opens its own lock file twice.

The folder is this user's alone and is used by its descriptor: whoever deletes it or puts another in its
place changes nothing for those who are in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
from collections import Counter
from pathlib import Path
from typing import Final

from dlmfs import folders, proc

FLOCK: Final = struct.Struct("@hhqqi4x")
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OWN: Counter[int] = Counter()
"""Sessions of this very process: its own locks never conflict with its questions."""


def holder(fd: int, start: int = 0) -> int:
    """The pid that holds a POSIX write lock on one byte of the file; 0: nobody; -1: a process in
    another pid namespace, of which the kernel tells no number."""
    query = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    return 0 if kind == fcntl.F_UNLCK else int(pid) or -1


def may_live(pid: int) -> bool:
    """Whether a session may live of which nothing is there but its row: a dead process is surely over,
    also one that its parent does not reap, as in a container whose first process is no init."""
    if pid == os.getpid():
        return False
    found = proc.stat(pid)
    return proc.exists(pid) if found is None else found.state not in ("Z", "X")


class Lives:
    """The folder of a state file's sessions, which are known by their leases."""

    def __init__(self, state: Path, fd: int) -> None:
        self.path = Path(f"{state}.d")
        self.fd = fd

    @classmethod
    def make(cls, state: Path, parent: int) -> Lives:
        """`parent`: the state file's folder. Raises OSError, NotPermitted."""
        return cls(state, folders.make(parent, f"{state.name}.d", 0o700))

    @classmethod
    def look(cls, state: Path) -> Lives:
        """What is there. Raises OSError; FileNotFoundError if there never was a session."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return cls(state, os.open(f"{state}.d", flags))

    def is_in_place(self) -> bool:
        """Whether others, who come by its name, find this folder."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self.fd))
        except OSError:
            return False

    def address(self, lease: int) -> str:
        """Of the session's bell. Through the descriptor: the path may be longer than the 108 bytes of
        sun_path."""
        return f"/proc/self/fd/{self.fd}/{lease:x}.sock"

    def alive(self, lease: int, pid: int) -> bool:
        """Whether the session lives; `pid`: its process, from its row.

        In doubt it does: to bury a live daemon would give its locks away.
        """
        if _OWN[lease]:
            return True
        try:
            fd = os.open(f"{lease:x}.lock", _READ, dir_fd=self.fd)
        except FileNotFoundError:
            return may_live(pid)  # somebody tidied up
        except OSError:
            return True  # out of descriptors: look again later
        try:
            return holder(fd) != 0
        finally:
            os.close(fd)

    def kill_stopped(self, lease: int) -> bool:
        """Kill the daemon of a session if it is stopped; whether that was done."""
        with contextlib.suppress(OSError):
            fd = os.open(f"{lease:x}.lock", _READ, dir_fd=self.fd) if not _OWN[lease] else -1
            if fd < 0:
                return False
            try:
                pid = holder(fd)
                if pid <= 0 or not proc.is_stopped(pid):
                    return False
                process = os.pidfd_open(pid)
                try:
                    if holder(fd) != pid:  # its number may have become another's in between
                        return False
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    return True
                finally:
                    os.close(process)
            finally:
                os.close(fd)
        return False

    def remove(self, lease: int) -> None:
        """What a session that is over left here. On a disk gone read-only it stays for others."""
        for suffix in ("lock", "sock"):
            with contextlib.suppress(OSError):
                os.unlink(f"{lease:x}.{suffix}", dir_fd=self.fd)

    def close(self) -> None:
        os.close(self.fd)


class Life:
    """The lock file of one session, held as long as this process lives. Raises OSError."""

    def __init__(self, lives: Lives, lease: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(f"{lease:x}.lock", flags, 0o600, dir_fd=lives.fd)
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        self._lease = lease
        _OWN[lease] += 1

    def end(self) -> None:
        _OWN[self._lease] -= 1
        os.close(self._fd)
