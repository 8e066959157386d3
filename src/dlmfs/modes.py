"""Whose the folders and locks of a mount are, and their modes: `-o uid=, gid=, mode=, umask=, dmode=,
fmode=`. Pure.

Rules of this file
------------------
* Without an option all is as in the kernel's dlmfs: it belongs to whoever made it, with the mode that
  was asked for less the umask; the root is 0755.
* With one, the maker's umask does not count: the same line of fstab gives the same modes on each node,
  whoever comes first.
* Nothing is ever more open than what was asked for (`mkdir -m 700` stays 0700) or than what the
  options allow. `chmod` by the owner goes where it likes, as everywhere.
* A transient lock, made with the sticky bit as `dlmfs lock` and the library do (`fs.unused`), is as open
  as its domain, no more: whoever may make and remove locks there may take them. It is one request, so
  nobody ever meets a file that is not yet open to him; and no umask, which all threads of a program
  share, is changed for it.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import Final

PERMISSIONS: Final = 0o777
READ_WRITE: Final = 0o666
ROOT: Final = 0o755
"""The root's mode, as in the kernel's dlmfs."""
INHERITED: Final = stat.S_ISGID | stat.S_ISVTX
"""Of `dmode=`: what no mkdir(2) asks for, so that every folder gets it."""


@dataclass(frozen=True, slots=True)
class Modes:
    """One mount's options; None: not given. `mode` is that of the root alone, as on a tmpfs."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    umask: int | None = None
    dmode: int | None = None
    fmode: int | None = None

    def root(self) -> int:
        """The mode of the mount's root."""
        if self.mode is not None:
            return self.mode
        if self.dmode is not None:
            return self.dmode
        return ROOT if self.umask is None else PERMISSIONS & ~self.umask

    def domain(self, asked: int, umask: int) -> int:
        """The mode of a domain, from the mode that mkdir(2) was given and the caller's umask."""
        if self.dmode is not None:
            return asked & (self.dmode | stat.S_ISVTX) | self.dmode & INHERITED
        return asked & ~(umask if self.umask is None else self.umask)

    def lock(self, asked: int, umask: int, domain: int) -> int:
        """The mode of a lock's file, from what mknod(2) or open(2) was given, the caller's umask and
        the mode of its domain."""
        bounded = self.fmode is not None or self.umask is not None
        if asked & stat.S_ISVTX:
            asked &= domain & READ_WRITE | stat.S_ISVTX
        elif not bounded:
            asked &= ~umask
        if self.fmode is not None:
            asked &= self.fmode | stat.S_ISVTX
        elif self.umask is not None:
            asked &= ~self.umask
        if self.uid is not None or self.gid is not None:
            asked &= PERMISSIONS | stat.S_ISVTX  # a set-ID bit would be his who did not make it
        return asked

    def owner(self, uid: int, gid: int) -> tuple[int, int]:
        """Whose it is, made by this user and group in a folder that gives its own group to nobody."""
        return (
            uid if self.uid is None else self.uid,
            gid if self.gid is None else self.gid,
        )


DEFAULT: Final = Modes()
