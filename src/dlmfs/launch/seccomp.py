"""System calls of a program, answered by another process: seccomp user notification.

`install` puts a filter on the calling process, which all threads and children inherit for ever. It
lets every system call pass but for a few, for which the kernel asks whoever has the *listener*
descriptor and keeps the caller waiting meanwhile (seccomp_unotify(2), seccomp(2)). When no
process has the listener any more, those few calls fail with ENOSYS; none waits for ever.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dlmfs.errors import Unavailable

LINUX: Final = (5, 9)
"""CONTINUE came with 5.5; that the listener tells of the last process's end, with 5.9."""


@dataclass(frozen=True, slots=True)
class Abi:
    """An architecture's name in filters (AUDIT_ARCH_*, <linux/audit.h>) and its call numbers."""

    audit: int
    seccomp: int
    statfs: int
    fstatfs: int


ABIS: Final = {
    "x86_64": Abi(0xC000003E, seccomp=317, statfs=137, fstatfs=138),
    "aarch64": Abi(0xC00000B7, seccomp=277, statfs=43, fstatfs=44),
}
"""Where these calls have 64-bit forms only, so that there is no statfs64 to answer too."""

# <linux/seccomp.h>
SET_MODE_FILTER: Final = 1
FLAG_SPEC_ALLOW: Final = 1 << 2
FLAG_NEW_LISTENER: Final = 1 << 3
FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5
RET_USER_NOTIF: Final = 0x7FC00000
RET_ALLOW: Final = 0x7FFF0000
USER_NOTIF_FLAG_CONTINUE: Final = 1
NOTIF: Final = struct.Struct("=QIIiIQ6Q")
"""struct seccomp_notif: id, pid, flags; then struct seccomp_data: nr, arch, ip, six arguments."""
RESPONSE: Final = struct.Struct("=QqiI")
"""struct seccomp_notif_resp: id, val, error, flags."""
NOTIF_RECV: Final = 0xC0002100 | NOTIF.size << 16
NOTIF_SEND: Final = 0xC0002101 | RESPONSE.size << 16
NOTIF_ID_VALID: Final = 0x40082102

# <linux/filter.h>: struct sock_filter is code, jt, jf, k.
LOAD: Final = 0x20
JUMP_IF_EQUAL: Final = 0x15
RETURN: Final = 0x06
PR_SET_NO_NEW_PRIVS: Final = 38


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that waits for an answer. `pid` is a thread's, as this process sees it."""

    id: int
    pid: int
    number: int
    args: tuple[int, ...]


def abi() -> Abi:
    """This machine's. Raises Unavailable where it has none that we know, or too old a kernel."""
    machine = platform.machine()
    if machine not in ABIS or sys.maxsize < 2**32:
        known = " and ".join(ABIS)
        raise Unavailable(f"system calls can be answered on 64-bit {known}, not on {machine}")
    release = os.uname().release.split(".")
    if (int(release[0]), int("".join(filter(str.isdigit, release[1])))) < LINUX:
        raise Unavailable(
            f"this needs Linux {LINUX[0]}.{LINUX[1]} or later, not {'.'.join(release)}"
        )
    return ABIS[machine]


def _filter(audit: int, numbers: Iterable[int]) -> bytes:
    """ALLOW, but for these numbers of this architecture: the kernel finds out once which calls a
    filter of that form allows in any case, and does not run it for them (since 5.11)."""
    wanted = sorted(numbers)
    # 32-bit programs (and x32, by its numbers) have other structures: they are let alone.
    steps = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 0, len(wanted) + 1, audit), (LOAD, 0, 0, 0)]
    steps += [(JUMP_IF_EQUAL, len(wanted) - at, 0, nr) for at, nr in enumerate(wanted)]
    steps += [(RETURN, 0, 0, RET_ALLOW), (RETURN, 0, 0, RET_USER_NOTIF)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def install(numbers: Iterable[int]) -> int:
    """Filter this thread and all that it will start; gives the listener (close-on-exec).

    From here on these calls block until somebody answers at the listener. Without CAP_SYS_ADMIN
    in its user namespace the caller also loses what set-user-ID programs would give it
    (no_new_privs). Raises Unavailable.
    """
    known = abi()
    code = _filter(known.audit, numbers)
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # SPEC_ALLOW: before Linux 5.16 a filter would else switch off a speed-up of the processor.
    # WAIT_KILLABLE_RECV (5.19): a signal does not make an answer that is being given void.
    flags = FLAG_NEW_LISTENER | FLAG_SPEC_ALLOW | FLAG_WAIT_KILLABLE_RECV

    def attempt() -> int:
        fd = libc.syscall(
            ctypes.c_long(known.seccomp), SET_MODE_FILTER, flags, ctypes.byref(program)
        )
        return int(fd) if fd >= 0 else -ctypes.get_errno()

    fd = attempt()
    if fd == -errno.EACCES:
        libc.prctl(PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(word) for word in (1, 0, 0, 0)))
        fd = attempt()
    if fd == -errno.EINVAL:
        flags &= ~FLAG_WAIT_KILLABLE_RECV
        fd = attempt()
    if fd == -errno.EBUSY:
        raise Unavailable(
            "system calls of this process are answered by another program already: "
            "o2dlm-run does not run inside of o2dlm-run, nor of container tools that do the same"
        )
    if fd < 0:
        raise Unavailable(f"seccomp(2) is refused here: {os.strerror(-fd)} (a container's policy?)")
    return fd


def receive(listener: int) -> Call | None:
    """The next call that waits; None if its caller was killed or interrupted before."""
    data = bytearray(NOTIF.size)
    try:
        fcntl.ioctl(listener, NOTIF_RECV, data, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR, errno.ENOTCONN):
            return None
        raise
    call, pid, _flags, number, _arch, _ip, *args = NOTIF.unpack(data)
    return Call(call, pid, number, tuple(args))


def still_waits(listener: int, call: Call) -> bool:
    """Whether the caller still waits in this call, so that its process id is still its own."""
    try:
        fcntl.ioctl(listener, NOTIF_ID_VALID, struct.pack("=Q", call.id))
    except OSError:
        return False
    return True


def answer(listener: int, call: Call, error: int) -> None:
    """The call returns 0, or fails with that errno; nothing if nobody waits for it any more."""
    _send(listener, RESPONSE.pack(call.id, 0, -error, 0))


def proceed(listener: int, call: Call) -> None:
    """Let the kernel carry the call out, as if nobody had been asked."""
    _send(listener, RESPONSE.pack(call.id, 0, 0, USER_NOTIF_FLAG_CONTINUE))


def _send(listener: int, response: bytes) -> None:
    try:
        fcntl.ioctl(listener, NOTIF_SEND, bytearray(response), True)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
