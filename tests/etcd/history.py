"""What a history of `worker.py` must fulfil, whatever was killed, stopped or cut off meanwhile.

A reader of its own: it knows nothing of dlmfs, only of a counter under a lock.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Attempt:
    """One try to count, and what is known of it. Times: None if it did not come so far."""

    worker: str
    number: int
    token: int
    count: int
    after: int
    """The attempt whose count was found and increased; 0: none."""
    granted: float
    written: float | None = None
    used: float | None = None
    """When the last good use of the lock began."""
    found: int | None = None
    """Whose count that last use found."""


@dataclass(frozen=True)
class Reading:
    worker: str
    granted: float
    at: float
    count: int
    by: int


@dataclass
class History:
    attempts: dict[int, Attempt]
    readings: list[Reading]

    @property
    def acknowledged(self) -> list[Attempt]:
        return [a for a in self.attempts.values() if a.written is not None]


def load(logs: Iterable[Path]) -> History:
    history = History({}, [])
    for path in logs:
        for line in path.read_text().splitlines():
            _note(history, path.stem, json.loads(line))
    return history


def _note(history: History, worker: str, said: dict[str, Any]) -> None:
    attempts = history.attempts
    match said["step"]:
        case "write":
            attempts[said["attempt"]] = Attempt(
                worker,
                said["attempt"],
                said["token"],
                said["count"],
                said["after"],
                said["granted"],
            )
        case "written":
            attempts[said["attempt"]].written = said["at"]
        case "used":
            attempts[said["attempt"]].used = said["since"]
            attempts[said["attempt"]].found = said["found"][1]
        case "read":
            history.readings.append(
                Reading(worker, said["granted"], said["at"], said["count"], said["by"])
            )


def faults(
    history: History, accepted: Sequence[tuple[int, int]], final: tuple[int, int]
) -> list[str]:
    """Everything that must not be. `accepted`: what the register took, token and count in order;
    `final`: count and attempt that the lock's value ends with."""
    return [
        *_lost(history, final),
        *_chain(history, final),
        *_past(history),
        *_tokens(history, accepted),
        *_together(history),
    ]


def _lost(history: History, final: tuple[int, int]) -> Iterable[str]:
    """Whatever was acknowledged is counted, once."""
    counts = Counter(a.count for a in history.acknowledged)
    yield from (f"count {count} was acknowledged {n} times" for count, n in counts.items() if n > 1)
    most = max(counts, default=0)
    if final[0] < most:
        yield f"count {most} was acknowledged, but the value ends at {final[0]}"


def _chain(history: History, final: tuple[int, int]) -> Iterable[str]:
    """The end follows from the beginning by single steps, through every acknowledged one."""
    seen = set()
    count, number = final
    while number:
        attempt = history.attempts.get(number)
        if attempt is None or attempt.count != count:
            yield f"nobody wrote count {count} as attempt {number}"
            return
        seen.add(number)
        count, number = count - 1, attempt.after
    if count != 0:
        yield f"the counts begin at {count}"
    for attempt in history.acknowledged:
        if attempt.number not in seen:
            yield f"count {attempt.count} of {attempt.worker} was acknowledged and is gone"
        if attempt.found not in (None, attempt.number):
            yield f"{attempt.worker} had the lock and found another's count in its place"
    for reading in history.readings:
        if reading.by and reading.by not in history.attempts:
            yield f"{reading.worker} read count {reading.count}, which nobody wrote"


def _past(history: History) -> Iterable[str]:
    """Who gets the lock after a write was acknowledged finds that one or a later one."""
    done = sorted((a.written, a.count) for a in history.acknowledged if a.written is not None)
    times = [at for at, _ in done]
    most = list(itertools.accumulate((count for _, count in done), max))
    found = [(a.granted, a.count - 1, a.worker) for a in history.attempts.values()]
    found += [(r.granted, r.count, r.worker) for r in history.readings]
    for granted, count, worker in found:
        before = bisect.bisect_left(times, granted)
        if before and count < most[before - 1]:
            yield f"{worker} found count {count} after {most[before - 1]} had been acknowledged"


def _tokens(history: History, accepted: Sequence[tuple[int, int]]) -> Iterable[str]:
    """Tokens never go back, in the order of the counts; and what refuses old ones stays in order."""
    ordered = sorted(history.acknowledged, key=lambda a: a.count)
    for earlier, later in itertools.pairwise(ordered):
        if later.token < earlier.token:
            yield f"count {later.count} has token {later.token}, {earlier.count} {earlier.token}"
    for (_, earlier_count), (_, later_count) in itertools.pairwise(accepted):
        if later_count <= earlier_count:
            yield f"the register took count {later_count} after {earlier_count}"


def _together(history: History) -> Iterable[str]:
    """From its grant to the beginning of its last good use nobody else's time overlaps."""
    spans = sorted((a.granted, a.used, a.worker) for a in history.attempts.values() if a.used)
    latest = (0.0, "")
    for granted, used, worker in spans:
        if granted < latest[0]:
            yield f"{worker} was granted the lock while {latest[1]} used it"
        latest = max(latest, (used, worker))
    ends = [(used, granted, worker) for granted, used, worker in spans]
    ends.sort()
    for reading in history.readings:
        place = bisect.bisect_left(ends, (reading.granted,))
        # Single uses do not overlap, so the first that ends after the grant is the one that might.
        if place < len(ends) and ends[place][1] < reading.granted:
            yield f"{reading.worker} read while {ends[place][2]} had the lock exclusively"
