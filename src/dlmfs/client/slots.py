"""A semaphore's slots: locks of one domain, and one more for the queue. The same for threads and asyncio.

Rules of this file
------------------
* Whoever has one of the locks NAME.1 to NAME.N has a slot. Nothing else counts: so exclusion, loss and
  tokens are those of locks.
* NAME.turn is the queue: only who has it waits for slots, for all at once, and takes the first that
  comes free. The others wait for it, first come, first served, between nodes, too.
* A try takes the turn first, so that it overtakes nobody.
"""

from __future__ import annotations

import os
import random
import time
from typing import Generic, TypeVar

from dlmfs.client import base
from dlmfs.client.place import AnyPath
from dlmfs.errors import TimedOut, UsageError

SLOTS_MAX = 256
"""The first in the queue waits for each of them by a thread."""


L = TypeVar("L", bound=base.BaseLock)


class BaseSlots(Generic[L]):
    """How many there are, where they lie, until when one is waited for, and which this object has.

    `lock` is the slot's lock while it is held: its `token`, `lost`, `wait_lost` and value are the slot's.
    """

    lock: L | None = None
    slot = 0
    """Its number, from 1; 0: none."""

    def __init__(
        self,
        path: AnyPath,
        slots: int,
        *,
        timeout: float | None = None,
        mount: AnyPath | None = None,
    ) -> None:
        """Nothing is opened yet.

        `path`: as of a Lock; the slots are the locks PATH.1, PATH.2 and so on. `slots`: how many there
        are, 1 to 256: the same number everywhere, or there are as many as the largest says.
        `timeout`, `mount`: as of a Lock.

        Raises UsageError for what is no lock's path.
        """
        if not isinstance(slots, int) or not 1 <= slots <= SLOTS_MAX:
            raise UsageError(f"a semaphore has 1 to {SLOTS_MAX} slots, not {slots!r}")
        self.name = os.fsdecode(path)
        self.slots = slots
        self.timeout = base.seconds(timeout)
        self._mount = mount
        self._last = random.randint(1, slots)
        """The slot that is tried first: one that this object had may be cached here still."""

    def _path(self, what: int | str) -> str:
        return f"{self.name}.{what}"

    def _order(self) -> list[int]:
        """The slots, in the order in which they are tried."""
        return [(self._last - 1 + step) % self.slots + 1 for step in range(self.slots)]

    def _limit(self, blocking: bool, timeout: float | None) -> float | None:
        return base.limit(blocking, timeout, self.timeout)

    def _not_had(self, limit: float, *, raises: bool) -> bool:
        """What it means that no slot was had within `limit` seconds."""
        if raises:
            raise TimedOut(
                f"no slot of {self.slots} of {self.name} could be had within {limit:g} s"
            )
        return False

    def _has(self, number: int, lock: L) -> None:
        self.lock, self.slot, self._last = lock, number, number

    def _kept(self) -> L:
        if self.lock is None:
            raise UsageError(f"no slot of {self.name} was acquired")
        return self.lock

    @property
    def held(self) -> bool:
        """Whether this object has a slot, and has not lost it."""
        return self.lock is not None and self.lock.held

    @property
    def token(self) -> int:
        """The fencing token: larger than all earlier ones of this slot. Raises UsageError."""
        return self._kept().token

    def check(self) -> None:
        """Raises LockLost if the slot was lost, UsageError if none was acquired."""
        self._kept().check()

    def release(self) -> None:
        """Give the slot back. Raises UsageError if none was acquired; nothing if it was lost."""
        lock = self._kept()
        self.lock, self.slot = None, 0
        lock.release()


class Left:
    """What is left of a time-out, in seconds; None: it has no end."""

    def __init__(self, limit: float | None) -> None:
        self._until = None if limit is None else time.monotonic() + limit

    def __call__(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())
