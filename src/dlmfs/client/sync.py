"""Locks and domains for programs with threads. `dlmfs.client.aio` has the same for asyncio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Self, TypeVar, cast

from dlmfs.client import logic
from dlmfs.client.base import ENDS_WITHIN_S, BaseLock, settled
from dlmfs.client.domain import BaseDomain
from dlmfs.client.keeper import Keeper
from dlmfs.errors import NotGranted

P = ParamSpec("P")
R = TypeVar("R")


class Lock(BaseLock):
    """`with Lock("jobs/backup"):` has the lock, alone in the cluster.

    `lost` and `wanted` are events: the lock is gone for good; somebody else waits for it.
    Under holder=node, too, Lock objects exclude each other, and `dlmfs lock`, on one node: they lock
    the lock's file with flock(2). Programs that only open it do not.
    """

    def _prepare(self) -> None:
        self.lost = threading.Event()
        self.wanted = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Wait for the lock, `timeout` seconds at most (None: as long as the object says; -1: without
        end; 0: take it if it is free). Returns True: it is held; with `blocking=False`, which does not
        wait, False if it is not free.

        Raises TimedOut, which is a TimeoutError; Cancelled (see `cancel`), Deadlock; UsageError,
        NotPermitted, Unavailable where it cannot be had. A node that was fenced is waited for like a
        holder: Unavailable then comes when the time is over, or at once without waiting.
        Whatever is raised, by a signal's handler too: nothing is held.
        """
        limit = self._limit(blocking, timeout)
        keeper = self._made(trying=limit == 0)
        try:
            return self._has(keeper, limit, blocking)
        except BaseException:
            self._end(keeper)
            raise

    def try_acquire(self) -> bool:
        """Have it at once, or not: whether it is held now. Another node's user is never waited for;
        a lock that is merely cached there is handed over. Raises as `acquire`."""
        return self.acquire(blocking=False)

    def _made(self, trying: bool) -> Keeper:
        # The keeper must not keep this object alive: what nobody can reach is to be released.
        return self._new(trying, _nothing, _Event(self.lost, self.wanted, self.on_notice))

    def _has(self, keeper: Keeper, limit: float | None, blocking: bool) -> bool:
        """As `_take`, and what `acquire` returns."""
        try:
            self._take(keeper, limit or None)
        except NotGranted as error:
            if limit != 0 or type(error) is not NotGranted:
                raise
            return self._not_had(keeper, error, raises=blocking)
        return True

    def _take(self, keeper: Keeper, limit: float | None) -> None:
        """Whatever it raises, `_end` is still to be called: a signal's handler may raise after it."""
        self._begin(keeper)
        for event in (self.lost, self.wanted):
            if event.is_set():  # a handler that raises in `clear` may leave an event locked
                event.clear()
        try:
            keeper.start()
            self._wait(keeper, limit)
        except BaseException:
            self._end(keeper)
            keeper.wait(ENDS_WITHIN_S)
            raise

    def _wait(self, keeper: Keeper, limit: float | None) -> None:
        if not keeper.wait(limit) and keeper.give_up():
            raise self._late(keeper, limit or 0.0)
        keeper.wait()  # it comes at once now
        settled(keeper)
        self._is_held = True

    def locked(self) -> bool:
        """Whether anybody in the cluster has the lock, or is before us for it: this object, or somebody
        who a try meets. The answer may be out of date when it is here."""
        if self.held:
            return True
        other = self.another(shared=False)
        if not other.try_acquire():
            return True
        other.release()
        return False

    def holders(self) -> list[logic.Holder]:
        """The programs of this node that have it. What other nodes' have, `dlmfs info` tells."""
        return self._holders()

    def exclusive(self, timeout: float | None = None) -> None:
        """Go on alone. The lock is dropped and taken anew, in its turn: others may have it in between,
        so what was read under it is to be read again, and there is no deadlock of two who both hold it
        shared. Raises as `acquire`, and then nothing is held; LockLost if it was lost before.
        """
        self._go_on(False, timeout)

    def shared(self, timeout: float | None = None) -> None:
        """Go on together with others who hold it shared; else as `exclusive`."""
        self._go_on(True, timeout)

    def _go_on(self, shared: bool, timeout: float | None) -> None:
        self.check()
        if shared != self.is_shared:
            self.release()
            self.is_shared = shared
            self.acquire(timeout=timeout)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: each call has the lock, by an object of its own. Coroutine functions wait
        without blocking their loop."""
        import functools
        import inspect

        if inspect.iscoroutinefunction(function):
            from dlmfs.client import aio

            path, mount = self._given
            other = aio.Lock(
                path,
                shared=self.is_shared,
                timeout=self.timeout,
                create=self.create,
                mount=mount,
                on_notice=self.on_notice,
            )
            return cast("Callable[P, R]", other(function))

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.another():
                return function(*args, **kwargs)

        return locked

    def wait_wanted(self, timeout: float | None = None) -> bool:
        """Wait until somebody else waits for this lock; False after `timeout` seconds. Raises
        LockLost when the lock is lost. Clear `wanted` to wait for the next one."""
        self.check()
        heard = self.wanted.wait(timeout)
        self.check()
        return heard

    def wait_lost(self, timeout: float | None = None) -> bool:
        """Wait until the lock is lost; False after `timeout` seconds."""
        self._kept()
        return self.lost.wait(timeout)

    def get_value(self) -> bytes:
        """The value that travels with the lock, without the zeros that pad it to 64 bytes. Raises
        LockLost."""
        return self._kept().read()

    def set_value(self, value: bytes) -> None:
        """Replace the whole value; returns when it is durable. Raises LockLost, UsageError if the
        lock is held shared or the value has more than 64 bytes, StoreFull."""
        self._kept().write(value)

    def abandoned(self) -> logic.Abandoned | None:
        """The node that died while it had this lock exclusively, until somebody sets the value."""
        return self._kept().abandoned()

    def __enter__(self) -> Self:
        limit = self._limit(True, None)
        keeper = self._made(trying=limit == 0)
        try:
            self._has(keeper, limit, True)
            return self
        except BaseException:
            self._end(keeper)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the lock. Raises LockLost if it was lost meanwhile, unless something else is raised."""
        keeper = self._keeper
        if keeper is not None:
            self._end(keeper)
            if kind is None:
                self._lost_by(keeper)


class _Event:
    """What a notice sets off."""

    def __init__(
        self,
        lost: threading.Event,
        wanted: threading.Event,
        on_notice: Callable[[], object] | None,
    ) -> None:
        self.lost, self.wanted, self.on_notice = lost, wanted, on_notice

    def __call__(self, lost: bool) -> Callable[[], object] | None:
        if lost:
            self.lost.set()
        self.wanted.set()  # of a lost lock too: whoever waits for it must not wait for ever
        return None if lost else self.on_notice


def _nothing() -> None:
    """Who waits in a thread of its own need not be told."""


class Domain(BaseDomain):
    """`with Domain("jobs") as jobs:` joins the domain on this node; its locks are `jobs.lock(name)`.

    The end of the block releases what was acquired through it. The node stays in the domain, whose
    values others may want to find here; `leave` leaves it.
    """

    def __enter__(self) -> Self:
        self.join()
        return self

    def __exit__(self, *_error: object) -> None:
        self._release_all()

    def join(self) -> None:
        """Join it, if this node has not. Raises Unavailable, NotPermitted, UsageError."""
        self._join()

    def lock(
        self,
        name: str | bytes,
        *,
        shared: bool = False,
        timeout: float | None = None,
        create: bool = True,
        on_notice: Callable[[], object] | None = None,
    ) -> Lock:
        """A lock of this domain, not yet acquired: see `Lock`."""
        path = self._path(name)
        lock = Lock(path, shared=shared, timeout=timeout, create=create, on_notice=on_notice)
        self._locks.add(lock)
        return lock

    def names(self) -> list[str]:
        """The locks whose files this node has."""
        return self._names()

    def forget(self, name: str | bytes) -> None:
        """Remove a lock's file on this node. With the last node's the value is gone. Raises
        NotGranted while it is open here."""
        self._forget(name)

    def leave(self, *, forget: bool = False) -> None:
        """Leave the domain on this node. Raises NotGranted while there are lock files; `forget`
        removes those first that nobody here has open."""
        self._leave(forget)
