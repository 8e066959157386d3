"""Until when a node's locks are good, told in a file: read without the daemon, which may stand still.

The file lies beside the control socket and is rewritten at each renewal that counts, with the instant
that the node itself goes by. Where no lease can run out (one host) it is never, until the node's life
ends or its daemon is dead.

Rules of this file
------------------
* The daemon has its file locked for writing (fcntl(2), F_OFD_SETLK). One that nobody has locked is left
  of a dead daemon, whose device number may be another mount's by now: it says nothing. Not by flock(2):
  anybody who may read a file may lock it so, and would make it believed.
* Nobody else can open the file before it is locked, and it is in a folder that nobody else can write.
* A deadline is of one session. When the file tells of another, what was granted before is lost. Once a
  session is said to be over, no renewal of it moves that.
* Instants are compared in one time namespace only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import struct
import time
from typing import Final

from dlmfs import rundir

RECORD: Final = struct.Struct("=dQQ")
"""The deadline in seconds on CLOCK_BOOTTIME, the session's number, the time namespace's."""

FLOCK: Final = struct.Struct("hhqqi0q")
"""struct flock of fcntl(2)."""


def _whole(kind: int) -> bytes:
    """A lock on a whole file."""
    return FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _namespace() -> int:
    """Its clock is this process's; 0 where there are none (before Linux 5.6)."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/time").st_ino
    return 0


class Published:
    """The daemon's end."""

    def __init__(self, dev: str, run: str | None = None) -> None:
        """`dev`: the mount's device; `run`: the folder to put it in, see `rundir`. Nothing is good yet.
        Raises MountFailed."""
        self._namespace = _namespace()
        self._session = 0
        self._over = 0
        self.path, self._fd = rundir.put(
            lambda folder: self._put(os.path.join(folder, rundir.name(dev, "lease"))),
            "lease's deadline",
            run,
        )

    def _put(self, path: str) -> tuple[str, int]:
        """The file, and a descriptor of it. Raises OSError; nothing is left then."""
        new = f"{path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _whole(fcntl.F_WRLCK))
            os.pwrite(fd, RECORD.pack(0.0, 0, self._namespace), 0)
            os.fchmod(fd, 0o644)  # whoever may use the mount may read it
            os.rename(new, path)  # never there without its lock
        except OSError:
            os.close(fd)
            os.unlink(new)
            raise
        return path, fd

    def tell(self, fence_at: float, session: int) -> None:
        """What the session has been granted is good until then (inf: for as long as this process
        lives). Should it fail, an earlier deadline stands: programs stop too early, not too late."""
        self._session = session
        if session != self._over:
            self._write(fence_at)

    def over(self) -> None:
        """Nothing that the present session was granted is good any more."""
        self._over = self._session
        self._write(0.0)

    def _write(self, at: float) -> None:
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, RECORD.pack(at, self._session, self._namespace), 0)

    def close(self) -> None:
        # After an umount from outside our device number may be another mount's by now.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.unlink(self.path)
        os.close(self._fd)


class Deadline:
    """A program's end, for what it has been granted by now."""

    def __init__(self, fd: int, session: int | None = None) -> None:
        """`session`: of that one's grants; None: of the present one's."""
        self._fd = fd
        self._session = self._read()[1] if session is None else session
        info = os.fstat(fd)
        self.identity = info.st_dev, info.st_ino, self._session
        """Of the session: no other's while this is open."""

    @classmethod
    def find(cls, dev: str, uid: int) -> Deadline | None:
        """That of a mount: of this device, mounted by this user. None if this process cannot see or
        believe the file."""
        for folder in rundir.places(uid):
            with contextlib.suppress(OSError):
                if not rundir.is_safe(folder, uid):
                    continue  # the file system there may be another user's too, and tell anything
                path = os.path.join(folder, rundir.name(dev, "lease"))
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                if _is_believed(fd, uid):
                    return cls(fd)
                os.close(fd)
        return None

    def pass_on(self) -> tuple[int, int]:
        """What another process needs to make it anew: a descriptor, and the session."""
        return self._fd, self._session

    def at(self) -> float:
        """The deadline in seconds, as `boottime`; inf if there is none as long as the daemon lives;
        -inf if it does not, or the session is over."""
        at, session, _ = self._read()
        if session != self._session or (at == math.inf and not _is_kept(self._fd)):
            return -math.inf
        return at

    def passed(self) -> bool:
        """Whether what was granted is lost."""
        return boottime() >= self.at()

    def _read(self) -> tuple[float, int, int]:
        """Twice the same, or it is being written."""
        before = b""
        while (data := os.pread(self._fd, RECORD.size, 0)) != before:
            before = data
        at, session, namespace = RECORD.unpack(data)
        return at, session, namespace

    def close(self) -> None:
        os.close(self._fd)


def _is_believed(fd: int, uid: int) -> bool:
    """Whether a living daemon of that user, or root's, keeps the file, by the clock that is ours."""
    info = os.fstat(fd)
    if info.st_uid not in (0, uid) or info.st_size != RECORD.size:
        return False
    if RECORD.unpack(os.pread(fd, RECORD.size, 0))[2] != _namespace():
        return False
    return _is_kept(fd)


def _is_kept(fd: int) -> bool:
    """Whether its daemon lives: that has it locked for writing."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _whole(fcntl.F_RDLCK))
    return bool(FLOCK.unpack(found)[0] == fcntl.F_WRLCK)


# -- time -------------------------------------------------------------------------------------------


INTERRUPTED_S: Final = 0.02
"""Who asks in a loop must not use up a CPU, should that system call be forbidden."""


def boottime() -> float:
    """Seconds since boot, with those of suspension."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def sleep_until(at: float) -> None:
    """Sleep until `boottime` is `at`, suspension counted; a signal may end it earlier."""
    until = (ctypes.c_long * 2)(*divmod(math.ceil(at * 1e9), 1_000_000_000))
    timer_abstime = 1
    if ctypes.CDLL(None).clock_nanosleep(time.CLOCK_BOOTTIME, timer_abstime, until, None):
        time.sleep(INTERRUPTED_S)
