"""Which file systems are mounted where, from /proc/self/mountinfo, without touching any of them.

A path below a mount whose daemon is stopped or dead must not be looked at: a stat there hangs, or
fails with ENOTCONN. So paths are resolved here by hand, and never further than to the mount.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from dlmfs import proc

FSTYPE: Final = "fuse.dlmfs"

SYMLINKS_MAX: Final = 40
"""As in the kernel (path_resolution(7))."""


class MountEntry(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5)). `dev` is "major:minor", `root` what of the file
    system is mounted; `shared`: whether mounts and umounts on it are made elsewhere, too
    (mount_namespaces(7))."""

    id: int
    parent: int
    mountpoint: str
    source: str
    fstype: str
    dev: str
    options: tuple[str, ...]
    super_options: tuple[str, ...]
    root: str = "/"
    shared: bool = False

    @property
    def is_dlmfs(self) -> bool:
        return self.fstype == FSTYPE


def _unescape(field: bytes) -> str:
    """Undo the octal escapes of space, tab, newline, backslash and '#'."""
    if b"\\" not in field:
        return os.fsdecode(field)
    plain = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), field)
    return os.fsdecode(plain)


def parse(text: bytes) -> list[MountEntry]:
    """The entries of a mountinfo file; lines that are none are left out."""
    entries = []
    for line in text.split(b"\n"):
        left, dash, right = line.partition(b" - ")
        head, tail = left.split(b" "), right.split(b" ")
        if not dash or len(head) < 6 or len(tail) < 3:
            continue
        number, parent = proc.number(head[0]), proc.number(head[1])
        if number is None or parent is None:
            continue
        entry = MountEntry(
            id=number,
            parent=parent,
            mountpoint=_unescape(head[4]),
            source=_unescape(tail[1]),
            fstype=_unescape(tail[0]),
            dev=head[2].decode("ascii", "replace"),
            options=tuple(_unescape(head[5]).split(",")),
            super_options=tuple(_unescape(tail[2]).split(",")),
            root=_unescape(head[3]),
            shared=any(field.startswith(b"shared:") for field in head[6:]),
        )
        entries.append(entry)
    return entries


def mounts() -> list[MountEntry]:
    """Everything mounted in this process's mount namespace, below its root."""
    return parse(proc.own_mounts())


class _Walk:
    """Path resolution that knows at each step which mount it is on."""

    def __init__(self, table: Iterable[MountEntry]) -> None:
        entries = list(table)
        known = {e.id for e in entries}
        # Parents outside of this namespace or chroot count as one "mount 0" around it all.
        inside = {e.id: e.parent if e.parent in known - {e.id} else 0 for e in entries}
        self._on = {(inside[e.id], e.mountpoint): e for e in entries}

    def _top(self, mount: MountEntry | None, path: str) -> MountEntry | None:
        """The mount that one is on at `path`, coming from `mount`: mounts stack."""
        while above := self._on.get((mount.id if mount else 0, path)):
            mount = above
        return mount

    def resolve(self, path: str) -> tuple[str, MountEntry | None]:
        """The real path and the mount it is on. Below a dlmfs mount nothing is looked at (there
        are no symbolic links on one, so the text of the path tells all)."""
        stack = [("/", self._top(None, "/"))]
        todo = os.path.join(os.getcwd(), path).split("/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                del stack[max(1, len(stack) - 1) :]
                continue
            if name in ("", "."):
                continue
            base, mount = stack[-1]
            here = os.path.join(base, name)
            top = self._top(mount, here)
            if top is mount and not (mount and mount.is_dlmfs) and links < SYMLINKS_MAX:
                try:
                    target = os.readlink(here)
                except OSError:
                    pass  # no link, or nothing there: the caller will find out
                else:
                    links += 1
                    todo += target.split("/")[::-1]
                    if target.startswith("/"):
                        del stack[1:]
                    continue
            stack.append((here, top))
        return stack[-1]


def resolve(path: str) -> tuple[str, MountEntry | None]:
    """The real path of `path` and the mount that it lies on, without touching a dlmfs mount."""
    return _Walk(mounts()).resolve(path)


def find(path: str) -> MountEntry | None:
    """The dlmfs mount that `path` lies on, or None if that is no dlmfs."""
    entry = resolve(path)[1]
    return entry if entry is not None and entry.is_dlmfs else None


def shared_parent(entry: MountEntry) -> MountEntry | None:
    """What `entry` is mounted on, if an umount here is made elsewhere, too: it follows the propagation of
    that, not of the mount itself. The mount itself, where what it is on cannot be seen."""
    parent = next((each for each in mounts() if each.id == entry.parent), entry)
    return parent if parent.shared else None
