"""Programs under `dlmfs.testing`: the same classes, the same errors, and no mount."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

import dlmfs
from dlmfs import testing
from dlmfs.client import aio
from tests.client.threads import awaited, begin, join
from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import until

pytestmark = pytest.mark.allow_warnings


@dlmfs.Lock("jobs/decorated", timeout=5)
def decorated() -> str:
    """Made before there is anything that it could be a lock of."""
    return "done"


@pytest.fixture
def locks() -> Iterator[testing.Locks]:
    with testing.locks() as made:
        yield made
    assert not awaited()


def test_a_program_runs_unchanged(locks: testing.Locks) -> None:
    with dlmfs.Lock("jobs/x") as mine:
        assert mine.held
        assert mine.locked()
        assert mine.token > 0
        mine.set_value(b"hello")
        assert mine.get_value() == b"hello"
        assert mine.abandoned() is None
        assert dlmfs.Lock("jobs/x").acquire(blocking=False) is False
        with pytest.raises(dlmfs.TimedOut):
            dlmfs.Lock("jobs/x").acquire(timeout=0.01)
        assert [holder.mode for holder in mine.holders()] == ["EX"]
        with pytest.raises(dlmfs.UsageError, match="64 bytes"):
            mine.set_value(bytes(65))
    with dlmfs.Lock("jobs/x", shared=True) as one, dlmfs.Lock("jobs/x", shared=True) as two:
        assert one.get_value() == two.get_value() == b"hello"
        two.release()
        one.exclusive()
        two.acquire(blocking=False)
    assert not mine.locked()
    assert decorated() == "done"
    for path in ("jobs", "a/b/c", "/tmp/x/y", "jobs/$x"):
        with pytest.raises(dlmfs.UsageError, match="is not a lock"):
            dlmfs.Lock(path)


def test_what_is_lost_is_lost_and_comes_back(locks: testing.Locks) -> None:
    heard = threading.Event()
    mine = dlmfs.Lock("jobs/x", on_notice=heard.set)
    with pytest.raises(dlmfs.LockLost), mine:
        token = mine.token
        locks.lose()
        assert mine.wait_lost(PATIENCE_S)
        with pytest.raises(dlmfs.LockLost):
            mine.check()
        with pytest.raises(dlmfs.LockLost):
            mine.get_value()
    assert not heard.is_set()
    with mine:  # waits through the fence
        assert mine.token > token


def test_a_silent_store(locks: testing.Locks) -> None:
    with pytest.raises(dlmfs.LockLost), dlmfs.Lock("jobs/x") as mine:
        locks.silence()
        assert mine.held, "the lease is good for a while"
        assert mine.wait_lost(PATIENCE_S)
        for timeout in (0, 0.1):
            with pytest.raises(dlmfs.Unavailable, match="node is"):
                dlmfs.Lock("jobs/y").acquire(timeout=timeout)
        waiter = dlmfs.Lock("jobs/z")
        thread = begin(lambda: waiter.acquire(timeout=PATIENCE_S))
        locks.heal()
        join(thread)
        waiter.release()


def test_another_nodes_lock(locks: testing.Locks) -> None:
    waiter = dlmfs.Lock("jobs/x")
    with locks.busy("jobs/x"):
        assert not waiter.try_acquire()
        thread = begin(lambda: waiter.acquire(timeout=PATIENCE_S))
        until(lambda: bool(awaited()), "it waits")
        assert not waiter.held
    join(thread)
    assert waiter.held
    told = begin(lambda: waiter.wait_wanted(PATIENCE_S))

    def other() -> None:
        with locks.busy("jobs/x", shared=True):
            pass

    taker = begin(other)
    join(told)
    assert waiter.wanted.is_set()
    waiter.release()
    join(taker)


def test_cancel_and_asyncio(locks: testing.Locks) -> None:
    async def main() -> None:
        mine = aio.Lock("jobs/x")
        with locks.busy("jobs/x"):
            task = asyncio.ensure_future(mine.acquire())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not mine.held
        async with mine:
            locks.lose()
            await asyncio.sleep(PATIENCE_S)

    with pytest.raises(dlmfs.LockLost):
        asyncio.run(main())


def test_semaphores_and_elections(locks: testing.Locks) -> None:
    with dlmfs.Semaphore("jobs/s", 2) as one, dlmfs.Semaphore("jobs/s", 2) as two:
        assert {one.slot, two.slot} == {1, 2}
        assert not dlmfs.Semaphore("jobs/s", 2).try_acquire()
    with dlmfs.Election("jobs/leader", "me"):
        assert dlmfs.Election("jobs/leader").leader() == "me"
    assert dlmfs.Election("jobs/leader").leader() is None


def test_one_at_a_time_and_nothing_is_left() -> None:
    with testing.locks(), pytest.raises(dlmfs.UsageError, match="one cluster"), testing.locks():
        pass
    with testing.locks() as locks:
        held = dlmfs.Lock("jobs/x")
        held.acquire()
        waiter = dlmfs.Lock("jobs/x")
        raised: list[Exception] = []

        def wait() -> None:
            try:
                waiter.acquire()
            except dlmfs.DlmfsError as error:
                raised.append(error)

        thread = begin(wait)
        until(lambda: bool(awaited()), "it waits")
    assert held.wait_lost(PATIENCE_S)
    held.release()
    join(thread)
    assert [type(error) for error in raised] == [dlmfs.Unavailable]
    assert not locks._thread.is_alive()
