"""Cluster locks for Python programs, on a mount of dlmfs that is found by itself.

    from dlmfs.client import Lock

    with Lock("jobs/backup") as lock:
        ...

`dlmfs.client.aio` has the same names for asyncio; `guard` makes a resource refuse old tokens;
`o2dlm` has libo2dlm's calls. docs/library.md is the tour.
"""

from dlmfs.client.logic import Abandoned as Abandoned
from dlmfs.client.place import find_mount as find_mount
from dlmfs.client.sync import Domain as Domain
from dlmfs.client.sync import Lock as Lock
from dlmfs.errors import Cancelled as Cancelled
from dlmfs.errors import Deadlock as Deadlock
from dlmfs.errors import DlmfsError as DlmfsError
from dlmfs.errors import LockLost as LockLost
from dlmfs.errors import NotGranted as NotGranted
from dlmfs.errors import NotPermitted as NotPermitted
from dlmfs.errors import StaleToken as StaleToken
from dlmfs.errors import TimedOut as TimedOut
from dlmfs.errors import Unavailable as Unavailable
from dlmfs.errors import UsageError as UsageError
