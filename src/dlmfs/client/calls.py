"""What those who drive `logic.taking` have in common."""

from __future__ import annotations

import errno
import os

from dlmfs.client import logic


def token(fd: int) -> int:
    """The fencing token of an open lock. Raises OSError: EIO if it is lost."""
    text = os.getxattr(fd, logic.TOKEN)
    if not text:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return int(text)


def state(mountpoint: str) -> str:
    """The state of the mount's node, and why. Raises OSError. A daemon that is stopped is waited for."""
    return os.fsdecode(os.getxattr(mountpoint, logic.STATE))


def waiters(path: str) -> int:
    """How many wait for a lock, as its node knows; 0 if it does not tell."""
    import json

    try:
        rows = json.loads(os.getxattr(path, logic.WAITERS))
    except (OSError, ValueError):
        return 0
    return sum(row.get("more", 1) for row in rows)


def spread(seconds: float) -> float:
    """From half of it to one and a half: who was refused at the same time does not come back so."""
    return seconds * (0.5 + os.urandom(1)[0] / 255)
