"""Fencing tokens as guards see them: which there can be, and what is said of those that are refused."""

from __future__ import annotations

import os
import time
from typing import Final

from dlmfs.errors import StaleToken, UsageError

TOKEN_MAX: Final = (1 << 64) - 1
TOKEN_DIGITS: Final = len(str(TOKEN_MAX))

_SECOND: Final = 31_250 << 16
"""A token is a revision << 16, and a state of the embedded engine that begins anew begins at the clock's
time, in units of 32 µs. So tokens grow by this in a second at most, and may jump over all the time for
which a resource was not used."""
AHEAD_MAX: Final = 2 * 366 * 86_400 * _SECOND
"""Two years."""
_EPOCH: Final = 1_767_225_600.0
"""2026: a clock that says less is wrong."""


def checked(token: int) -> int:
    if not 0 < token <= TOKEN_MAX:
        raise UsageError(f"{token} is no fencing token")
    return token


def furthest(seen: int) -> int:
    """The largest token that can be, after that one; 0: none was seen."""
    return (seen or int(max(time.time(), _EPOCH)) * _SECOND) + AHEAD_MAX


def too_far(what: str, token: int, seen: int) -> UsageError:
    return UsageError(
        f"the token {token} is years ahead of {seen}, the largest that {what} has seen: noted, it would "
        "shut out all others. If it is right (a clock was once ahead), tell the guard so: "
        "docs/library.md, Guards"
    )


def stale(what: str, token: int, seen: int) -> StaleToken:
    return StaleToken(
        f"{what} has seen the token {seen}: with {token} it is too late, the lock was lost"
    )


def sync_folder(path: str) -> None:
    """Make a name in the folder durable, or after a power failure the file may be the one before."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
