"""Since when a domain's members are known to have ended: their locks wait for the lock-delay.

Rules of this file
------------------
* It counts from the notice of the death, not from the first question after it: or every lock that a dead
  node had cached would cost its first user a delay, whenever that is.
* Who was no member any more when we listed them ended before that, and is counted from then. So is one
  whose delay is over and forgotten: a later list makes it wait once more, and no one wait too short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from dlmfs.timing import Scheduler

SLACK_S: Final = 0.001
"""A timer may come early by a rounding of the clock, and nobody would ask again."""


class Deaths:
    """`delay_s`: how long after the notice of a death it counts; 0: at once. `over` is called when the
    delay of one is over: whoever waits here looks again."""

    def __init__(self, loop: Scheduler, delay_s: float, over: Callable[[], None]) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._over = over
        self._listed_at = 0.0
        self._noticed: dict[tuple[str, int], float] = {}

    def listed(self) -> None:
        """All members were listed just now."""
        if self._delay_s:
            self._listed_at = self._loop.time()

    def note(self, node: str, incarnation: int) -> None:
        """A member has ended."""
        if self._delay_s:
            self._note((node, incarnation), self._loop.time())

    def _note(self, who: tuple[str, int], at: float) -> None:
        if who not in self._noticed:
            self._noticed[who] = at
            self._loop.call_later(at + self._delay_s - self._loop.time(), self._is_over)

    def _is_over(self) -> None:
        since = self._loop.time() - self._delay_s + SLACK_S
        self._noticed = {who: at for who, at in self._noticed.items() if at > since}
        self._over()

    def counts(self, node: str, incarnation: int, *, noticed: bool) -> bool:
        """Whether the end of this member may be acted on. `noticed`: the members say that it has ended;
        else that is known otherwise, from now on."""
        if not self._delay_s:
            return True
        who, now = (node, incarnation), self._loop.time()
        at = self._noticed.get(who, self._listed_at if noticed else now)
        if now - at >= self._delay_s - SLACK_S:
            return True
        self._note(who, at)
        return False
