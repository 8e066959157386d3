"""Folders that nobody else can change: how to get into one, and how to make one among other people's.

Rules of this file
------------------
* Who may write a folder may put anything in the place of what lies in it, between any look and any
  use. So a path is walked by descriptors, and each part is looked at through its own, once it is open.
* A part is trusted if it belongs to root or to this process's user and nobody else can write it. A
  user's private group is nobody else: many systems give him umask 002 for it.
  Folders that everybody may write, with the sticky bit (/tmp), may be on the way: what lies there is
  moved by its owner alone, who is looked at next. Links are parts like any other.
* Nothing on a trusted path can be changed by anybody else afterwards, so it may be used by its name.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import random
import secrets
import stat
import time
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
    if info.st_uid not in known and ((among_others and is_link) or info.st_uid != outside()):
        raise BadState(
            f"{path} belongs to another user (uid {info.st_uid}), who can change what lies there: "
            "name a place below folders that only root and you can write"
        )
    if is_link or not info.st_mode & 0o022:
        return
    if not info.st_mode & 0o002 and info.st_uid == os.geteuid() and _is_private(fd, info.st_gid):
        return
    if not (sticky and info.st_mode & stat.S_ISVTX):
        raise BadState(
            f"others can write {path} and change what lies there: chmod go-w {path}, or name a place "
            "below folders that only root and you can write"
        )


def _is_private(fd: int, gid: int) -> bool:
    """Whether what a folder's group may do only this user may: his private group, as pam_umask(8) knows
    one, without members, and no access control list that has others in it."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    if user.pw_uid == 0 or user.pw_gid != gid or user.pw_name != group.gr_name:
        return False
    if set(group.gr_mem) - {user.pw_name}:
        return False
    try:
        os.getxattr(f"/proc/self/fd/{fd}", "system.posix_acl_access")
    except OSError as error:
        return error.errno in (errno.ENODATA, errno.EOPNOTSUPP)
    return False


OVERFLOW_UID: Final = 65534
"""Unless the host's administrator has said otherwise."""


def outside() -> int | None:
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
    with contextlib.suppress(FileExistsError):
        _mkdir(parent, os.path.basename(path), mode)
    return _into(parent, path)


def _mkdir(parent: int, name: str, mode: int) -> None:
    """mkdir(2), whatever the umask: what a daemon of root tells all programs lies in such a folder."""
    os.mkdir(name, mode, dir_fd=parent)
    # It may be gone by now, and another's in its place: of two that begin in `settle` one removes both.
    with contextlib.suppress(FileNotFoundError, NotPermitted):
        set_mode(parent, name, mode)


def _into(parent: int, path: str) -> int:
    """Go into a folder that must be there."""
    try:
        fd = os.open(os.path.basename(path), _ENTER, dir_fd=parent)
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


def make_missing(path: str, mode: int) -> int:
    """The same for a folder and what is missing above it; its descriptor. Raises BadState, OSError."""
    missing = [path]
    while not os.path.isdir(os.path.dirname(missing[0])):
        missing.insert(0, os.path.dirname(missing[0]))
    return make_path(missing, mode)


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


# -- a user's folder where everybody may make folders -----------------------------------------------


CONTROL: Final = "ctl"
"""Where the sockets lie in it; a folder that has it is the user's for good."""
SETTLE_MAX: Final = 100
PAUSE_S: Final = 0.02


def settle(path: str, mode: int) -> str:
    """This user's own folder in one like /dev/shm, made if there is none, and the same for all of his
    processes: it is called `path`, or if others made something of that name, that and a dot and more.

    Nobody else can make a folder that is ours, so those that are ours are looked for, whatever they are
    called. Who finds none makes one, and looks again: only if there is no other does he settle there. Who
    finds several, which were begun at the same moment, removes those in which nobody has settled, and
    begins again. (Of two folders one was there before the other, and who settles in the later one has
    looked since: he would have seen it.) Raises BadState, OSError.
    """
    base, stem = os.path.split(path)
    fd = enter(base, shared=True)
    try:
        for _ in range(SETTLE_MAX):
            settled = _settled(fd, base, stem, mode)
            if settled is not None:
                return settled
            time.sleep(random.random() * PAUSE_S)
    finally:
        os.close(fd)
    raise BadState(f"no folder {path} of this user's own could be made: others make and remove it")


def _settled(fd: int, base: str, stem: str, mode: int) -> str | None:
    """One attempt: the folder; None: again."""
    before = _own(fd, stem, os.geteuid())
    if not before:
        before = [_made(fd, stem, mode)]
    now = _own(fd, stem, os.geteuid())
    if len(now) == 1 and now == before:
        with contextlib.suppress(FileNotFoundError):  # just removed by another who began
            path = os.path.join(base, now[0])
            folder = _into(fd, path)
            try:
                os.close(make(folder, f"{path}/{CONTROL}", mode))
            finally:
                os.close(folder)
            return path
    elif len(now) > 1:
        for name in now:
            with contextlib.suppress(OSError):  # somebody has settled there
                os.rmdir(name, dir_fd=fd)
    return None


def _made(fd: int, stem: str, mode: int) -> str:
    """A new folder: of that name, or one that nobody can have guessed."""
    with contextlib.suppress(FileExistsError):
        _mkdir(fd, stem, mode)
        return stem
    name = f"{stem}.{secrets.token_hex(8)}"
    _mkdir(fd, name, mode)
    return name


def _own(fd: int, stem: str, uid: int) -> list[str]:
    """The names of a user's folders there. Not those of a file system that somebody mounted there, which
    may tell what he likes of owners."""
    here = os.fstat(fd).st_dev
    found = []
    listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        for name in os.listdir(listing):
            if name == stem or name.startswith(f"{stem}."):
                with contextlib.suppress(OSError):
                    info = os.lstat(name, dir_fd=fd)
                    if stat.S_ISDIR(info.st_mode) and info.st_uid == uid and info.st_dev == here:
                        found.append(name)
    finally:
        os.close(listing)
    return found


def owned(path: str, uid: int) -> list[str]:
    """Where a user's folder `path` is, as `settle` makes it: none, or one. For anybody who asks."""
    base, stem = os.path.split(path)
    try:
        fd = os.open(base, _ENTER)
    except OSError:
        return []
    try:
        return [os.path.join(base, name) for name in sorted(_own(fd, stem, uid))]
    finally:
        os.close(fd)
