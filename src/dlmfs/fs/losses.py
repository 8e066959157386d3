"""Which locks and processes a loss has hit, in the log: next morning somebody asks.

Bounded: a fence may hit a hundred thousand holders while it must be told to all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from dlmfs.proc import command

if TYPE_CHECKING:
    from dlmfs.fs.handle import Handle

log = logging.getLogger("dlmfs.node")

NAMED_MAX: Final = 20
"""Holders that are named, in `WINDOW_S` seconds: each costs a look into /proc."""
WINDOW_S: Final = 1.0


class Losses:
    """What is logged of them. `clock`: in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = 0.0
        self._left = NAMED_MAX

    def tell(self, what: str, holders: Iterable[Handle]) -> None:
        """`what` befell these holders: one record, with the rows for programs beside the words."""
        hit = list(holders)
        if not hit or not log.isEnabledFor(logging.WARNING):
            return
        now = self._clock()
        if now - self._since >= WINDOW_S:
            self._since, self._left = now, NAMED_MAX
        rows = [_row(handle) for handle in hit[: self._left]]
        self._left -= len(rows)
        words = [
            f"{row['lock']} {row['mode']} pid {row['pid'] or 'unknown'} {row['command']}".rstrip()
            for row in rows
        ]
        if len(hit) > len(rows):
            words.append(f"{len(hit) - len(rows)} more" if rows else f"{len(hit)} holders")
        log.warning("%s: %s", what, ", ".join(words), extra={"locks": rows})


def _row(handle: Handle) -> dict[str, Any]:
    lock = handle.lock
    name = f"{os.fsdecode(lock.space.domain)}/{os.fsdecode(lock.name)}"
    told = command(handle.pid) if handle.pid else ""
    return {"lock": name, "mode": handle.mode.name, "pid": handle.pid, "command": told}
