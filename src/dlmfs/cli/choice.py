"""Which mount, or which lock, a command is about; and whose word it is that is told of it."""

from __future__ import annotations

import os
from typing import Any

from dlmfs import control
from dlmfs.cli.say import complain
from dlmfs.client.place import find_mount, near_by
from dlmfs.errors import UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry, resolve
from dlmfs.rundir import is_trusted, owner_of


def choose(mountpoint: str | None) -> MountEntry:
    """The named mount; or the one that $DLMFS_MOUNT names, or the only one there is of root's and of
    this user's. Raises UsageError, Unavailable where nothing is mounted."""
    if mountpoint is None:
        return find_mount()
    real, entry = resolve(mountpoint)  # the mount is not touched: whoever made it may not answer
    if entry is None or not entry.is_dlmfs or real != entry.mountpoint:
        raise UsageError(f"{real} is not a dlmfs mount: `dlmfs status` lists them")
    return entry


def lock_at(path: str) -> tuple[MountEntry, str, str]:
    """The mount, domain and lock that a path names: absolute, from the current folder, or DOMAIN/LOCK
    below the mount that `choose` finds. The mount itself is not touched, so the file need not exist,
    nor the daemon run. Raises UsageError, Unavailable where nothing is mounted."""
    named = os.path.isabs(path) or near_by(path) is not None
    if not named and path.count("/") == 1:
        path = os.path.join(find_mount().mountpoint, path)
    real, entry = resolve(path)
    if entry is None or not entry.is_dlmfs or not (named or is_trusted(entry)):
        raise UsageError(f"{real} is not on a dlmfs mount: `dlmfs status` lists them")
    parts = [part for part in real[len(entry.mountpoint) :].split("/") if part]
    if len(parts) != 2:
        raise UsageError(f"{real} is not a lock: give DOMAIN/LOCK, or MOUNTPOINT/DOMAIN/LOCK")
    return entry, parts[0], parts[1]


def dlmfs_mounts() -> tuple[list[MountEntry], list[MountEntry]]:
    """This host's mounts: those of root and of this user, and those of others, who are not asked
    without being named."""
    every = [entry for entry in fuse_mount.mounts() if entry.is_dlmfs]
    return [e for e in every if is_trusted(e)], [e for e in every if not is_trusted(e)]


def of_others(entries: list[MountEntry]) -> str:
    """One line, however many they are."""
    count = "1 mount" if len(entries) == 1 else f"{len(entries)} mounts"
    users = sorted({owner_of(entry) for entry in entries})
    names = ", ".join(map(str, users[:3])) + (" and others" if len(users) > 3 else "")
    return f"{count} of other users ({names}) not asked: name one to ask it"


def ask(entry: MountEntry, question: dict[str, object], timeout_s: float = 5.0) -> Any:
    """As `control.ask`. Of another user's mount it is said that what follows is his word."""
    if not is_trusted(entry):
        complain(
            f"{entry.mountpoint} is user {owner_of(entry)}'s mount: what is told of it is what his "
            "program says"
        )
    return control.ask(entry, question, timeout_s)
