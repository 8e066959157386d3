"""Where a daemon puts what programs must find without asking it: its socket, its deadline.

The place follows from the mount table alone: the user that mounted it, and the device number.
"""

from __future__ import annotations

import os
import stat

from dlmfs import folders
from dlmfs.errors import BadState, NotPermitted
from dlmfs.fuse.mountinfo import MountEntry


def owner_of(entry: MountEntry) -> int:
    """The user that mounted it, from the mount table."""
    for option in entry.super_options:
        if option.startswith("user_id="):
            return int(option.removeprefix("user_id="))
    return 0


def places(uid: int) -> tuple[str, ...]:
    """Where daemons of this user may have theirs, the best first. /run may be read-only, or another
    user's where root is not the machine's root (containers)."""
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"
    own = f"{shm}/dlmfs-{uid}/ctl"
    return ("/run/dlmfs/ctl", own) if uid == 0 else (own,)


def is_safe(folder: str, uid: int) -> bool:
    """Whether only this user or root can have put there what is there. Raises OSError."""
    for part in (os.path.dirname(folder), folder):
        info = os.lstat(part)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (0, uid) or info.st_mode & 0o022:
            return False
    return True


def name(dev: str, suffix: str) -> str:
    """`dev`: the mount's device, "major:minor"."""
    return f"{dev.replace(':', '-')}.{suffix}"


def make_folder(uid: int) -> str:
    """The first folder that is ours alone, or can be made so. Raises NotPermitted."""
    mode = 0o755 if uid == 0 else 0o700
    refused = ""
    for folder in places(uid):
        try:
            os.close(folders.make_path([os.path.dirname(folder), folder], mode, shared=True))
        except (OSError, BadState) as error:
            refused = refused or str(error)
            continue
        return folder
    raise NotPermitted(f"no place for the control socket: {refused}, or mend its mode")
