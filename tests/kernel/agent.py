"""The body of a test's program: it makes the system calls that it is told to, one by one.

Run as a script of its own, so that it is a process of its own, as small and as quick to start as
Python allows. One line in, `(name, args)`; one line out, `("ok", value)` or `("error", errno)`.
Signals USR1 and USR2 have handlers that do nothing, the first without SA_RESTART, the second with.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def raw_open(path: bytes, flags: int, mode: int = 0o644) -> int:
    """open(2) itself: Python's own would try again after EINTR."""
    return checked(LIBC.open(path, flags, mode))


def wild(call: str, fd: int) -> int:
    """read(2) or write(2) of 4 bytes at an address that no process has."""
    return checked(getattr(LIBC, call)(fd, ctypes.c_void_p(8), ctypes.c_size_t(4)))


def poll(fd: int, events: int, timeout_ms: int) -> int:
    """The events of one descriptor; 0 when the time is over."""
    poller = select.poll()
    poller.register(fd, events)
    found = poller.poll(timeout_ms)
    return found[0][1] if found else 0


def map_one(fd: int, flags: int) -> bytes:
    with mmap.mmap(fd, 64, flags, mmap.PROT_READ) as mapped:
        return mapped[:64]


def fallocate(fd: int, length: int) -> int:
    """fallocate(2) itself: the C library's posix_fallocate would write instead."""
    zero, size = ctypes.c_int64(0), ctypes.c_int64(length)
    return checked(LIBC.fallocate(fd, 0, zero, size))


def splice(fd: int) -> bytes:
    """What splice(2) moves from the file's beginning into a pipe."""
    out, into = os.pipe()
    try:
        moved = os.splice(fd, into, 64, offset_src=0)
        return os.read(out, moved) if moved else b""
    finally:
        os.close(out)
        os.close(into)


def sendfile(fd: int) -> bytes:
    """What sendfile(2) copies from the file's beginning into a pipe."""
    out, into = os.pipe()
    try:
        moved = os.sendfile(into, fd, 0, 64)
        return os.read(out, moved) if moved else b""
    finally:
        os.close(out)
        os.close(into)


def become(uid: int, gid: int) -> None:
    """Go on as another user, for good."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def fork_holding() -> int:
    """A child that has all our descriptors and waits to be killed; it dies with us."""
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(1, signal.SIGKILL)
        while True:
            signal.pause()
    return pid


def open_in_thread(path: bytes, flags: int) -> int:
    """open(2) by another thread of this process."""
    made: list[int | OSError] = []

    def work() -> None:
        try:
            made.append(raw_open(path, flags))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


OWN: dict[str, Callable[..., Any]] = {
    "become": become,
    "fallocate": fallocate,
    "fcntl": fcntl.fcntl,
    "flock": fcntl.flock,
    "fork_holding": fork_holding,
    "lockf": fcntl.lockf,
    "map": map_one,
    "open": raw_open,
    "open_in_thread": open_in_thread,
    "poll": poll,
    "sendfile": sendfile,
    "splice": splice,
    "wild": wild,
}


def answer(name: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        call: Callable[..., Any] = OWN.get(name) or getattr(os, name)
        return "ok", call(*args)
    except OSError as error:
        return "error", error.errno or errno.EIO


def main() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGUSR2, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR2, False)
    for line in sys.stdin:
        name, args = ast.literal_eval(line)
        print(repr(answer(name, args)), flush=True)


if __name__ == "__main__":
    main()
