"""The thread that hears of all locks, with pipes in place of locks."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from typing import Any

import pytest

from dlmfs.client import watcher
from tests.fs.nodes import PATIENCE_S


class Holder:
    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[int] = queue.SimpleQueue()

    def happened(self, events: int) -> None:
        self.heard.put(events)


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = Late()
    monkeypatch.setattr(select, "epoll", lambda: late)
    watch = watcher.Watcher()
    before, after = Holder(), Holder()
    with contextlib.ExitStack() as stack:
        ends = [*os.pipe(), *os.pipe()]
        for end in ends:
            stack.callback(os.close, end)
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
