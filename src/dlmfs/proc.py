"""What /proc tells of processes. Everything that reads it does so here.

Rules of this file
------------------
* Names, paths and arguments are other people's, and may hold any byte: all is read as bytes, and what
  does not have the expected form is as good as not told.
* What is not told is None, or empty: a process may be gone at any moment, be another user's, or be of
  another pid namespace. Nothing here raises for that.
* What a process may have as many of as it likes, descriptors and mounts, is looked at up to a bound.
"""

from __future__ import annotations

import os
import re
import struct
from itertools import islice
from typing import Final, NamedTuple

ROOT = "/proc"
"""Another folder in tests that play a kernel."""

TABLE_MAX: Final = 1 << 20
"""Bytes of another process's table of mounts: a user namespace may have any number of them."""

O_PATH: Final = 0o10000000
AT_ENTRY: Final = struct.Struct("=II")

Pid = int | str
"""A process, a thread, or "self"."""


def _path(*parts: object) -> str:
    return "/".join((ROOT, *map(str, parts)))


def read(*parts: object, most: int = -1) -> bytes | None:
    """A file's content, at most so many bytes; None if it is not told."""
    try:
        with open(_path(*parts), "rb") as file:
            return file.read(most)
    except OSError:
        return None


def numbers(*parts: object, most: int | None = None) -> list[int]:
    """The names in a folder that are numbers: processes, threads, descriptors. At most so many."""
    try:
        with os.scandir(_path(*parts)) as entries:
            return [int(entry.name) for entry in islice(entries, most) if entry.name.isdecimal()]
    except OSError:
        return []


def exists(*parts: object) -> bool:
    """Whether there is such a name. Not for what can hide: a process of another user is there."""
    return os.path.exists(_path(*parts))


def number(text: bytes | None, base: int = 10) -> int | None:
    """A whole number that stands alone; None for anything else."""
    try:
        return None if text is None else int(text, base)
    except ValueError:
        return None


def _fields(text: bytes | None) -> dict[bytes, bytes]:
    """The lines "Name:  value"."""
    lines = (line.partition(b":") for line in (text or b"").split(b"\n"))
    return {name: value.strip() for name, colon, value in lines if colon}


# -- processes and threads ----------------------------------------------------------------------------


def status(pid: Pid) -> dict[bytes, bytes]:
    """The fields of /proc/PID/status; none if it is not told."""
    return _fields(read(pid, "status"))


def group(thread: int) -> int | None:
    """The process that a thread is of."""
    return number(status(thread).get(b"Tgid"))


def user(thread: int) -> int | None:
    """Whose process a thread is of, by its effective user id."""
    try:
        return os.stat(_path(thread)).st_uid
    except OSError:
        return None


def is_mapped(kind: str, number: int) -> bool:
    """Whether a user ("uid") or group ("gid") is one in our user namespace (user_namespaces(7)). Without
    /proc we say so."""
    table = read("self", f"{kind}_map") or b"0 0 4294967295"
    ranges = [[int(part) for part in line.split()] for line in table.splitlines()]
    return any(first <= number < first + count for first, _outside, count in ranges)


class Stat(NamedTuple):
    """From /proc/PID/stat. `state`: the letter, as in ps(1); `start`: in clock ticks since boot."""

    state: str
    parent: int
    start: int


def stat(pid: Pid) -> Stat | None:
    """None if there is no such process, or it is not told."""
    # The command's name comes before these, in parentheses, and may contain any.
    fields = (read(pid, "stat") or b"").rpartition(b")")[2].split()
    if len(fields) < 20:
        return None
    parent, start = number(fields[1]), number(fields[19])
    if parent is None or start is None:
        return None
    return Stat(fields[0].decode("ascii", "replace"), parent, start)


def is_stopped(pid: int) -> bool:
    """Whether a process stands still (SIGSTOP, or under a debugger)."""
    found = stat(pid)
    return found is not None and found.state in ("T", "t")


def threads(pid: Pid) -> list[int]:
    """The threads of a process."""
    return numbers(pid, "task")


def children(pid: Pid, thread: int) -> list[int] | None:
    """The children of one thread; None where the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    text = read(pid, "task", thread, "children")
    if text is None:
        return None
    return [child for child in map(number, text.split()) if child is not None]


def command(pid: int) -> str:
    """The command name of a process for people to read; empty if it is not known. It is cut at
    15 bytes, so it may end in the middle of a letter: as os.fsdecode has it."""
    return os.fsdecode((read(pid, "comm") or b"").strip())


def is_64_bit(thread: int) -> bool:
    """Whether a thread's program is surely one of 64 bits: by the entries of its auxiliary vector, each
    of which begins with a small number."""
    head = read(thread, "auxv", most=AT_ENTRY.size)
    if head is None or len(head) < AT_ENTRY.size or struct.calcsize("P") != 8:
        return False
    low, high = AT_ENTRY.unpack(head)
    return 0 in (low, high)


# -- descriptors and mounts ---------------------------------------------------------------------------


class OpenFile(NamedTuple):
    """What a descriptor is open on. `path` is as the kernel last knew it; `flags` are open(2)'s."""

    path: bytes
    ino: int
    mount: int
    flags: int

    @property
    def is_path_only(self) -> bool:
        """Opened with O_PATH: the file itself is not open."""
        return bool(self.flags & O_PATH)


def link(pid: Pid, fd: int) -> bytes | None:
    """The path of what a descriptor is open on. Asks the kernel's caches only, never the mount itself."""
    try:
        return os.readlink(os.fsencode(_path(pid, "fd", fd)))
    except OSError:
        return None


def open_file(pid: Pid, fd: int) -> OpenFile | None:
    """One descriptor of a process; None before Linux 5.14, which does not tell the inode."""
    path, info = link(pid, fd), _fields(read(pid, "fdinfo", fd))
    ino, mount = number(info.get(b"ino")), number(info.get(b"mnt_id"))
    flags = number(info.get(b"flags"), 8)
    if path is None or ino is None or mount is None or flags is None:
        return None
    return OpenFile(path, ino, mount, flags)


def mount_of(pid: Pid, fd: int) -> int | None:
    """The number of the mount that a descriptor is of."""
    return number(_fields(read(pid, "fdinfo", fd)).get(b"mnt_id"))


def own_mounts() -> bytes:
    """This process's own table of mounts. Raises OSError: nothing can be known without it."""
    with open(_path("self", "mountinfo"), "rb") as file:
        return file.read()


def mount_table(pid: Pid) -> bytes:
    """The first `TABLE_MAX` bytes of another process's table of mounts; none if it is not told."""
    return read(pid, "mountinfo", most=TABLE_MAX) or b""


def device_of(table: bytes, mount: int) -> str | None:
    """The device number, "major:minor", of a mount in such a table; None if it is not there."""
    # Not line by line: that would keep other threads of this process waiting.
    found = re.search(rb"^%d [0-9]+ ([0-9]+:[0-9]+) " % mount, table, re.MULTILINE)
    return found[1].decode() if found else None
