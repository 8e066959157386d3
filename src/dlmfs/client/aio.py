"""Locks and domains for asyncio: the same names as `dlmfs.client`, and nothing blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from dlmfs.client import logic
from dlmfs.client.base import ENDS_WITHIN_S, BaseLock, settled
from dlmfs.client.domain import BaseDomain
from dlmfs.client.keeper import Keeper
from dlmfs.errors import LockLost, NotGranted, UsageError

if TYPE_CHECKING:
    from dlmfs.client.aio_election import Election as Election
    from dlmfs.client.aio_semaphore import Semaphore as Semaphore

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Lock(BaseLock):
    """`async with Lock("jobs/backup"):` has the lock, alone in the cluster.

    If the lock is lost the block is cancelled and raises LockLost. A lock that was got by `acquire`
    says so by the event `lost`; `wanted` is the event that somebody else waits for it.
    """

    def _prepare(self) -> None:
        self.lost = asyncio.Event()
        self.wanted = asyncio.Event()
        self._block: _Block | None = None
        self._event: _Event | None = None

    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Wait for the lock, `timeout` seconds at most (None: as long as the object says; -1: without
        end; 0: take it if it is free). Returns True: it is held; with `blocking=False`, which does not
        wait, False if it is not free.

        Raises TimedOut, which is a TimeoutError; Cancelled (see `cancel`), Deadlock; UsageError,
        NotPermitted, Unavailable where it cannot be had. A node that was fenced is waited for like a
        holder: Unavailable then comes when the time is over, or at once without waiting.
        If the task is cancelled the wait ends, and nothing is held, even if the grant came in the same
        instant.
        """
        limit = self._limit(blocking, timeout)
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        event = _Event(loop, self.lost, self.wanted, self.on_notice)
        keeper = self._new(limit == 0, _Teller(loop, over), event)
        try:
            await self._take(keeper, event, over, limit or None)
        except NotGranted as error:
            if limit != 0 or type(error) is not NotGranted:
                raise
            return self._not_had(keeper, error, raises=blocking)
        return True

    async def try_acquire(self) -> bool:
        """Have it at once, or not: whether it is held now. Another node's user is never waited for;
        a lock that is merely cached there is handed over. Raises as `acquire`."""
        return await self.acquire(blocking=False)

    async def _take(
        self, keeper: Keeper, event: _Event, over: asyncio.Future[None], limit: float | None
    ) -> None:
        self._begin(keeper)
        if self._event is not None:
            self._event.is_past = True
        self._event = event
        self.lost.clear()
        self.wanted.clear()
        try:
            keeper.start()
            await self._wait(keeper, over, limit)
        except BaseException:
            self._end(keeper)
            await asyncio.wait([over], timeout=ENDS_WITHIN_S)
            raise

    async def _wait(self, keeper: Keeper, over: asyncio.Future[None], limit: float | None) -> None:
        await asyncio.wait([over], timeout=limit)
        if not over.done() and keeper.give_up():
            raise self._late(keeper, limit or 0.0)
        await asyncio.wait([over])  # it comes at once now
        settled(keeper)
        self._is_held = True

    async def locked(self) -> bool:
        """Whether anybody in the cluster has the lock, or is before us for it: this object, or somebody
        who a try meets. The answer may be out of date when it is here."""
        if self.held:
            return True
        other = self.another(shared=False)
        if not await other.try_acquire():
            return True
        other.release()
        return False

    async def holders(self) -> list[logic.Holder]:
        """The programs of this node that have it. What other nodes' have, `dlmfs info` tells."""
        return await asyncio.to_thread(self._holders)

    async def exclusive(self, timeout: float | None = None) -> None:
        """Go on alone. The lock is dropped and taken anew, in its turn: others may have it in between,
        so what was read under it is to be read again, and there is no deadlock of two who both hold it
        shared. Raises as `acquire`, and then nothing is held; LockLost if it was lost before.
        """
        await self._go_on(False, timeout)

    async def shared(self, timeout: float | None = None) -> None:
        """Go on together with others who hold it shared; else as `exclusive`."""
        await self._go_on(True, timeout)

    async def _go_on(self, shared: bool, timeout: float | None) -> None:
        self.check()
        if shared == self.is_shared:
            return
        self.release()
        self.is_shared = shared
        await self.acquire(timeout=timeout)
        if self._block is not None:
            keeper = self._kept()
            _watch_over(keeper, self._block)
            if keeper.is_lost:
                self._block.lost()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator of a coroutine function: each call has the lock, by an object of its own."""
        import functools
        import inspect

        if not inspect.iscoroutinefunction(function):
            raise UsageError("this Lock is for coroutine functions: dlmfs.Lock is for the others")

        @functools.wraps(function)
        async def locked(*args: P.args, **kwargs: P.kwargs) -> Any:
            async with self.another():
                return await function(*args, **kwargs)

        return locked  # type: ignore[return-value]

    async def wait_wanted(self, timeout: float | None = None) -> bool:
        """Wait until somebody else waits for this lock; False after `timeout` seconds. Raises
        LockLost when the lock is lost. Clear `wanted` to wait for the next one."""
        self.check()
        heard = await _within(self.wanted, timeout)
        self.check()
        return heard

    async def wait_lost(self, timeout: float | None = None) -> bool:
        """Wait until the lock is lost; False after `timeout` seconds."""
        self._kept()
        return await _within(self.lost, timeout)

    async def get_value(self) -> bytes:
        """The value that travels with the lock, without the zeros that pad it to 64 bytes. Raises
        LockLost."""
        return await _by(self._kept(), Keeper.read)

    async def set_value(self, value: bytes) -> None:
        """Replace the whole value; returns when it is durable. Raises LockLost, UsageError if the
        lock is held shared or the value has more than 64 bytes, StoreFull. If the task is cancelled
        the write may still happen."""
        data = logic.padded(value)
        await _by(self._kept(), lambda keeper: keeper.write(data))

    async def abandoned(self) -> logic.Abandoned | None:
        """The node that died while it had this lock exclusively, until somebody sets the value."""
        return await _by(self._kept(), Keeper.abandoned)

    async def __aenter__(self) -> Self:
        await self.acquire()
        begin_block(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the lock. Raises LockLost if it was lost meanwhile, unless something else is raised."""
        keeper = self._keeper
        if keeper is not None:
            self._end(keeper)
        block, self._block = self._block, None
        ours = block is not None and block.was_cancelled(kind)
        if keeper is not None and (kind is None or ours):
            try:
                self._lost_by(keeper)
            except LockLost as lost:
                raise lost from error


def begin_block(lock: Lock) -> None:
    """From now on, until `__aexit__`, a loss cancels this task. Raises LockLost if it is lost."""
    keeper, task = lock._kept(), asyncio.current_task()  # noqa: SLF001 - its own module
    assert task is not None
    if keeper.is_lost:
        # Not by `_Block.lost`: a task that cancels itself is only told at its next await, and that may
        # come after the block.
        lock.release()
        lock._lost_by(keeper)  # noqa: SLF001
    lock._block = _Block(task)  # noqa: SLF001
    _watch_over(keeper, lock._block)  # noqa: SLF001


def _watch_over(keeper: Keeper, block: _Block) -> None:
    """From now on its loss cancels the block."""
    event = keeper.on_event
    assert isinstance(event, _Event)
    event.block = block


class _Block:
    """A task inside `async with`, to be cancelled when the lock is lost: as asyncio.timeout does."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task: asyncio.Task[Any] | None = task
        self._before = task.cancelling()
        self._cancelled = False

    def lost(self) -> None:
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def was_cancelled(self, kind: type[BaseException] | None) -> bool:
        """At the end of the block: whether what it raises is our cancellation, and nobody else's."""
        task, self._task = self._task, None
        if not self._cancelled or task is None:
            return False
        others = task.uncancel() > self._before
        return not others and kind is not None and issubclass(kind, asyncio.CancelledError)


class _Teller:
    """Called in the keeper's thread when the wait is over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, over: asyncio.Future[None]) -> None:
        self.loop, self.over = loop, over

    def __call__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: `__del__` releases
            self.loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


class _Event:
    """What a notice sets off, in the loop. Called in the watcher's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lost: asyncio.Event,
        wanted: asyncio.Event,
        on_notice: Callable[[], object] | None,
    ) -> None:
        self.loop, self.lost, self.wanted, self.on_notice = loop, lost, wanted, on_notice
        self.block: _Block | None = None
        self.is_past = False
        """The lock was acquired anew: what is still on its way is not about that."""

    def __call__(self, lost: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._happened, lost)

    def _happened(self, lost: bool) -> None:
        if self.is_past:
            return
        if lost:
            self.lost.set()
        self.wanted.set()  # of a lost lock too: whoever waits for it must not wait for ever
        if lost and self.block is not None:
            self.block.lost()
        if self.on_notice is not None and not lost:
            self.on_notice()


async def _within(event: asyncio.Event, timeout: float | None) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()
    return event.is_set()


async def _by(keeper: Keeper, what: Callable[[Keeper], T]) -> T:
    """Have the keeper's thread do what may wait for the node."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def job() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = what(keeper)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, failure)

    keeper.submit(job)
    return await done


_HOMES = {"Election": "aio_election", "Semaphore": "aio_semaphore"}


def __getattr__(name: str) -> object:
    """What is made of locks has modules of its own."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"dlmfs.client.{_HOMES[name]}"), name)
    return value


class Domain(BaseDomain):
    """`async with Domain("jobs") as jobs:` joins the domain on this node; its locks are
    `jobs.lock(name)`.

    The end of the block releases what was acquired through it. The node stays in the domain, whose
    values others may want to find here; `leave` leaves it.
    """

    async def __aenter__(self) -> Self:
        await self.join()
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._release_all()

    async def join(self) -> None:
        """Join it, if this node has not. Raises Unavailable, NotPermitted, UsageError."""
        await asyncio.to_thread(self._join)

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

    async def names(self) -> list[str]:
        """The locks whose files this node has."""
        return await asyncio.to_thread(self._names)

    async def forget(self, name: str | bytes) -> None:
        """Remove a lock's file on this node. With the last node's the value is gone. Raises
        NotGranted while it is open here."""
        await asyncio.to_thread(self._forget, name)

    async def leave(self, *, forget: bool = False) -> None:
        """Leave the domain on this node. Raises NotGranted while there are lock files; `forget`
        removes those first that nobody here has open."""
        await asyncio.to_thread(self._leave, forget)
