"""Which mount, or which lock, a command is about."""

from __future__ import annotations

import os

from dlmfs.errors import UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry, resolve


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


def lock_at(path: str) -> tuple[MountEntry, str, str]:
    """The mount, domain and lock that a path names. The mount itself is not touched, so the file need
    not exist, nor the daemon run. Raises UsageError."""
    real, entry = resolve(path)
    if entry is None or not entry.is_dlmfs:
        raise UsageError(f"{real} is not on a dlmfs mount: `dlmfs status` lists them")
    parts = [part for part in real[len(entry.mountpoint) :].split("/") if part]
    if len(parts) != 2:
        raise UsageError(f"{real} is not a lock: give MOUNTPOINT/DOMAIN/LOCK")
    return entry, parts[0], parts[1]
