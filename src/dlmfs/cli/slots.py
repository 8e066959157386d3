"""`dlmfs lock --slots N`: the slots are the library's (`dlmfs.client.slots`), so both share them."""

from __future__ import annotations

import fcntl
import os
import signal

from dlmfs.cli.signals import AWAITED
from dlmfs.client.place import Place
from dlmfs.client.semaphore import Semaphore

_held: list[Semaphore] = []
"""To the end of this process."""


def take(where: Place, slots: int, *, trying: bool) -> dict[Place, int]:
    """Have a slot; its lock and an open file of that. Raises TimedOut if it is `trying` in vain, and as
    the library. The library's threads begin here, and must not get signals that are the main one's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    try:
        semaphore = Semaphore(where.path, slots)
        semaphore.acquire(timeout=0 if trying else -1)
        lock = semaphore.lock
        assert lock is not None
        _held.append(semaphore)
        os.environ["DLMFS_SLOT"] = str(semaphore.slot)
        # Started without standard streams: the lock must not become the command's input.
        return {lock.place: fcntl.fcntl(lock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
