"""Where a daemon puts what programs must find without asking it: its socket, its deadline.

The place follows from the mount table alone: the user that mounted it, and the device number. A user's
is in his home (`home`), where that is fit, else in /dev/shm. Where
that cannot be written, or is to be shared with a container, `run=` names another for the daemon and
$DLMFS_RUN for programs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from dlmfs import folders, home
from dlmfs.errors import BadState, MountFailed
from dlmfs.fuse.mountinfo import MountEntry


def owner_of(entry: MountEntry) -> int:
    """The user that mounted it, from the mount table."""
    for option in entry.super_options:
        if option.startswith("user_id="):
            return int(option.removeprefix("user_id="))
    return 0


def is_trusted(entry: MountEntry) -> bool:
    """Whether root or this process's user mounted it: what another's daemon says is only his word."""
    return owner_of(entry) in (0, os.getuid())


def named() -> str | None:
    """What the environment says, if it is a place that means the same everywhere."""
    folder = os.environ.get(ENVIRONMENT, "")
    return folder if folder.startswith("/") else None


def places(uid: int) -> tuple[str, ...]:
    """Where daemons of this user have theirs, or would, the best first. /run may be read-only, or another
    user's where root is not the machine's root (containers)."""
    path, chosen = _user_folder(uid), named()
    first = os.path.dirname(ROOT) if uid == 0 else home.path_of(uid)
    every = (
        *([chosen.rstrip("/")] if chosen is not None else []),
        *([first] if first is not None else []),
        *(folders.owned(path, uid) or [path]),
    )
    return tuple(f"{each}/{folders.CONTROL}" for each in every)


ENVIRONMENT: Final = "DLMFS_RUN"
ROOT: Final = f"/run/dlmfs/{folders.CONTROL}"


def _user_folder(uid: int) -> str:
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"
    return f"{shm}/dlmfs-{uid}"


def is_safe(folder: str, uid: int) -> bool:
    """Whether only this user or root can have put there what is there. Raises OSError."""
    own, ctl = os.lstat(os.path.dirname(folder)), os.lstat(folder)
    return own.st_dev == ctl.st_dev and all(
        stat.S_ISDIR(info.st_mode) and info.st_uid in (0, uid) and not info.st_mode & 0o022
        for info in (own, ctl)
    )


def name(dev: str, suffix: str) -> str:
    """`dev`: the mount's device, "major:minor"."""
    return f"{dev.replace(':', '-')}.{suffix}"


T = TypeVar("T")


def put(make: Callable[[str], T], what: str, chosen: str | None) -> T:
    """What `make` makes in the first folder of ours where that can be done: a file system may be
    read-only, or full. `chosen`: the only one (`run=`). Raises MountFailed, with what to do."""
    uid, refused = os.getuid(), []
    for path in (chosen,) if chosen is not None else _default(uid):
        try:
            return make(make_folder(path, uid, settle=chosen is None))
        except BadState as error:
            refused.append(str(error))
        except OSError as error:
            refused.append(f"{path}: {error.strerror or error}")
    mend = "mend that, or name a folder of your own" if chosen is None else "name another folder"
    raise MountFailed(
        f"no place for the {what}: {'; '.join(refused)}. To do: {mend} on a file system that can be "
        "written and has room: -o run=DIR"
    )


def _default(uid: int) -> tuple[str, ...]:
    """Where a daemon of this process's user has its own, the best first."""
    if uid == 0:
        return os.path.dirname(ROOT), _user_folder(uid)
    at_home = home.of_this_boot(uid)
    return (*([at_home.folder] if at_home.why is None else []), _user_folder(uid))


def make_folder(path: str, uid: int, *, settle: bool) -> str:
    """The folder `path` of this user alone, and in it the one for sockets and deadlines. `settle`: it
    lies where everybody may make folders. Raises BadState, OSError."""
    mode = 0o755 if uid == 0 else 0o700
    if home.is_of_this_boot(Path(path)):
        home.make(path)
        settle = False
    if settle:
        return f"{folders.settle(path, mode)}/{folders.CONTROL}"
    found = folders.walk(path)
    fds = [found.fd]
    try:
        if found.name:
            fds.append(folders.make(fds[-1], path.rstrip("/"), mode))
        inner = f"{path.rstrip('/')}/{folders.CONTROL}"
        fds.append(folders.make(fds[-1], inner, mode))
    finally:
        for fd in fds:
            os.close(fd)
    return inner
