"""Interrupted requests: which of them end with EINTR, and when.

The kernel interrupts a request once. From then on its thread heeds nothing but our answer, SIGKILL
included, and no later signal is told of. So one that is not to end now is looked at again and again.
(Answering the INTERRUPT itself with EAGAIN only brings the same one back at once, whatever has
happened since: it tells nothing, and is not done.)

Rules of this file
------------------
* A signal that ends the process, or a freezer, ends the wait at once; one that is caught does so, too,
  if the wait is for somebody who has the lock.
* What waits for nothing but the store is about to be answered, and a program that writes a value or
  makes a lock does not expect EINTR. Only a store that is silent for `PATIENCE_S` lets a signal through.
* A stop or a debugger ends no wait: a program without handlers does not expect EINTR from open(2).
* What looking costs is bounded, however many wait: at most `BATCH` looks in `PAUSE_S`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, NamedTuple

from dlmfs.timing import Scheduler, Timer

PATIENCE_S: Final = 1.0
FIRST_S: Final = 0.02
LAST_S: Final = 0.5
"""Seconds between two looks at one request: at first, and at last. It is how late a second signal is
noticed, after a stop."""
BATCH: Final = 16
PAUSE_S: Final = 0.02


class _Look(NamedTuple):
    at: float
    unique: int
    since: float
    after: float


class Interrupts:
    """The interrupted requests of one mount that are still to be answered.

    `settle(unique, waited)` says whether a request that was interrupted `waited` seconds ago is over:
    answered long ago, or ended by it with EINTR.
    """

    def __init__(self, loop: Scheduler, settle: Callable[[int, float], bool]) -> None:
        self._loop = loop
        self._settle = settle
        self._looks: list[_Look] = []
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._looks)

    def came(self, unique: int) -> None:
        """The kernel interrupts a request."""
        over = False
        try:
            over = self._settle(unique, 0.0)
        finally:  # also should looking fail: nobody tells of this request again
            if not over:
                now = self._loop.time()
                self._look_at(_Look(now + FIRST_S, unique, now, FIRST_S))

    def _look_at(self, look: _Look) -> None:
        heapq.heappush(self._looks, look)
        if self._looks[0] is look:
            self._stop()
            self._timer = self._loop.call_later(look.after, self._again)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = None
        now = self._loop.time()
        try:
            for _ in range(BATCH):
                if not self._looks or self._looks[0].at > now:
                    break
                _, unique, since, after = heapq.heappop(self._looks)
                over = False
                try:
                    over = self._settle(unique, now - since)
                finally:
                    if not over:
                        after = min(2 * after, LAST_S)
                        heapq.heappush(self._looks, _Look(now + after, unique, since, after))
        finally:
            self._stop()  # a request that came meanwhile
            if self._looks:
                wait = max(PAUSE_S, self._looks[0].at - now)
                self._timer = self._loop.call_later(wait, self._again)
