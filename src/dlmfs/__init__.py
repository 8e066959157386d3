"""dlmfs: cluster locks as files, on any Linux box, in pure Python.

    import dlmfs

    with dlmfs.Lock("jobs/backup"):
        ...

`dlmfs.client` says more, `dlmfs.client.aio` has the same for asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlmfs import client as client
    from dlmfs import testing as testing
    from dlmfs.client import Abandoned as Abandoned
    from dlmfs.client import Cancelled as Cancelled
    from dlmfs.client import Deadlock as Deadlock
    from dlmfs.client import DlmfsError as DlmfsError
    from dlmfs.client import Domain as Domain
    from dlmfs.client import Election as Election
    from dlmfs.client import Holder as Holder
    from dlmfs.client import Lock as Lock
    from dlmfs.client import LockLost as LockLost
    from dlmfs.client import NotGranted as NotGranted
    from dlmfs.client import NotPermitted as NotPermitted
    from dlmfs.client import Semaphore as Semaphore
    from dlmfs.client import StaleToken as StaleToken
    from dlmfs.client import TimedOut as TimedOut
    from dlmfs.client import Unavailable as Unavailable
    from dlmfs.client import UsageError as UsageError
    from dlmfs.client import find_mount as find_mount

__version__ = "0.1.0"

_MODULES = ("client", "testing")


def __getattr__(name: str) -> object:
    """What programs use, when they ask for it: the commands, which must start fast, do not."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"dlmfs.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'dlmfs' has no attribute {name!r}")
    client = import_module("dlmfs.client")
    if name not in client.__all__:
        raise AttributeError(f"module 'dlmfs' has no attribute {name!r}")
    value = globals()[name] = getattr(client, name)
    return value


def __dir__() -> list[str]:
    from importlib import import_module

    client = import_module("dlmfs.client")
    return sorted({*globals(), *_MODULES, *client.__all__})
