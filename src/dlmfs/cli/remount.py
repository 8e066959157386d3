"""`mount -o remount,...`: other mount flags for a mount that goes on. All else is as it was mounted.

mount(8) gives what its line in fstab says, or the mount table, and with it what the kernel shows there.
So options that say what is so already are taken; what would have to be another daemon is refused by name,
before anything is changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from dlmfs.config import (
    MountOptions,
    lock_delay_of,
    options_of,
    parse_source,
    settings,
    split_all,
)
from dlmfs.control import ask
from dlmfs.errors import DlmfsError, Unavailable, UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.model import Limits

WORD: Final = "remount"
FLAGS: Final = ("ro", "noexec", "noatime")
"""What can change: fields of `MountOptions` that the kernel keeps, not the daemon."""
ALWAYS: Final = ("nosuid", "nodev", "default_permissions")
KERNELS: Final = ("user_id=", "group_id=", "max_read=", "blksize=")
"""Shown in the mount table, and given back to us by mount(8)."""


def is_asked(texts: list[str]) -> bool:
    return WORD in split_all(texts)


def run(source: str, mountpoint: str, texts: list[str], *, fake: bool) -> int:
    """Change the flags; with `fake` only look whether that would do. Raises UsageError for what a remount
    cannot change, Unavailable if the daemon does not tell what it was mounted with."""
    entry = fuse_mount.find(mountpoint)
    if entry is None or entry.mountpoint != mountpoint:
        raise UsageError(f"no dlmfs is mounted at {mountpoint}: there is nothing to remount")
    words = [word for word in split_all(texts) if word != WORD and not word.startswith(KERNELS)]
    changes: dict[str, bool] = {}
    kept: dict[str, tuple[str, object]] = {}
    for word in words:
        for field, value in settings(word).items():
            if field in FLAGS:
                changes[field] = bool(value)
            elif field not in ALWAYS:
                kept[field] = word, value
    _check_kept(entry, source, kept)
    if not fake:
        fuse_mount.remount(entry, changes)
    return 0


def _check_kept(entry: MountEntry, source: str, kept: dict[str, tuple[str, object]]) -> None:
    """Raises UsageError if SOURCE or an option is another than that of the daemon."""
    other_source = source not in (entry.source, "none")
    if not kept and not other_source:
        return
    try:
        status = ask(entry, {"cmd": "status"})
    except DlmfsError as error:
        raise Unavailable(
            f"whether {entry.mountpoint} is mounted with the same options is not known: {error}"
        ) from None
    if other_source and source != status["source"]:
        raise _refusal(entry, source, f"{status['source']} is mounted there")
    now = _now(entry, status)
    for field, (word, value) in kept.items():
        limits = field in Limits.__dataclass_fields__
        if getattr(now.limits if limits else now, field) != value:
            name = "".join(word.partition("=")[:2])
            was = [given for given in status["options"] if given.startswith(name)]
            raise _refusal(
                entry, word, f"it is mounted {f'with {was[-1]}' if was else f'without {name}'}"
            )


def _now(entry: MountEntry, status: dict[str, Any]) -> MountOptions:
    """What the daemon was mounted with, where it chose by itself what it chose."""
    if status["options"] is None:
        raise Unavailable(f"what {entry.mountpoint} was mounted with is told only to root")
    options = options_of(status["options"])
    return replace(
        options,
        node=status["node"],
        allow_other="allow_other" in entry.super_options,
        fsname=entry.source,
        lock_delay_s=lock_delay_of(parse_source(status["source"]), options),
    )


def _refusal(entry: MountEntry, what: str, now: str) -> UsageError:
    at = entry.mountpoint
    return UsageError(
        f"{what} cannot be changed by a remount ({now}), only ro, rw, exec, noexec, atime and noatime: "
        f"umount {at}, and mount it anew"
    )
