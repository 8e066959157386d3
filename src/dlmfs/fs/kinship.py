"""The thread that asks /proc who belongs together: the event loop waits for none of it.

Rules of this file
------------------
* Each question is answered once, by the event loop, whatever happens: with "no" where there is no answer.
* Users take turns, one question each, and each has so many at most that wait: one with a crowd of
  processes makes nobody wait but himself.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Final, Protocol

from dlmfs.faults import Faults
from dlmfs.fs import kin

WAITING_MAX: Final = 256
"""Questions of one user that wait; what comes beyond is answered "no"."""

Done = Callable[[bool], None]


class Loop(Protocol):
    """What is needed of an event loop."""

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any) -> object: ...


class Kinship:
    """See the rules at the head of the file. The thread begins with the first question."""

    def __init__(self, loop: Loop, faults: Faults) -> None:
        self._loop = loop
        self._faults = faults
        self._waiting: dict[Hashable, deque[tuple[kin.Question, Done]]] = {}
        """By user, in the order of their turns."""
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, user: Hashable, question: kin.Question, done: Done) -> None:
        """`done` gets the answer, in a later turn of the loop."""
        with self._change:
            waiting = self._waiting.setdefault(user, deque())
            if len(waiting) < WAITING_MAX and not self._closed:
                waiting.append((question, done))
                self._change.notify()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="kinship", daemon=True)
                    self._thread.start()
                return
        self._tell(done, answer=False)

    def close(self) -> None:
        """Nothing is asked any more."""
        with self._change:
            self._closed = True
            self._change.notify()

    def _tell(self, done: Done, *, answer: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon has ended
            self._loop.call_soon_threadsafe(done, answer)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                user = next(iter(self._waiting))
                waiting = self._waiting.pop(user)
                question, done = waiting.popleft()
                if waiting:
                    self._waiting[user] = waiting  # behind the others
            try:
                answer = kin.is_kin(question)
            except Exception as error:
                answer = False
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._faults.note, "kinship", error)
            self._tell(done, answer=answer)
