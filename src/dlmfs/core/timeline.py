"""Whether a store still has what it had: the stamp, and how two of them compare. Pure.

A store that was restored from a copy may show larger revisions than those that we knew, and other
records under revisions that we remember. What cannot come back is a number that nobody gave before. So
the lock space has a *stamp*: a count, and the names of the last ones to stamp it, each used only once.
History is linear: a store that has a stamp has everything that came before it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

KEPT: Final = 16
"""Names that a stamp keeps: a node that has not looked for so many stampings is fenced, unless its
lease time is many times that of others."""


class Stamp(NamedTuple):
    """`number`: how often it was stamped; `names`: the latest first, at most KEPT."""

    number: int
    names: tuple[str, ...]

    def next(self, name: str) -> Stamp:
        return Stamp(self.number + 1, (name, *self.names)[:KEPT])


def follows(known: Stamp, now: Stamp) -> bool | None:
    """Whether a store that shows the stamp `now` has had `known`. None: too much came in between."""
    passed = now.number - known.number
    if passed < 0:
        return False
    return None if passed >= len(now.names) else now.names[passed] == known.names[0]
