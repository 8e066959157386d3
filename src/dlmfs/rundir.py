"""Where a daemon puts what programs must find without asking it: its socket, its deadline.

The place follows from the mount table alone: the user that mounted it, and the device number.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from dlmfs import folders
from dlmfs.errors import BadState, NotPermitted
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


def places(uid: int) -> tuple[str, ...]:
    """Where daemons of this user have theirs, or would, the best first. /run may be read-only, or another
    user's where root is not the machine's root (containers)."""
    path = _user_folder(uid)
    own = folders.owned(path, uid) or [path]
    return (*([ROOT] if uid == 0 else []), *(f"{each}/{folders.CONTROL}" for each in own))


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


def make_folder(uid: int) -> str:
    """The first folder that is ours alone, or can be made so. Raises NotPermitted."""
    refused = ""
    for path in (*([os.path.dirname(ROOT)] if uid == 0 else []), _user_folder(uid)):
        try:
            return f"{folders.settle(path, 0o755 if uid == 0 else 0o700)}/{folders.CONTROL}"
        except (OSError, BadState) as error:
            refused = refused or str(error)
    raise NotPermitted(f"no place for the control socket: {refused}")
