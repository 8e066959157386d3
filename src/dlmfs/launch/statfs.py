"""The process that answers statfs(2) and fstatfs(2) for a program, so that dlmfs passes for OCFS2's.

libo2dlm takes no mount whose f_type is not 0x76a9f425, and a FUSE file system cannot choose its own
(fuse-notes 14). For an object on a dlmfs mount the answer is the kernel's with that one field
replaced; every other call goes on to the kernel untouched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
import threading
from typing import Final

from dlmfs import proc
from dlmfs.errors import NotPermitted, Unavailable
from dlmfs.fuse.mountinfo import parse
from dlmfs.launch import seccomp
from dlmfs.launch.seccomp import Call

OCFS2_DLMFS_MAGIC: Final = 0x76A9F425
"""f_type of the kernel's dlmfs (fs/ocfs2/dlmfs/dlmfs.c)."""

STATFS_SIZE: Final = 120
"""sizeof(struct statfs) in a 64-bit process; f_type is its first long."""

PATH_MAX: Final = 4096
PR_SET_PTRACER: Final = 0x59616D61

# What the supervisor says to its maker.
PID: Final = struct.Struct("=i")
READY: Final = b"r"
REFUSED: Final = b"n"


def numbers() -> tuple[int, int]:
    """The system calls that `start`'s process answers. Raises Unavailable."""
    abi = seccomp.abi()
    return abi.statfs, abi.fstatfs


# -- the supervisor, as its maker sees it ---------------------------------------------------------


def start(mountpoint: str) -> socket.socket:
    """Fork the supervisor; `hand_over` gives it its work. It ends when no process has the filter.

    It is nobody's child (a program may wait for all of its children), in a session of its own,
    deaf to signals, and keeps none of the caller's files open: one may be a lock. But it keeps
    `mountpoint` in use, so that umount says EBUSY while the program runs. Raises Unavailable.
    """
    ours, theirs = socket.socketpair()
    program = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        raise Unavailable(f"no process for the supervisor: {error.strerror}") from None
    if child == 0:
        with contextlib.suppress(BaseException):
            if os.fork() == 0:
                _supervise(theirs, program, mountpoint)
        os._exit(0)
    os.waitpid(child, 0)
    theirs.close()
    return ours


def hand_over(supervisor: socket.socket, listener: int) -> None:
    """Give it the listener; returns when it answers. Raises NotPermitted, Unavailable."""
    word = b""
    with contextlib.suppress(OSError):
        (pid,) = PID.unpack(supervisor.recv(PID.size))
        # Yama's ptrace_scope 1 lets an ordinary user's process into its descendants only; this
        # admits the supervisor to PROGRAM itself. Fails, as it may, where there is no Yama.
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), *[ctypes.c_ulong(0)] * 3)
        socket.send_fds(supervisor, [b"l"], [listener])
        word = supervisor.recv(1)
    if word == REFUSED:
        raise NotPermitted(
            "the supervisor may not write to the program's memory, where the answers go: see "
            "/proc/sys/kernel/yama/ptrace_scope, or run it as root"
        )
    if word != READY:
        raise Unavailable("the process that should answer for the program died: out of memory?")


# -- the supervisor ----------------------------------------------------------------------------------


def _supervise(channel: socket.socket, program: int, mountpoint: str) -> None:
    os.setsid()
    for sign in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(sign, signal.SIG_IGN)
    os.chdir("/")
    _close_all_but(channel.fileno())
    os.open(mountpoint, os.O_PATH)
    channel.send(PID.pack(os.getpid()))
    _, (listener,), _, _ = socket.recv_fds(channel, 1, 1)
    try:
        os.close(os.open(f"/proc/{program}/mem", os.O_RDWR))
    except OSError:
        channel.send(REFUSED)
        return
    channel.send(READY)
    channel.close()
    answer_all(listener)
    os._exit(0)  # a thread may be waiting for a daemon that is stopped


def _close_all_but(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        if standard != fd:
            os.dup2(null, standard)
    for number in proc.numbers("self", "fd"):
        if number > 2 and number != fd:
            with contextlib.suppress(OSError):  # that of the listing itself
                os.close(number)


def answer_all(listener: int) -> None:
    """Answer until no process has the filter any more."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        ((_, events),) = poll.poll()
        if not events & select.POLLIN:
            return
        call = seccomp.receive(listener)
        if call is not None:
            # A thread each: a path may lie on a file system that does not answer.
            try:
                threading.Thread(target=_serve, args=(listener, call), daemon=True).start()
            except RuntimeError:
                _serve(listener, call)


def _serve(listener: int, call: Call) -> None:
    try:
        code = _answer(listener, call)
    except Exception:  # whatever it is, the program must not wait for ever
        code = None
    if code is None:
        seccomp.proceed(listener, call)
    else:
        seccomp.answer(listener, call, code)


def _answer(listener: int, call: Call) -> int | None:
    """The errno to answer with, 0 after the structure was written; None: the kernel's affair.

    Races. The caller may be killed at any moment and its number be another process's. So all that
    hangs on the number is opened first, and only then the kernel is asked whether the call still
    waits: if it does, what was opened is the caller's, and stays so (an open /proc/PID/mem is that
    memory, whoever has the number). Another thread of the program may change the path or the
    descriptor meanwhile: then this answers for what it was at one moment of the call, or the
    kernel reads it again (`proceed`). Nothing is permitted or refused here, so nobody gains.
    """
    with contextlib.ExitStack() as stack:

        def opened(path: bytes, flags: int) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        process = b"/proc/%d/" % call.pid
        try:
            memory = opened(process + b"mem", os.O_RDWR)
            table = opened(process + b"mountinfo", os.O_RDONLY)
            path = _path(process, memory, call)
            if path is None:
                return None
            target = opened(path, os.O_PATH)
        except OSError:
            return None
        if not seccomp.still_waits(listener, call) or not _on_dlmfs(target, table):
            return None
        return _write_statfs(target, memory, call.args[1])


def _path(process: bytes, memory: int, call: Call) -> bytes | None:
    """Where this process finds what the call is about; None if the kernel will refuse it."""
    if call.number == seccomp.abi().fstatfs:
        return process + b"fd/%d" % (call.args[0] & 0xFFFFFFFF)
    # In a chroot of the program's own an absolute symbolic link would be taken from our root.
    text, end, _ = os.pread(memory, PATH_MAX, call.args[0]).partition(b"\0")
    if not text or not end:
        return None
    return process + (b"root" if text.startswith(b"/") else b"cwd/") + text


def _on_dlmfs(target: int, table: int) -> bool:
    """By the mount table of the caller, which asks no file system anything."""
    mount = proc.mount_of("self", target)
    with open(table, "rb", closefd=False) as file:
        return any(entry.id == mount and entry.is_dlmfs for entry in parse(file.read()))


def _write_statfs(target: int, memory: int, address: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    data = ctypes.create_string_buffer(STATFS_SIZE)
    if libc.syscall(ctypes.c_long(seccomp.abi().fstatfs), target, data):
        return ctypes.get_errno()
    struct.pack_into("=q", data, 0, OCFS2_DLMFS_MAGIC)
    try:
        # Not process_vm_writev(2): it takes the number, which may be another's by now.
        written = os.pwrite(memory, data.raw, address)
    except (OSError, OverflowError):
        written = 0
    return 0 if written == STATFS_SIZE else errno.EFAULT
