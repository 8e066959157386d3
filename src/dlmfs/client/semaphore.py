"""Semaphores for programs with threads: see `slots` for how they are made of locks."""

from __future__ import annotations

import contextlib
import queue
import threading
from types import TracebackType
from typing import Self

from dlmfs.client.base import ENDS_WITHIN_S
from dlmfs.client.slots import BaseSlots, Left
from dlmfs.client.sync import Lock
from dlmfs.errors import TimedOut, UsageError

AGAIN_S = 0.01


class Semaphore(BaseSlots[Lock]):
    """`with Semaphore("jobs/import", 3) as slot:` has one of three slots, each of which is a lock.

    `lock` is that lock while it is held: its `token`, `lost`, `wait_lost` and value are the slot's.
    """

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Have a slot, in the order of arrival. Arguments, return and errors as of `Lock.acquire`."""
        if self.held:
            raise UsageError(f"a slot of {self.name} is held by this object: make one for each")
        limit = self._limit(blocking, timeout)
        left = Left(limit)
        try:
            turn = Lock(self._path("turn"), mount=self._mount)
            if turn.acquire(blocking=limit != 0, timeout=left() if limit else None):
                try:
                    if self._try() or (limit != 0 and self._wait(left)):
                        return True
                finally:
                    turn.release()
        except TimedOut:
            pass
        return self._not_had(limit or 0, raises=blocking)

    def try_acquire(self) -> bool:
        """Have a slot at once, or not; nobody who waits is overtaken."""
        return self.acquire(blocking=False)

    def _try(self) -> bool:
        for number in self._order():
            lock = Lock(self._path(number), mount=self._mount)
            if lock.try_acquire():
                self._has(number, lock)
                return True
        return False

    def _wait(self, left: Left) -> bool:
        waits = _Waits({n: Lock(self._path(n), mount=self._mount) for n in self._order()})
        try:
            first = waits.first(left())
            if first is not None:
                self._has(first, waits.locks[first])
        finally:
            waits.end(self.lock)
        return first is not None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the slot back. Raises LockLost if it was lost, unless something else is raised."""
        lock, self.lock, self.slot = self.lock, None, 0
        if lock is not None:
            lock.__exit__(kind, error, trace)


class _Waits:
    """Waits for several locks at once, to have one of them."""

    def __init__(self, locks: dict[int, Lock]) -> None:
        self.locks = locks
        self._mutex = threading.RLock()
        self._is_over = False
        self._told: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._wait, args=item, name="dlmfs:slot", daemon=True)
            for item in locks.items()
        ]

    def _wait(self, number: int, lock: Lock) -> None:
        told: int | BaseException = number
        try:
            lock.acquire(timeout=-1)
        except BaseException as error:
            told = error
        with self._mutex:
            if self._is_over and lock.held:
                lock.release()
            self._told.put(told)

    def first(self, timeout: float | None) -> int | None:
        """The first that is had; None after `timeout` seconds. Raises what any wait comes to."""
        for thread in self._threads:
            thread.start()
        with contextlib.suppress(queue.Empty):
            told = self._told.get(timeout=timeout)
            if isinstance(told, BaseException):
                raise told
            return told
        return None

    def end(self, but: Lock | None) -> None:
        """No more: all the others are given up, or given back."""
        with self._mutex:
            self._is_over = True
        left = Left(ENDS_WITHIN_S)
        for lock, thread in zip(self.locks.values(), self._threads, strict=True):
            # Repeated: it may not have begun to wait when it was first told.
            while thread.is_alive() and lock is not but and left():
                lock.cancel()
                thread.join(AGAIN_S)
        with self._mutex:
            for lock in self.locks.values():
                if lock is not but and lock.held:
                    lock.release()
