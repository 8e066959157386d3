"""Where a lock lies: the mount it is on, found by the mount table alone, its domain and its name.

A path that only looks like a lock's would be an ordinary file, and lock nothing. So every path is
placed on a dlmfs mount before it is used, and the open file is checked to be on that mount.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, NamedTuple

from dlmfs.errors import Unavailable, UsageError
from dlmfs.fuse import mountinfo
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.names import domain_fault, lock_fault
from dlmfs.rundir import is_trusted, owner_of

ENVIRONMENT = "DLMFS_MOUNT"
"""Names the mount for programs that do not, where there are several."""

SHOWN_MAX: Final = 100
"""Letters of a path whose name is too long, in the message that says so."""

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Place(NamedTuple):
    """A lock as one mount shows it. `dev` is the mount's device, "major:minor"; `uid`, the user that
    mounted it."""

    mountpoint: str
    dev: str
    source: str
    domain: str
    name: str
    uid: int = 0

    @property
    def path(self) -> str:
        return f"{self.mountpoint.rstrip('/')}/{self.domain}/{self.name}"

    @property
    def order(self) -> tuple[str, str, str, str]:
        """The order in which several locks are taken. The same on every node, wherever it has its
        mount, so that two takers of the same locks never wait for each other."""
        return self.domain, self.name, space(self.source), self.mountpoint


def space(source: str) -> str:
    """What a SOURCE names, however its servers are listed."""
    if source.startswith("etcd://"):
        return f"etcd://{source.rpartition('/')[2]}"
    return source


def find_mount(where: AnyPath | None = None) -> MountEntry:
    """The dlmfs mount that the path `where` lies on; without it the one that $DLMFS_MOUNT names, or
    else the only one there is of root's and of this user's own: another user's mount must be named.
    Raises UsageError where the answer is not one mount, Unavailable where nothing is mounted."""
    named = os.fsdecode(where) if where is not None else os.environ.get(ENVIRONMENT, "")
    if named:
        entry = _resolved(named)[1]
        if entry is None or not entry.is_dlmfs:
            raise UsageError(f"{named} is not on a dlmfs mount: `dlmfs status` lists them")
        return entry
    # A mount covered by another one at the same place cannot be reached: the later one counts.
    every = {entry.mountpoint: entry for entry in mountinfo.mounts() if entry.is_dlmfs}
    entries = {where: entry for where, entry in every.items() if is_trusted(entry)}
    if not entries:
        others = f"; {len(every)} of other users have to be named" if every else ""
        raise Unavailable(f"no dlmfs is mounted here: `dlmfs mount SOURCE DIR` mounts one{others}")
    if len(entries) > 1:
        raise UsageError(
            f"there are {len(entries)} dlmfs mounts: give an absolute path, or name one in "
            f"${ENVIRONMENT} (`dlmfs status` lists them)"
        )
    return next(iter(entries.values()))


def _resolved(path: str) -> tuple[str, MountEntry | None]:
    """As `mountinfo.resolve`; an automount that nobody has used yet is used."""
    real, entry = mountinfo.resolve(path)
    if entry is None or entry.fstype != "autofs":
        return real, entry
    with contextlib.suppress(OSError):
        os.close(os.open(entry.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    return mountinfo.resolve(path)


def near_by(path: str) -> MountEntry | None:
    """The dlmfs mount that a path from the current folder leads to. Another user's only if we are on it:
    he must not decide, by a link or a mount in a folder of his, what a relative path means."""
    entry = mountinfo.find(path)
    if entry is None or is_trusted(entry):
        return entry
    here = mountinfo.find(".")
    return entry if here is not None and here.id == entry.id else None


def place(path: AnyPath, mount: AnyPath | None = None, *, near: bool = False) -> Place:
    """The place of a lock: an absolute path, or DOMAIN/LOCK below `mount` (see `find_mount`).

    `near`: a relative path counts from the current folder first, as a shell's words do (see `near_by`).

    Raises UsageError for what is no lock's path, Unavailable where nothing is mounted.
    """
    text = os.fsdecode(path)
    if "\0" in text:
        raise UsageError("a path cannot contain a NUL character")
    if os.path.isabs(text) or (near and near_by(text) is not None):
        real, entry = _resolved(text)
        if entry is None or not entry.is_dlmfs:
            raise UsageError(f"{text} is not on a dlmfs mount: `dlmfs status` lists them")
        below = os.path.relpath(real, entry.mountpoint)
    else:
        entry = find_mount(mount)
        below = os.path.normpath(text)
    parts = below.split("/")
    if len(parts) != 2 or ".." in parts or text.endswith("/"):
        raise UsageError(f"{text} is not a lock: give DOMAIN/LOCK, or MOUNTPOINT/DOMAIN/LOCK")
    domain, name = parts
    for fault in (domain_fault(os.fsencode(domain)), lock_fault(os.fsencode(name))):
        if fault is not None:
            raise UsageError(f"{_short(text)}: {fault}")
    return Place(entry.mountpoint, entry.dev, entry.source, domain, name, owner_of(entry))


def _short(path: str) -> str:
    """A path that may be longer than anybody reads."""
    return path if len(path) <= SHOWN_MAX else f"{path[: SHOWN_MAX - 3]}..."
