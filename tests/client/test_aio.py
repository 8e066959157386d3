"""Locks for asyncio, on real mounts, under both holder rules."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from dlmfs.client import Cancelled, LockLost, NotGranted, TimedOut, UsageError
from dlmfs.client.aio import Domain, Lock
from tests.client.conftest import Twice
from tests.fs.nodes import PATIENCE_S, Nodes
from tests.robust.helpers import kill
from tests.waiting.agents import waiting, wanting

pytestmark = pytest.mark.fuse


def run(main: Coroutine[Any, Any, object]) -> None:
    """In debug mode a loop that is blocked for a tenth of a second says so, and the test fails."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await main

    asyncio.run(bounded(), debug=True)


async def until(true: Any, *args: object) -> None:
    while not await asyncio.to_thread(true, *args):  # noqa: ASYNC110 - a daemon is asked
        await asyncio.sleep(0.002)


async def is_free(path: Path) -> bool:
    lock = Lock(path)
    if not await lock.try_acquire():
        return False
    lock.release()
    return True


def test_a_lock_and_its_value(lock: Twice) -> None:
    async def main() -> None:
        async with Lock(lock.a) as mine:
            assert mine.held
            await mine.set_value(b"hello")
            assert await mine.get_value() == b"hello"
            assert await mine.abandoned() is None
            assert not await is_free(lock.b)
            with pytest.raises(UsageError, match="64 bytes"):
                await mine.set_value(bytes(65))
        assert not mine.held
        async with Lock(lock.b, shared=True) as theirs, Lock(lock.a, shared=True) as too:
            assert await theirs.get_value() == await too.get_value() == b"hello"
            with pytest.raises(UsageError, match="held shared"):
                await theirs.set_value(b"x")
        with pytest.raises(UsageError, match="not acquired"):
            await mine.get_value()

    run(main())


def test_tasks_exclude_each_other_and_the_loop_goes_on(lock: Twice) -> None:
    inside = most = turns = 0

    async def work() -> None:
        nonlocal inside, most
        for _ in range(4):
            async with Lock(lock.a):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        async with Lock(lock.a):
            working = [asyncio.create_task(work()) for _ in range(4)]
            with pytest.raises(TimedOut):
                await Lock(lock.b, timeout=0.1).acquire()
            assert turns > 1, "the loop stood still while an open waited"
        await asyncio.gather(*working)
        ticking.cancel()

    run(main())
    assert most == 1


def test_a_wait_that_is_over_leaves_nothing_behind(lock: Twice) -> None:
    async def main() -> None:
        async with Lock(lock.a):
            for path in lock:
                with pytest.raises(TimedOut):
                    await Lock(path).acquire(timeout=0.05)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await Lock(path).acquire()
                assert not await asyncio.to_thread(waiting, path)
        assert await is_free(lock.b)

    run(main())


def test_cancelling_ends_the_wait(lock: Twice) -> None:
    async def main() -> None:
        waiter = Lock(lock.b)
        async with Lock(lock.a):
            for end, what in ((asyncio.Task.cancel, asyncio.CancelledError), (None, Cancelled)):
                task = asyncio.create_task(waiter.acquire())
                await until(waiting, lock.b)
                if end is not None:
                    end(task)
                else:
                    waiter.cancel()
                with pytest.raises(what):
                    await task
                assert not waiter.held
                assert not await asyncio.to_thread(waiting, lock.b)
        await waiter.acquire()
        waiter.release()

    run(main())


def test_a_grant_in_the_instant_of_cancelling_does_not_leak(lock: Twice) -> None:
    draw = random.Random(6)
    outcomes = set()

    async def main() -> None:
        for _ in range(60):
            holder, waiter = Lock(lock.a), Lock(lock.b)
            await holder.acquire()
            task = asyncio.create_task(waiter.acquire())
            await until(waiting, lock.b)
            holder.release()
            await asyncio.sleep(draw.random() * 0.01)  # as long as a grant takes, about
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            outcomes.add(task.cancelled())
            assert waiter.held == (not task.cancelled())
            if waiter.held:
                waiter.release()

    run(main())
    assert outcomes == {True, False}


def test_a_grant_that_meets_a_cancelled_task_before_it_runs(lock: Twice) -> None:
    """Granted, told to the loop, and the task is cancelled before its next step."""

    async def main() -> None:
        waiter = Lock(lock.a)
        task = asyncio.create_task(waiter.acquire())
        await asyncio.sleep(0)
        keeper = waiter._keeper
        assert keeper is not None
        assert keeper.settled.wait(PATIENCE_S)  # the loop stands still meanwhile
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not waiter.held
        assert await is_free(lock.b)

    run(main())


def test_the_end_of_the_loop_with_a_wait_under_way(lock: Twice) -> None:
    """Neither a hang nor a leak: the thread hears that nobody waits any more."""
    waiter = Lock(lock.b)

    async def main() -> None:
        async with Lock(lock.a):
            background = asyncio.create_task(waiter.acquire())
            await until(waiting, lock.b)
            assert not background.done()

    run(main())
    assert not waiter.held


def test_a_lock_that_is_lost_as_soon_as_granted_cancels_nothing_after_the_block(
    lock: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Lock.acquire

    async def acquire(self: Lock) -> None:
        await real(self)
        assert self._keeper is not None
        self._keeper.is_lost = True

    async def main() -> None:
        with pytest.raises(LockLost):
            async with Lock(lock.a):
                raise AssertionError("the block must not begin")
        await asyncio.sleep(0)  # where a task learns that it was cancelled

    monkeypatch.setattr(Lock, "acquire", acquire)
    asyncio.run(main())


def test_what_was_about_an_earlier_holding_is_not_told_of_the_next(lock: Twice) -> None:
    async def main() -> None:
        mine = Lock(lock.a)
        await mine.acquire()
        assert mine._keeper is not None
        event = mine._keeper.on_event
        mine.release()
        event(True)  # by the watcher, just before the release
        async with mine:
            await asyncio.sleep(0)
            assert not mine.lost.is_set()
            assert not mine.wanted.is_set()

    asyncio.run(main())


def test_notices_by_callback_and_by_waiting(lock: Twice) -> None:
    async def main() -> None:
        heard = asyncio.Semaphore(0)
        other = Lock(lock.b)
        async with Lock(lock.a, on_notice=heard.release) as mine:
            assert not await mine.wait_wanted(0.01)
            for _ in range(2):
                task = asyncio.create_task(other.acquire())
                await heard.acquire()
                assert await mine.wait_wanted(PATIENCE_S)
                mine.wanted.clear()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: not wanting(lock.a))

    run(main())


def test_giving_way(lock: Twice) -> None:
    """The pattern of a long holder: work until somebody else wants it."""
    order: list[str] = []

    async def hold(path: Path, name: str) -> None:
        async with Lock(path) as mine:
            order.append(name)
            await mine.wait_wanted(0.5)

    async def main() -> None:
        await asyncio.gather(*(hold(lock[n % 2], f"{n}") for n in range(4)))

    run(main())
    assert sorted(order) == ["0", "1", "2", "3"]


def test_a_loss_ends_the_block(nodes: Nodes) -> None:
    async def main() -> None:
        a = nodes.mount("a")
        reached: list[str] = []
        with pytest.raises(LockLost, match="was lost"):
            async with Lock(a / "dom/x") as mine:
                other = Lock(a / "dom/y")
                await other.acquire()
                nodes.state.unlink()
                try:
                    async with asyncio.timeout(PATIENCE_S / 2):  # or a TimeoutError comes out
                        await asyncio.sleep(PATIENCE_S)
                finally:
                    reached.append("cleaned up")
        assert reached == ["cleaned up"]
        assert mine.lost.is_set()
        assert await other.wait_lost(PATIENCE_S)
        with pytest.raises(LockLost):
            await other.get_value()
        with pytest.raises(LockLost):
            await other.wait_wanted()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(main())


def test_a_loss_and_a_cancellation_from_outside(nodes: Nodes) -> None:
    """Who cancels the task from outside sees it cancelled."""

    async def block(path: Path, begun: asyncio.Event, lost: asyncio.Event) -> None:
        async with Lock(path):
            begun.set()
            try:
                await asyncio.sleep(PATIENCE_S)
            except asyncio.CancelledError:
                lost.set()
                await asyncio.sleep(PATIENCE_S)

    async def main() -> None:
        a = nodes.mount("a")
        begun, lost = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(block(a / "dom/x", begun, lost))
        await begun.wait()
        await asyncio.to_thread(kill, a)
        await lost.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_a_domain(lock: Twice) -> None:
    async def main() -> None:
        async with Domain("library") as jobs:
            async with jobs.lock("x", timeout=1) as mine:
                assert mine.held
                assert await jobs.names() == ["x"]
                with pytest.raises(NotGranted):
                    await jobs.forget("x")
            held = jobs.lock("y", shared=True)
            await held.acquire()
        assert not held.held
        await jobs.leave(forget=True)
        assert not (lock.a.parent.parent / "library").exists()

    run(main())
