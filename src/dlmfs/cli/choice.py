"""Which mount a command is about when its argument may be left out."""

from __future__ import annotations

import os

from dlmfs.errors import UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry


def choose(mountpoint: str | None) -> MountEntry:
    """The named mount, or this host's only one. Raises UsageError."""
    entries = [entry for entry in fuse_mount.mounts() if entry.is_dlmfs]
    if mountpoint is not None:
        wanted = os.path.realpath(mountpoint)
        entries = [entry for entry in entries if entry.mountpoint == wanted]
        if not entries:
            raise UsageError(f"{wanted} is not a dlmfs mount: `dlmfs status` lists them")
    if not entries:
        raise UsageError("no dlmfs is mounted on this host: `dlmfs mount SOURCE DIR` mounts one")
    if len({entry.mountpoint for entry in entries}) > 1:
        raise UsageError("there are several mounts: say which, `dlmfs status` lists them")
    return entries[-1]
