"""Virtual time in one thread: the scheduler of tests and simulations."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any


class SimTimer:
    """A pending call; `cancel` makes it a no-op."""

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None
        self.args = ()


class Runaway(AssertionError):
    """So much was done that it will never end."""


class SimLoop:
    """A `timing.Scheduler` whose clock jumps to the next pending call.

    Calls due at the same instant run in order of arrival; with `rng`, in random order, so that
    nothing comes to depend on it. After `limit` calls the run is given up with Runaway.
    """

    def __init__(self, rng: Random | None = None, limit: int = 1 << 62) -> None:
        self.limit = limit
        self._now = 0.0
        self._sequence = 0
        self._heap: list[tuple[float, float, int, SimTimer]] = []
        self._rng = rng
        self.steps = 0

    def time(self) -> float:
        """Seconds since the start of the run."""
        return self._now

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> SimTimer:
        return self.call_later(0.0, callback, *args)

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        assert delay >= 0
        timer = SimTimer(callback, args)
        self._sequence += 1
        tie = self._rng.random() if self._rng is not None else 0.0
        heapq.heappush(self._heap, (self._now + delay, tie, self._sequence, timer))
        return timer

    def pending(self) -> int:
        """How many calls are to come."""
        return sum(timer.callback is not None for _, _, _, timer in self._heap)

    def step(self) -> bool:
        """Run the next call; False if there is none."""
        while self._heap:
            when, _, _, timer = heapq.heappop(self._heap)
            if timer.callback is None:
                continue
            assert when >= self._now
            self._now = when
            self.steps += 1
            if self.steps > self.limit:
                raise Runaway(f"{self.steps} events, and no end")
            timer.callback(*timer.args)
            return True
        return False

    def run_for(self, seconds: float) -> None:
        """Run all that is due within `seconds`; the clock stands at their end."""
        end = self._now + seconds
        while self._heap and self._heap[0][0] <= end:
            if self._heap[0][3].callback is None:
                heapq.heappop(self._heap)  # `step` would run the next live one, however late
            else:
                self.step()
        self._now = max(self._now, end)

    def run_until(self, condition: Callable[[], bool], limit_s: float = 3600.0) -> bool:
        """Run until the condition holds; False if `limit_s` or all calls run out first."""
        end = self._now + limit_s
        while not condition():
            if not self._heap or self._heap[0][0] > end:
                return False
            self.step()
        return True
