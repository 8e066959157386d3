"""Which mount, or which lock, a command is about."""

from __future__ import annotations

import os

from dlmfs.client.place import find_mount
from dlmfs.errors import UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry, find, resolve


def choose(mountpoint: str | None) -> MountEntry:
    """The named mount; or the one that $DLMFS_MOUNT names, or this host's only one. Raises
    UsageError, Unavailable where nothing is mounted."""
    if mountpoint is None:
        return find_mount()
    wanted = os.path.realpath(mountpoint)
    entries = [e for e in fuse_mount.mounts() if e.is_dlmfs and e.mountpoint == wanted]
    if not entries:
        raise UsageError(f"{wanted} is not a dlmfs mount: `dlmfs status` lists them")
    return entries[-1]


def lock_at(path: str) -> tuple[MountEntry, str, str]:
    """The mount, domain and lock that a path names: absolute, from the current folder, or DOMAIN/LOCK
    below the mount that `choose` finds. The mount itself is not touched, so the file need not exist,
    nor the daemon run. Raises UsageError, Unavailable where nothing is mounted."""
    if not os.path.isabs(path) and path.count("/") == 1 and find(path) is None:
        path = os.path.join(find_mount().mountpoint, path)
    real, entry = resolve(path)
    if entry is None or not entry.is_dlmfs:
        raise UsageError(f"{real} is not on a dlmfs mount: `dlmfs status` lists them")
    parts = [part for part in real[len(entry.mountpoint) :].split("/") if part]
    if len(parts) != 2:
        raise UsageError(f"{real} is not a lock: give DOMAIN/LOCK, or MOUNTPOINT/DOMAIN/LOCK")
    return entry, parts[0], parts[1]
