"""Folders that nobody else can change: how to get into one, and how to make one among other people's.

Rules of this file
------------------
* Who may write a folder may put anything in the place of what lies in it, between any look and any
  use. So a path is walked by descriptors, and each part is looked at through its own, once it is open.
* A part is trusted if it belongs to root or to this process's user and nobody else can write it.
  Folders that everybody may write, with the sticky bit (/tmp), may be on the way: what lies there is
  moved by its owner alone, who is looked at next. Links are parts like any other.
* Nothing on a trusted path can be changed by anybody else afterwards, so it may be used by its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final, NamedTuple

from dlmfs import proc
from dlmfs.errors import BadState, NotPermitted

LINKS_MAX: Final = 40
"""As the kernel's own bound (path_resolution(7))."""

_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTER: Final = _LOOK | os.O_DIRECTORY


class Found(NamedTuple):
    """Where a path leads: the folder, as a descriptor that is the caller's to close, and its real path;
    and the name in it, of what need not exist ("": the path leads to the folder itself)."""

    fd: int
    folder: str
    name: str


def walk(path: str) -> Found:
    """Go to the folder that holds what `path` (absolute) names, through trusted parts only. If that is a
    link, go on to where it leads.

    Raises BadState, with what to do, where somebody else could change the way; else OSError as open(2).
    """
    way = _Way()
    left = _parts(path)
    try:
        while left:
            name = left.pop()
            if not left and name != ".." and not way.is_link(name):
                return way.found(name)
            left += way.go(name)
        return way.found("")
    except BaseException:
        os.close(way.fd)
        raise


def enter(path: str, *, shared: bool = False) -> int:
    """The descriptor of a trusted folder; `shared`: or of one like /tmp, by a caller who looks at what
    lies there. Raises as `walk`."""
    found = walk(path)
    if not found.name:
        return found.fd
    try:
        fd = os.open(found.name, _ENTER, dir_fd=found.fd)
    finally:
        os.close(found.fd)
    try:
        _check(fd, os.path.join(found.folder, found.name), sticky=shared)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Way:
    """How far a walk has come."""

    def __init__(self) -> None:
        self.fd = os.open("/", _ENTER)
        self.names: list[str] = []
        self._links = 0
        _check(self.fd, "/", sticky=True)

    @property
    def path(self) -> str:
        return "/" + "/".join(self.names)

    def is_link(self, name: str) -> bool:
        try:
            return stat.S_ISLNK(os.lstat(name, dir_fd=self.fd).st_mode)
        except FileNotFoundError:
            return False

    def _is_shared(self) -> bool:
        return bool(os.fstat(self.fd).st_mode & 0o022)

    def go(self, name: str) -> list[str]:
        """One part further. If that is a link: the parts where it leads, the last one first."""
        new = os.open(name, _LOOK, dir_fd=self.fd)
        try:
            _check(new, os.path.join(self.path, name), sticky=True, among_others=self._is_shared())
            if stat.S_ISLNK(os.fstat(new).st_mode):
                return self._follow(os.readlink("", dir_fd=new))
            self.fd, new = new, self.fd
            self.names = self.names[:-1] if name == ".." else [*self.names, name]
            return []
        finally:
            os.close(new)

    def _follow(self, target: str) -> list[str]:
        self._links += 1
        if self._links > LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self.path)
        if target.startswith("/"):
            os.close(self.fd)
            self.fd, self.names = os.open("/", _ENTER), []
        return _parts(target)

    def found(self, name: str) -> Found:
        """The end: what lies beside `name` matters, too."""
        _check(self.fd, self.path, sticky=False)
        return Found(self.fd, self.path, name)


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _check(fd: int, path: str, *, sticky: bool, among_others: bool = False) -> None:
    """Raise BadState unless only root and this user can change what lies there. `sticky`: or its own
    owner; `among_others`: it lies in a folder that everybody may write. In a user namespace the
    machine's root cannot be told from its users; a folder is believed to be root's, a link is not."""
    info = os.fstat(fd)
    known = (0, os.geteuid())
    is_link = stat.S_ISLNK(info.st_mode)
    if info.st_uid not in known and ((among_others and is_link) or info.st_uid != _outside()):
        raise BadState(
            f"{path} belongs to another user (uid {info.st_uid}), who can change what lies there: "
            "name a place below folders that only root and you can write"
        )
    if is_link or not info.st_mode & 0o022:
        return
    if not (sticky and info.st_mode & stat.S_ISVTX):
        raise BadState(
            f"others can write {path} and change what lies there: chmod go-w {path}, or name a place "
            "below folders that only root and you can write"
        )


OVERFLOW_UID: Final = 65534
"""Unless the host's administrator has said otherwise."""


def _outside() -> int | None:
    """The user id that stands for everybody outside of this user namespace, the machine's root among
    them, of which nobody inside can be; None where it is just another user's."""
    overflow = proc.number(proc.read("sys/kernel/overflowuid")) or OVERFLOW_UID
    lines = (proc.read("self", "uid_map") or b"").splitlines()
    ranges = [tuple(map(int, line.split())) for line in lines]
    mapped = any(first <= overflow < first + count for first, _, count in ranges)
    return None if mapped else overflow


# -- things in a folder ----------------------------------------------------------------------------


def make(parent: int, path: str, mode: int) -> int:
    """Make a folder, or go into it: this user's own, that nobody else can write. `parent`: the descriptor
    of the folder that it lies in. Raises BadState if it is not so, else OSError."""
    name = os.path.basename(path)
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=parent)
    try:
        fd = os.open(name, _ENTER, dir_fd=parent)
    except NotADirectoryError:
        raise BadState(f"{path} is not a folder that only this user can write: remove it") from None
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        os.close(fd)
        raise BadState(f"{path} is not a folder that only this user can write: remove it")
    return fd


def make_path(paths: list[str], mode: int, *, shared: bool = False) -> int:
    """The same for several, each in the one before it; the descriptor of the last. `shared`: the first
    may lie in a folder like /tmp. Raises BadState, OSError."""
    fd = enter(os.path.dirname(paths[0]), shared=shared)
    for path in paths:
        above = fd
        try:
            fd = make(above, path, mode)
        finally:
            os.close(above)
    return fd


def set_mode(folder: int, name: str, mode: int) -> None:
    """chmod(2) of a file of this user's, never of what a link leads to. Raises NotPermitted, OSError."""
    fd = os.open(name, _LOOK, dir_fd=folder)
    try:
        info = os.fstat(fd)
        if stat.S_ISLNK(info.st_mode) or info.st_uid != os.geteuid():
            raise NotPermitted(f"{name} is a link, or another user's")
        if stat.S_IMODE(info.st_mode) != mode:
            os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)
