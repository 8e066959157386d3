"""Fencing tokens: from the revision of a grant to the number that resources compare. Pure.

A token is `(revision + offset) << TOKEN_SHIFT`, plus a counter of grants within the node. The offset is
0 until the store is restored: then revisions that were given once are given again, and it is raised so
that every token from then on is larger than all that were given before.

All nodes stop serving for the time in which it is raised, so each grant is either older than the raise
or made under it: which offset counts for a grant follows from its revision alone.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from dlmfs.model import TOKEN_SHIFT

BASE_MAX: Final = 1 << (63 - TOKEN_SHIFT)
"""What revision and offset make together stays below this: tokens fit 63 bits."""

ROOM: Final = 1_000_000_000
"""How far each raise goes beyond the largest revision that is known to have been given: others may
have been given larger ones meanwhile, some hours' worth at etcd's fastest."""


class Raise(NamedTuple):
    """From the commit `revision` on grants have `offset`."""

    revision: int
    offset: int


class Tokens(NamedTuple):
    """The tokens of one lock space. `raises`: the oldest first."""

    raises: tuple[Raise, ...] = ()

    @property
    def offset(self) -> int:
        """The one in force."""
        return self.raises[-1].offset if self.raises else 0

    def of(self, revision: int) -> int:
        """The token of a grant made by the commit `revision`; 0 is that of no grant."""
        if not revision:
            return 0
        offset = next((r.offset for r in reversed(self.raises) if r.revision <= revision), 0)
        return (revision + offset) << TOKEN_SHIFT


PLAIN: Final = Tokens()
"""Of a store that was never restored."""


def raised(offset: int, known: int, seen: int, now: int) -> int:
    """The offset from now on. `offset` stands in the store, whose revision is `now`; who raises it has
    served under `known` and has seen the revision `seen`."""
    return max(offset, known + max(0, seen - now)) + ROOM


def covers(offset: int, known: int, seen: int, now: int) -> bool:
    """Whether `offset` was raised enough for one who has served under `known` and seen `seen`."""
    return offset > known and now + offset > seen + known
