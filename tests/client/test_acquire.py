"""What `acquire` takes, returns and raises: for threads and for asyncio alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlmfs.client import Lock, NotGranted, TimedOut, UsageError, aio
from tests.client.conftest import Twice
from tests.fs.nodes import PATIENCE_S

pytestmark = pytest.mark.fuse


class Kind:
    """One of the two libraries, called in the same way."""

    def __init__(self, run: Callable[[Any], Any], lock: type[Any]) -> None:
        self.run, self.lock = run, lock

    def acquire(self, lock: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(lock.acquire(*args, **kwargs))


@pytest.fixture(params=["threads", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    if request.param == "threads":
        yield Kind(lambda result: result, Lock)
        return
    loop = asyncio.new_event_loop()
    yield Kind(loop.run_until_complete, aio.Lock)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def test_it_returns_true_and_the_lock_is_held(kind: Kind, lock: Twice) -> None:
    for arguments in ({}, {"timeout": 0}, {"timeout": -1}, {"timeout": None}, {"blocking": False}):
        for _ in range(5):
            mine = kind.lock(lock.a)
            assert kind.acquire(mine, **arguments) is True
            assert mine.held
            mine.release()
    for timeout in (0, -1, None, 5):
        mine = kind.lock(lock.b, timeout=timeout)
        assert kind.acquire(mine) is True
        mine.release()
    mine = kind.lock(lock.a)
    assert kind.acquire(mine, True, 5) is True, "as threading has them, without names"
    mine.release()


def test_a_busy_lock(kind: Kind, lock: Twice) -> None:
    with Lock(lock.a):
        for path in lock:
            mine = kind.lock(path)
            assert kind.acquire(mine, blocking=False) is False
            assert kind.acquire(mine, False) is False
            assert kind.run(mine.try_acquire()) is False
            for timeout in (0, 0.05):
                with pytest.raises(TimeoutError) as raised:
                    kind.acquire(mine, timeout=timeout)
                assert type(raised.value) is TimedOut
                assert isinstance(raised.value, NotGranted)
                assert str(path) in str(raised.value)
                with pytest.raises(TimedOut):
                    kind.acquire(kind.lock(path, timeout=timeout))
            assert not mine.held


def test_minus_one_waits_though_the_object_would_not(kind: Kind, lock: Twice) -> None:
    holder = Lock(lock.b)
    holder.acquire()
    threading.Timer(0.1, holder.release).start()
    mine = kind.lock(lock.a, timeout=0)
    assert kind.acquire(mine, timeout=-1) is True
    mine.release()


@pytest.mark.parametrize("timeout", [-0.5, float("nan")])
def test_a_timeout_that_is_none(kind: Kind, lock: Twice, timeout: float) -> None:
    with pytest.raises(UsageError, match="a timeout is seconds"):
        kind.lock(lock.a, timeout=timeout)
    with pytest.raises(UsageError, match="a timeout is seconds"):
        kind.acquire(kind.lock(lock.a), timeout=timeout)


def test_a_number_in_the_place_of_blocking_is_no_yes(kind: Kind, lock: Twice) -> None:
    """`acquire(5)` once meant five seconds, elsewhere means for ever: neither is guessed."""
    with pytest.raises(UsageError, match=r"acquire\(timeout=5\)"):
        kind.acquire(kind.lock(lock.a), 5)
    with pytest.raises(UsageError, match="no timeout"):
        kind.acquire(kind.lock(lock.a), blocking=False, timeout=PATIENCE_S)
    mine = kind.lock(lock.a)
    assert kind.acquire(mine, blocking=False, timeout=-1) is True
    mine.release()
