"""Cluster locks for Python programs, on a mount of dlmfs that is found by itself.

    from dlmfs.client import Lock

    with Lock("jobs/backup") as lock:
        ...

`dlmfs.client.aio` has the same names for asyncio; `guard` makes a resource refuse old tokens;
`o2dlm` has libo2dlm's calls. docs/library.md is the tour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlmfs.errors import (
    Cancelled,
    Deadlock,
    DlmfsError,
    LockLost,
    NotGranted,
    NotPermitted,
    StaleToken,
    TimedOut,
    Unavailable,
    UsageError,
)

if TYPE_CHECKING:
    from dlmfs.client.election import Election as Election
    from dlmfs.client.logic import Abandoned as Abandoned
    from dlmfs.client.logic import Holder as Holder
    from dlmfs.client.place import find_mount as find_mount
    from dlmfs.client.semaphore import Semaphore as Semaphore
    from dlmfs.client.sync import Domain as Domain
    from dlmfs.client.sync import Lock as Lock

__all__ = [
    "Abandoned",
    "Cancelled",
    "Deadlock",
    "DlmfsError",
    "Domain",
    "Election",
    "Holder",
    "Lock",
    "LockLost",
    "NotGranted",
    "NotPermitted",
    "Semaphore",
    "StaleToken",
    "TimedOut",
    "Unavailable",
    "UsageError",
    "find_mount",
]

_HOMES = {
    "Abandoned": "logic",
    "Domain": "sync",
    "Election": "election",
    "Holder": "logic",
    "Lock": "sync",
    "Semaphore": "semaphore",
    "find_mount": "place",
}


def __getattr__(name: str) -> object:
    """The rest when it is asked for: `dlmfs lock`, which must start fast, uses a part only."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"dlmfs.client.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
