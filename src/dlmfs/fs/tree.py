"""The tree of one mount: a root, domains in it, lock files in them. Names, modes, owners, times.

Each node has a tree of its own; only the locks are shared (kernel-behaviour, "Name space").
Rules of the kernel's dlmfs kept here: readdir newest first; a domain counts in the root's links;
creating changes no times of the directory, removing does; a lock file is always 64 bytes.
"""

from __future__ import annotations

import stat
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

from dlmfs.model import LVB_SIZE
from dlmfs.modes import DEFAULT, Modes

ROOT_INO: Final = 1


class Inode:
    """A directory or a lock file. `lookups` counts the kernel's references (FORGET), `maker` is the
    user who made it, whoever owns it now."""

    __slots__ = (
        "atime_ns",
        "ctime_ns",
        "gid",
        "ino",
        "linked",
        "lookups",
        "maker",
        "mode",
        "mtime_ns",
        "name",
        "parent",
        "uid",
    )

    def __init__(self, ino: int, parent: Directory | None, name: bytes, mode: int) -> None:
        self.ino = ino
        self.parent = parent
        self.name = name
        self.mode = mode
        self.uid = self.maker = 0
        self.gid = 0
        now = time.time_ns()
        self.atime_ns = self.mtime_ns = self.ctime_ns = now
        self.lookups = 0
        self.linked = True

    @property
    def nlink(self) -> int:
        return 1 if self.linked else 0

    @property
    def size(self) -> int:
        return LVB_SIZE

    def changed(self) -> None:
        """Its mode, owner or times are others."""
        self.ctime_ns = time.time_ns()

    def end_set_id(self) -> None:
        """As a change of the owner, and of the size by others than root, does to a file."""
        if not stat.S_ISDIR(self.mode):
            self.mode &= ~(stat.S_ISUID | (stat.S_ISGID if self.mode & stat.S_IXGRP else 0))

    def path(self) -> bytes:
        """Below the mount point, for messages."""
        above = self.parent.path() if self.parent is not None else b""
        return above + b"/" + self.name if self.name else above


class LockFile(Inode):
    """`lost`: its locks were lost, and another inode has its name now; `forgotten`: it was removed, since
    nobody used it; `look`: the number of the next look at whether somebody does (`unused`), or 0."""

    __slots__ = ("forgotten", "look", "lost")

    def __init__(self, ino: int, parent: Directory | None, name: bytes, mode: int) -> None:
        super().__init__(ino, parent, name, mode)
        self.lost = self.forgotten = False
        self.look = 0

    @property
    def is_stale(self) -> bool:
        """Whether the kernel knows a name that it should look up again."""
        return self.lost or self.forgotten

    @property
    def domain(self) -> Directory:
        assert self.parent is not None
        return self.parent


class Directory(Inode):
    """The root or a domain. `removing`: an rmdir of it is under way, perhaps after it was answered."""

    __slots__ = ("_numbers", "children", "removing")

    def __init__(self, ino: int, parent: Directory | None, name: bytes, mode: int) -> None:
        super().__init__(ino, parent, name, mode)
        self.children: dict[bytes, Inode] = {}
        self.removing = False
        self._numbers: list[int] = []  # of the children, growing; some may be gone

    @property
    def is_root(self) -> bool:
        return self.parent is None

    @property
    def nlink(self) -> int:
        if not self.linked:
            return 0
        return 2 + (len(self.children) if self.is_root else 0)

    @property
    def size(self) -> int:
        return 0

    def link(self, inode: Inode) -> None:
        """Give the newest inode of all its name here."""
        self.children[inode.name] = inode
        self._numbers.append(inode.ino)
        if len(self._numbers) > 2 * len(self.children) + 64:
            self._numbers = sorted(child.ino for child in self.children.values())

    def numbers_below(self, ino: int) -> Iterator[int]:
        """The children's numbers from the newest to the oldest, below `ino`. Some may be gone.

        A place in this order stays right whatever comes and goes, so a directory that is being
        read needs no copy of its names.
        """
        for place in range(bisect_left(self._numbers, ino) - 1, -1, -1):
            yield self._numbers[place]


class Tree:
    """All inodes that are linked or that the kernel still knows. Numbers are never used again
    (fuse-notes 16)."""

    def __init__(self, uid: int = 0, gid: int = 0, modes: Modes = DEFAULT) -> None:
        """`uid`, `gid`: who mounts."""
        self.modes = modes
        self.root = Directory(ROOT_INO, None, b"", stat.S_IFDIR | modes.root())
        self.root.uid, self.root.gid = modes.owner(uid, gid)
        self.inodes: dict[int, Inode] = {ROOT_INO: self.root}
        self._next = ROOT_INO + 1

    def draft(  # noqa: PLR0917 - what mkdir(2) and mknod(2) tell
        self, parent: Directory, name: bytes, mode: int, uid: int, gid: int, umask: int = 0
    ) -> Inode:
        """A domain (in the root) or lock file (in a domain) as this user would make it: not linked, and
        without a number. `mode`: with its type, before the umask."""
        kind, asked = stat.S_IFMT(mode), mode & 0o7777
        assert (kind == stat.S_IFDIR) == parent.is_root
        inode: Inode
        if parent.is_root:
            inode = Directory(0, parent, name, kind | self.modes.domain(asked, umask))
        else:
            inode = LockFile(0, parent, name, kind | self.modes.lock(asked, umask, parent.mode))
        inode.maker = uid
        inode.uid, inode.gid = self.modes.owner(uid, gid)
        if parent.mode & stat.S_ISGID:
            inode.gid = parent.gid
            if parent.is_root:
                inode.mode |= stat.S_ISGID
        return inode

    def add(  # noqa: PLR0917 - as `draft`
        self, parent: Directory, name: bytes, mode: int, uid: int, gid: int, umask: int = 0
    ) -> Inode:
        """Make and link it."""
        assert name not in parent.children
        inode = self.draft(parent, name, mode, uid, gid, umask)
        inode.ino = self._next
        self._next += 1
        parent.link(inode)
        self.inodes[inode.ino] = inode
        return inode

    def replace(self, file: LockFile) -> LockFile:
        """Give a lost file's name, mode, owner and times to a new inode."""
        assert file.linked
        new = LockFile(self._next, file.parent, file.name, file.mode)
        self._next += 1
        for field in ("uid", "gid", "maker", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(new, field, getattr(file, field))
        file.domain.link(new)
        self.inodes[new.ino] = new
        file.linked = False
        file.lost = True
        if not file.lookups:
            del self.inodes[file.ino]
        return new

    def remove(self, inode: Inode) -> None:
        """Unlink; the number stays valid until the kernel forgets it."""
        parent = inode.parent
        assert parent is not None
        del parent.children[inode.name]
        inode.linked = False
        now = time.time_ns()
        inode.ctime_ns = parent.mtime_ns = parent.ctime_ns = now
        if not inode.lookups:
            del self.inodes[inode.ino]

    def forget(self, ino: int, count: int) -> None:
        """The kernel drops `count` references. Unknown numbers and excess counts are ignored."""
        inode = self.inodes.get(ino)
        if inode is None:
            return
        inode.lookups = max(0, inode.lookups - count)
        if not inode.lookups and not inode.linked:
            del self.inodes[ino]
