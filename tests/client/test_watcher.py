"""The thread that hears of all locks, with pipes in place of locks."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlmfs.client import keeper, logic, watcher
from dlmfs.client.place import Place
from dlmfs.errors import LockLost
from tests.fs.nodes import PATIENCE_S


class Holder:
    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[int] = queue.SimpleQueue()

    def happened(self, events: int) -> None:
        self.heard.put(events)


@pytest.fixture
def ends() -> Iterator[tuple[int, int, int, int]]:
    """Both ends of two pipes."""
    made = (*os.pipe(), *os.pipe())
    yield made
    for end in made:
        os.close(end)


class Late:
    """An epoll whose poll is over, but whose caller goes on only when it is let."""

    def __init__(self) -> None:
        self._real = select.epoll()
        self.over = threading.Event()
        self.goes_on = threading.Event()
        self.modified = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def poll(self, maxevents: int) -> list[tuple[int, int]]:
        events = self._real.poll(maxevents=maxevents)
        self.over.set()
        assert self.goes_on.wait(PATIENCE_S)
        return events

    def modify(self, fd: int, events: int) -> None:
        self._real.modify(fd, events)
        self.modified.set()


def test_a_number_that_became_another_locks_is_not_told_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[int, int, int, int]
) -> None:
    late = Late()
    monkeypatch.setattr(select, "epoll", lambda: late)
    watch = watcher.Watcher()
    before, after = Holder(), Holder()
    reading, writing, other, to_other = ends
    watch.add(reading, before)
    os.write(writing, b"x")
    assert late.over.wait(PATIENCE_S)
    watch.remove(reading)
    os.dup2(other, reading)
    watch.add(reading, after)
    late.goes_on.set()
    assert late.modified.wait(PATIENCE_S)
    assert after.heard.empty()
    os.write(to_other, b"y")
    assert after.heard.get(timeout=PATIENCE_S) & select.EPOLLIN
    assert after.heard.empty()
    assert before.heard.empty()
    watch.remove(reading)


class Slow:
    """An epoll each of whose polls is told when it is let; with something to do before a removal."""

    def __init__(self) -> None:
        self._real = select.epoll()
        self.over, self.goes_on = threading.Semaphore(0), threading.Semaphore(0)
        self.modified = threading.Event()
        self.before_removal: Callable[[], object] = int

    def poll(self, maxevents: int) -> list[tuple[int, int]]:
        events = self._real.poll(maxevents=maxevents)
        self.over.release()
        assert self.goes_on.acquire(timeout=PATIENCE_S)
        return events

    def register(self, fd: int, events: int) -> None:
        self._real.register(fd, events)

    def unregister(self, fd: int) -> None:
        self.before_removal()
        self._real.unregister(fd)

    def modify(self, fd: int, events: int) -> None:
        self._real.modify(fd, events)
        self.modified.set()


def test_nor_of_what_was_heard_in_a_round_that_began_meanwhile(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[int, int, int, int]
) -> None:
    slow = Slow()
    monkeypatch.setattr(select, "epoll", lambda: slow)
    watch = watcher.Watcher()
    before, after = Holder(), Holder()
    reading, writing, other, to_other = ends

    def hear() -> None:
        os.write(writing, b"x")
        slow.goes_on.release()
        assert slow.over.acquire(timeout=PATIENCE_S)

    watch.add(other, Holder())
    watch.add(reading, before)
    os.write(to_other, b"x")
    assert slow.over.acquire(timeout=PATIENCE_S)
    slow.before_removal = hear
    watch.remove(reading)
    slow.before_removal = int
    watch.remove(other)
    os.read(other, 1)
    os.dup2(other, reading)
    watch.add(reading, after)
    slow.goes_on.release()
    assert slow.modified.wait(PATIENCE_S)
    assert after.heard.empty()
    watch.remove(reading)


def test_what_was_lost_as_soon_as_granted_is_no_longer_watched() -> None:
    """Its file is closed, and its number the next lock's."""
    place = Place("/dlm", "0:78", "local:x", "dom", "x", 0)
    one = keeper.Keeper(logic.Request(place), int, lambda _lost: None)
    reading, writing = os.pipe()
    one._watch(reading)
    one.error = LockLost("lost")
    one._settle(reading)
    os.close(writing)
    assert watcher.watcher("0:78")._watched == {}
    assert reading in watcher.watcher("0:78")._removed
