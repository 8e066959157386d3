"""Probes of open lock files: what can be called on them, flags, values, several opens."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import string
import struct
import subprocess
import sys
from pathlib import Path

from tests.kernel.tools import CR, NB, RD, RW, WR, Probe, child, err, held, make, opened, value

_LIBC = ctypes.CDLL(None, use_errno=True)
AT_64 = 64
FAR = 1 << 40


def _libc(name: str, *args: object) -> list[object]:
    """[-1, errno name] or [0, None]."""

    def call() -> int:
        done = int(getattr(_LIBC, name)(*args))
        if done < 0:
            raise OSError(ctypes.get_errno(), name)
        return done

    told = value(call)
    return [-1, told] if isinstance(told, str) else [told, None]


def call_rows(dlm: Path) -> Probe:
    """Calls on a lock's file that a plain file would take."""
    path = dlm / "dom/c"
    make(path)
    yield "setxattr user", err(os.setxattr, path, "user.x", b"1")
    others = [err(os.setxattr, path, f"{kind}.x", b"1") for kind in ("trusted", "security")]
    yield "setxattr trusted, security", others
    yield "getxattr user", err(os.getxattr, path, "user.x")
    yield "getxattr security.selinux", err(os.getxattr, path, "security.selinux")
    yield "listxattr", [os.listxattr(path), os.listxattr(path.parent)]
    yield "removexattr", err(os.removexattr, path, "user.x")
    yield "getxattr of an ACL", err(os.getxattr, path, "system.posix_acl_access")

    def sizes(target: Path | int) -> list[list[object]]:
        return [[err(os.truncate, target, n), os.stat(path).st_size] for n in (0, 10, 64, 1000)]

    yield "truncate to 0, 10, 64, 1000", sizes(path)
    yield "truncate to 2**62", err(os.truncate, path, 1 << 62)
    with held(path) as fd:
        yield "ftruncate to 0, 10, 64, 1000", sizes(fd)
    with held(path, RD) as fd:
        yield "ftruncate on a reading descriptor", err(os.ftruncate, fd, 1)
    with held(path) as fd:
        yield from _mapped(fd)
        yield "fsync, fdatasync", [err(os.fsync, fd), err(os.fdatasync, fd)]
        for name, folder in (("domain", path.parent), ("root", dlm)):
            with held(folder, RD) as there:
                yield f"fsync of the {name}", err(os.fsync, there)
        yield "posix_fallocate", err(os.posix_fallocate, fd, 0, 64)
        offset, length = ctypes.c_long(0), ctypes.c_long(64)
        yield "fallocate", _libc("fallocate", fd, 0, offset, length)
        yield from _sought(fd)
        yield from _controlled(path, fd)
        yield from _moved(path, fd)
    os.chmod(path, 0o755)
    yield "execve", err(subprocess.run, [str(path)], check=False)
    os.unlink(path)


def _mapped(fd: int) -> Probe:
    for name, flag in (("shared", mmap.MAP_SHARED), ("private", mmap.MAP_PRIVATE)):
        yield f"mmap {name}", err(mmap.mmap, fd, 64, flag, mmap.PROT_READ)


def _sought(fd: int) -> Probe:
    seek = os.lseek
    places = [seek(fd, n, os.SEEK_SET) for n in (10, 64, 65, FAR)]
    yield "lseek SET 10 64 65 2**40, CUR", [*places, seek(fd, 0, os.SEEK_CUR)]
    ends = [seek(fd, 0, os.SEEK_END), seek(fd, -4, os.SEEK_END)]
    yield "lseek END, END-4, SET -1", [*ends, value(seek, fd, -1, os.SEEK_SET)]
    data = [value(seek, fd, n, os.SEEK_DATA) for n in (0, 63, 64)]
    holes = [value(seek, fd, n, os.SEEK_HOLE) for n in (0, 63, 64)]
    yield "lseek DATA and HOLE at 0 63 64", [*data, *holes]
    seek(fd, 0, os.SEEK_SET)


def _controlled(path: Path, fd: int) -> Probe:
    def ioctl(number: int) -> object:
        return value(fcntl.ioctl, fd, number, bytes(8))

    os.lseek(fd, 0, os.SEEK_END)
    yield "ioctl FIONREAD, GETFLAGS, TCGETS", [ioctl(0x541B), ioctl(0x80086601), ioctl(0x5401)]
    with held(path) as other:
        exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
        locked = [err(fcntl.flock, fd, exclusive), err(fcntl.flock, other, exclusive)]
        yield "flock by two descriptors", locked
        fcntl.flock(fd, fcntl.LOCK_UN)
    record = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    yield "fcntl record lock", err(fcntl.fcntl, fd, fcntl.F_SETLK, record)
    lease = [
        value(fcntl.fcntl, fd, fcntl.F_SETLEASE, kind) for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK)
    ]
    yield "fcntl lease", lease
    with held(path, RW | os.O_APPEND | NB) as other:
        yield "flags told of O_APPEND and O_NONBLOCK", hex(fcntl.fcntl(other, fcntl.F_GETFL))


def _moved(path: Path, fd: int) -> Probe:
    reading, writing = os.pipe()
    try:
        yield "sendfile", err(os.sendfile, writing, fd, 0, 8)
        yield "splice", err(os.splice, fd, writing, 8, offset_src=0)
    finally:
        os.close(reading)
        os.close(writing)
    with held(path.parents[2] / "plain") as plain:
        yield "copy_file_range", err(os.copy_file_range, fd, plain, 8, 0, 0)
    written = os.pwritev(fd, [b"ab", b"cd"], 0)
    buffers = [bytearray(2), bytearray(2)]
    read = os.preadv(fd, buffers, 0)
    yield "pwritev, preadv", [written, read, *map(bytes, buffers)]
    yield "the value after pwritev", os.pread(fd, 8, 0)


FLAGS = {
    "RD": RD, "WR": WR, "RW": RW, "WR|NB": WR | NB, "RD|NB": RD | NB, "3": 3, "3|NB": 3 | NB,
    "RW|TRUNC": RW | os.O_TRUNC, "RW|APPEND": RW | os.O_APPEND, "RW|SYNC": RW | os.O_SYNC,
    "RW|DIRECT": RW | os.O_DIRECT, "RW|NOATIME": RW | os.O_NOATIME,
    "RW|DIRECTORY": RW | os.O_DIRECTORY, "RW|NOFOLLOW": RW | os.O_NOFOLLOW, "PATH": os.O_PATH,
}  # fmt: skip


def flag_rows(dlm: Path) -> Probe:
    path = dlm / "dom/fl"
    yield "nothing there: RD, WR, RW", [opened(path, flags) for flags in (RD, WR, RW)]
    for name, flags in FLAGS.items():
        yield f"creating {name}", opened(path, flags | CR)
        yield f"there after {name}; unlink", [path.exists(), err(os.unlink, path)]
    make(path)
    more = {"RD|TRUNC": RD | os.O_TRUNC, "CR|EXCL|RW": CR | os.O_EXCL | RW, "CR|RW": CR | RW}
    skip = ("RW|SYNC", "RW|NOATIME", "RW|DIRECTORY", "RW|NOFOLLOW")
    for name, flags in {**FLAGS, **more}.items():
        if name not in skip:
            yield f"existing {name}", opened(path, flags)
    with held(path, 3) as fd:
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT)
        can = [value(os.read, fd, 1), value(os.write, fd, b"x"), len(poll.poll(0))]
        yield "read, write, poll with access mode 3", can
    opened(path, RW | os.O_DIRECT)
    yield "unlink after a refused O_DIRECT", err(os.unlink, path)


PATTERN = (string.ascii_uppercase + "[\\]^_`" + string.ascii_lowercase + "{|}~")[:64].encode()
PATTERN = PATTERN.ljust(64, b"!")


def value_rows(dlm: Path) -> Probe:
    path = dlm / "dom/v"
    with held(path) as fd:
        yield "fresh", os.read(fd, 100)
        yield "fresh, the next read", os.read(fd, 100)
        yield "position then", os.lseek(fd, 0, os.SEEK_CUR)
        yield "size before any write", os.fstat(fd).st_size
        with held(dlm / "dom/v2", RD | CR) as other:
            yield "fresh, opened for reading", os.read(other, 100)
        os.unlink(dlm / "dom/v2")
        os.lseek(fd, 0, os.SEEK_SET)
        yield "write of 64", [os.write(fd, PATTERN), os.lseek(fd, 0, os.SEEK_CUR)]
        yield "read back", os.pread(fd, 64, 0) == PATTERN
        os.lseek(fd, 10, os.SEEK_SET)
        yield "write of 4 at 10", [os.write(fd, b"wxyz"), os.lseek(fd, 0, os.SEEK_CUR)]
        yield "where it went", os.pread(fd, 16, 0)
        os.pwrite(fd, PATTERN, 0)
        yield "pwrite of 4 at 60", [os.pwrite(fd, b"1234", 60), os.pread(fd, 64, 0).find(b"1234")]
        os.pwrite(fd, PATTERN, 0)
        long = os.pwrite(fd, b"0123456789", 60)
        yield "pwrite of 10 at 60", [long, os.pread(fd, 64, 0).find(b"0123")]
        os.lseek(fd, 0, os.SEEK_SET)
        many = [os.write(fd, b"Q" * 100), os.lseek(fd, 0, os.SEEK_CUR), os.pread(fd, 64, 0)]
        yield "write of 100", many
        yield "write at 64, 65, 2**40", [value(os.pwrite, fd, b"x", n) for n in (64, 65, FAR)]
        yield "write of nothing at 0, 63, 64", [value(os.pwrite, fd, b"", n) for n in (0, 63, 64)]
        yield "pread of 10 at 60, 64, 100", [os.pread(fd, 10, n) for n in (60, 64, 100)]
        yield "pread of nothing", os.pread(fd, 0, 0)
    yield from _values_by_mode(path)


def _values_by_mode(path: Path) -> Probe:
    with held(path, RW | os.O_APPEND) as fd:
        wrote = os.write(fd, b"app")
        yield "write with O_APPEND", [wrote, os.lseek(fd, 0, os.SEEK_CUR), os.pread(fd, 8, 0)]
    with held(path, RD) as fd:
        yield "write on a reading descriptor", value(os.write, fd, b"x")
    with held(path, WR) as fd:
        yield "read on a writing descriptor", value(os.read, fd, 1)
        os.write(fd, b"W" * 64)
    for what, flags in (("a writing descriptor", RD), ("O_TRUNC", RW | os.O_TRUNC)):
        with held(path, flags if flags == RD else RW) as fd:
            if flags != RD:
                opened(path, flags)
            yield f"the value after {what}", os.pread(fd, 64, 0)
    with held(path) as fd:
        os.ftruncate(fd, 0)
        yield "the value after ftruncate(0)", os.pread(fd, 64, 0)
    code = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(1, flush=True)
sys.stdin.readline()
print(os.pread(fd, 3, 0).decode(), flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with held(path) as fd:
        reader = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=pipe, stdout=pipe)
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdout.readline()
        os.pwrite(fd, b"new", 0)
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        yield "a write seen at once by a reader's descriptor", reader.stdout.readline().strip()
        reader.communicate()
    with held(path, RD) as fd:
        yield "closed and opened for reading", os.pread(fd, 3, 0)
    os.unlink(path)
    with held(path) as fd:
        yield "unlinked and made again at once", os.pread(fd, 3, 0)
        bad = ctypes.c_void_p(1)
        yield "write from a bad address", _libc("write", fd, bad, ctypes.c_size_t(4))
        yield "read to a bad address", _libc("read", fd, bad, ctypes.c_size_t(4))
    os.unlink(path)


def several_rows(dlm: Path) -> Probe:
    path = dlm / "dom/s"
    with held(path):
        for name, flags in (("RW", RW), ("RW|NB", RW | NB), ("RD", RD)):
            yield f"another process {name} while RW is held", child(lambda f=flags: opened(path, f))  # type: ignore[misc]
    with held(path, RD):
        yield "another process RW while RD is held", child(lambda: opened(path, RW))
    os.unlink(path)
    with held(path, RD | CR):
        yield "another process RW|NB, only PR ever", child(lambda: opened(path, RW | NB))
    with held(path) as fd:
        for name, events in (("POLLIN", select.POLLIN), ("POLLOUT", select.POLLOUT)):
            poll = select.poll()
            poll.register(fd, events)
            yield f"poll {name}, nobody waits", poll.poll(0)
        yield "select", [len(found) for found in select.select([fd], [fd], [fd], 0)]
        with select.epoll() as epoll:
            yield "epoll_ctl", err(epoll.register, fd, select.EPOLLIN)
    with held(dlm / "dom", RD) as fd:
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT | select.POLLRDNORM)
        both = select.POLLIN | select.POLLOUT | select.POLLRDNORM
        yield "poll on a domain", [events == both for _, events in poll.poll(0)]
    fd = os.open(path, RW)
    other = os.dup(fd)
    os.close(fd)
    yield "unlink with a dup open", err(os.unlink, path)
    os.close(other)
    yield "unlink after the dup is closed", err(os.unlink, path)


FILES = {
    "calls": call_rows,
    "flags": flag_rows,
    "values": value_rows,
    "several opens": several_rows,
}
