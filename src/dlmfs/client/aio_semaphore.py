"""Semaphores for asyncio: the same names as `dlmfs.client.semaphore`."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from dlmfs.client.aio import Lock, begin_block
from dlmfs.client.slots import BaseSlots, Left
from dlmfs.errors import TimedOut, UsageError


class Semaphore(BaseSlots[Lock]):
    """`async with Semaphore("jobs/import", 3) as slot:` has one of three slots, each of which is a lock.

    `lock` is that lock while it is held: its `token`, `lost`, `wait_lost` and value are the slot's. If
    it is lost the block is cancelled and raises LockLost.
    """

    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Have a slot, in the order of arrival. Arguments, return and errors as of `Lock.acquire`."""
        if self.held:
            raise UsageError(f"a slot of {self.name} is held by this object: make one for each")
        limit = self._limit(blocking, timeout)
        left = Left(limit)
        try:
            turn = Lock(self._path("turn"), mount=self._mount)
            if await turn.acquire(blocking=limit != 0, timeout=left() if limit else None):
                try:
                    if await self._try() or (limit != 0 and await self._wait(left)):
                        return True
                finally:
                    turn.release()
        except TimedOut:
            pass
        return self._not_had(limit or 0, raises=blocking)

    async def try_acquire(self) -> bool:
        """Have a slot at once, or not; nobody who waits is overtaken."""
        return await self.acquire(blocking=False)

    async def _try(self) -> bool:
        for number in self._order():
            lock = Lock(self._path(number), mount=self._mount)
            if await lock.try_acquire():
                self._has(number, lock)
                return True
        return False

    async def _wait(self, left: Left) -> bool:
        locks = {n: Lock(self._path(n), mount=self._mount) for n in self._order()}
        tasks = {asyncio.ensure_future(lock.acquire(timeout=-1)): n for n, lock in locks.items()}
        try:
            done, _ = await asyncio.wait(tasks, timeout=left(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            number = min((tasks[task] for task in done), default=0)
            if number:
                self._has(number, locks[number])
        finally:
            for task in tasks:
                task.cancel()
            for lock in locks.values():
                if lock is not self.lock and lock.held:
                    lock.release()
            await asyncio.gather(*tasks, return_exceptions=True)
        return number > 0

    async def __aenter__(self) -> Self:
        await self.acquire()
        lock = self._kept()
        try:
            begin_block(lock)
        except BaseException:
            self.lock, self.slot = None, 0
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the slot back. Raises LockLost if it was lost, unless something else is raised."""
        lock, self.lock, self.slot = self.lock, None, 0
        if lock is not None:
            await lock.__aexit__(kind, error, trace)
