"""Work for an answer goes in slices: between two of them the event loop serves the locks.

A question is answered inside of the daemon's event loop, where every open waits meanwhile. So what
grows with locks, claims, nodes or records is done in pieces that are counted, not timed: the count is
the same on every machine, and a test can assert it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final, TypeVar

SLICE: Final = 500
"""Units of work between two turns of the loop, some 2 ms; one is a look at a lock."""
ROW: Final = 5
"""A row of an answer, in units."""
PROCESS: Final = 15
"""A look at a process in /proc."""
PIECE: Final = 32 * 1024
"""Characters of an encoded answer that are sent at once."""
DEPTH: Final = 5
"""How deep an answer is taken apart: {"ok": {"domains": [{"locks": [row, ...]}]}}. A row is small."""

T = TypeVar("T")


class Pace:
    """The work of one answer."""

    def __init__(self) -> None:
        self._done = 0

    async def did(self, work: int) -> None:
        """So much was done since the last call."""
        self._done += work
        if self._done >= SLICE:
            self._done = 0
            await asyncio.sleep(0)

    async def slices(self, items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
        """The items in pieces, each worth a slice."""
        for start in range(0, len(items), SLICE):
            yield items[start : start + SLICE]
            await self.did(SLICE)


def encoded(answer: object) -> Iterator[bytes]:
    """The answer as one line of JSON, in pieces."""
    some: list[str] = []
    size = 0
    for part in _parts(answer, 0):
        some.append(part)
        size += len(part)
        if size >= PIECE:
            yield "".join(some).encode()
            some, size = [], 0
    yield "".join([*some, "\n"]).encode()


def _parts(value: Any, depth: int) -> Iterator[str]:
    if depth == DEPTH or not isinstance(value, dict | list | tuple) or _is_row(value):
        yield json.dumps(value)
        return
    is_dict = isinstance(value, dict)
    before = "{" if is_dict else "["
    for key in value:
        yield f"{before}{json.dumps(key)}: " if is_dict else before
        yield from _parts(value[key] if is_dict else key, depth + 1)
        before = ", "
    yield "}" if is_dict else "]"


def _is_row(value: Any) -> bool:
    """Nothing in it has parts of its own."""
    if not value:
        return True
    return isinstance(value, dict) and not any(
        isinstance(each, dict | list | tuple) for each in value.values()
    )
