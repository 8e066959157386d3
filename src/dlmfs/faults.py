"""Exceptions that nobody expected: each is logged, counted and named, and costs only what it belongs to.

What that is, each place that catches one decides: a request, a lock, a domain, a connection. Only a lost
lease, an eviction, or the proof that the store is another one fences a node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

log = logging.getLogger("dlmfs.node")

PLACES_MAX: Final = 16
"""Places that are named; with more, those are forgotten where it is longest ago."""

TRACEBACK_EVERY_S: Final = 1.0
"""Of one place; a client that meets the same fault in a loop must not fill the log."""

MESSAGE_MAX: Final = 200
"""Characters of a message that are kept: it may quote what somebody else has written."""


class Fault(NamedTuple):
    """What happened last in one place: when (seconds since 1970), and how often in all."""

    where: str
    what: str
    at: float
    times: int

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        return self._asdict()


def words(error: BaseException) -> str:
    """The exception in one line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_MAX else text[: MESSAGE_MAX - 3] + "..."


class Faults:
    """Those of one daemon. `count`: of all since its start."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.count = 0
        self._clock = clock
        self._places: dict[str, Fault] = {}
        self._logged: dict[str, float] = {}

    def note(self, where: str, error: BaseException) -> None:
        """An exception that nobody expected, and where: "request OPEN", "lock jobs/backup"."""
        self.count += 1
        now = self._clock()
        known = self._places.pop(where, None)
        self._places[where] = Fault(where, words(error), now, 1 + (known.times if known else 0))
        if now - self._logged.get(where, 0.0) >= TRACEBACK_EVERY_S:
            self._logged[where] = now
            log.error("a fault in %s: %s", where, words(error), exc_info=error)
        while len(self._places) > PLACES_MAX:
            oldest = next(iter(self._places))
            del self._places[oldest]
            self._logged.pop(oldest, None)

    def told(self, *, whole: bool = True) -> dict[str, Any]:
        """For `dlmfs status`: how many, and (`whole`: the words may name what a stranger must not
        know) the last of each place, the newest first."""
        last = [fault.told() for fault in reversed(self._places.values())] if whole else []
        return {"count": self.count, "last": last}
