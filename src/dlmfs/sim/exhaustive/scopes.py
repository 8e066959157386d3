"""The scopes that are explored: small, but each with what makes one part of the protocol hard.

The quick ones take half a minute together, the others up to two or three minutes each.
"""

from __future__ import annotations

from typing import Final

from dlmfs.model import HolderRule
from dlmfs.sim.exhaustive.world import Scope

HELD: Final = ((0, 0),)
"""Begin with the first node's first program past its open."""
CACHED: Final = ((0, 0), (0, 0))
"""... and past its close."""

SCOPES: Final[tuple[Scope, ...]] = (
    # Hand-overs and their order
    Scope("hand-over", (("ex close",), ("ex close",)), quick=True),
    Scope("turns", (("ex close", "ex close"), ("ex close", "ex close")), before=HELD, quick=True),
    Scope("readers and writers", (("ex close", "pr close"), ("ex close", "pr close"))),
    Scope(
        "holder=file", (("ex close", "pr close"), ("ex close",)), rule=HolderRule.FILE, quick=True
    ),
    Scope(
        "holder=file, all",
        (("ex close", "pr close"), ("ex close", "pr close")),
        rule=HolderRule.FILE,
    ),
    Scope("signals", (("ex? close", "ex close"), ("ex? close",)), before=HELD, quick=True),
    Scope("conversions", (("pr ex close close",), ("pr ex close close",)), quick=True),
    Scope("three nodes", (("ex close",), ("pr close",), ("ex close",))),
    Scope(
        "a conversion and a queue",
        (("pr ex close close",), ("pr close",), ("ex close",)),
        before=((0, 0), (1, 0)),
    ),
    Scope(
        "a wish vanishes",
        (("pr close",), ("ex? close",), ("pr close",)),
        before=((0, 0), (1, 0)),
    ),
    # More waiters than fit into a commit
    Scope(
        "one grant a commit",
        (("ex close",), ("pr close",), ("pr close",)),
        before=((0, 0), (1, 0), (2, 0)),
        operations=6,
        quick=True,
    ),
    Scope(
        "one grant a commit, lost answer",
        (("ex close",), ("pr close",), ("pr close",)),
        before=((0, 0), (1, 0), (2, 0)),
        losses=1,
        operations=6,
    ),
    Scope(
        "one grant a commit, leave",
        (("ex close leave",), ("pr close",), ("pr? close",)),
        before=((0, 0), (1, 0), (2, 0)),
        operations=6,
    ),
    # Trylocks
    Scope("trylock", (("try-ex close",), ("ex close", "ex close")), quick=True),
    Scope("trylock and readers", (("pr close",), ("try-ex close",), ("pr close",)), before=HELD),
    Scope(
        "trylocks of what is cached",
        (("ex close",), ("try-ex close",), ("try-pr close",)),
        before=CACHED,
    ),
    # An answer that overtakes another's notice: found a trylock that waited out its time.
    Scope(
        "trylock and another lock",
        (("try-ex close", "ex@b close"), ("ex close", "ex@b close")),
        before=((1, 0), (1, 1)),
    ),
    Scope(
        "trylock, lost answer", (("try-ex close",), ("ex close",)), losses=1, hasty=1, quick=True
    ),
    # Answers that never come
    Scope("lost answers", (("ex close",), ("ex close",)), losses=1, quick=True),
    Scope("two lost answers", (("ex close",), ("ex close",)), losses=2, before=HELD),
    Scope(
        "a write is lost",
        (("ex put close", "pr get close"), ("ex close",)),
        losses=1,
        before=HELD,
        faulty=(0,),
    ),
    Scope("gap in the watch", (("ex close",), ("ex close",)), gaps=1, before=HELD, quick=True),
    Scope("gap and lost answer", (("ex close",), ("ex close",)), gaps=1, losses=1, before=HELD),
    # Deaths
    Scope("death", (("ex put close",), ("pr get close",)), deaths=1, quick=True),
    Scope(
        "death among three",
        (("ex put close",), ("pr get close",), ("ex close",)),
        deaths=1,
        before=HELD,
        faulty=(0,),
    ),
    Scope(
        "a node returns",
        (("ex put close", "pr get close"), ("ex close",)),
        deaths=1,
        rejoins=1,
        quick=True,
    ),
    Scope(
        "a node returns, lost answer",
        (("ex put close", "pr get close"), ("ex close",)),
        deaths=1,
        rejoins=1,
        losses=1,
        before=HELD,
        faulty=(0,),
    ),
    # The end of a file and of a domain
    Scope("unlink", (("ex put close unlink",), ("pr get close unlink",)), quick=True),
    Scope("unlink and again", (("ex put close unlink",), ("ex close unlink", "pr close"))),
    Scope(
        "unlink, death", (("ex put close unlink",), ("pr get close unlink",)), deaths=1, quick=True
    ),
    Scope("unlink, lost answer", (("ex close unlink",), ("pr close unlink",)), losses=1),
    Scope("unused", (("ex close idle", "ex close"), ("pr close",)), before=CACHED, quick=True),
    Scope("unused by two", (("ex close idle", "ex close"), ("pr close idle",))),
    Scope("unused, tried", (("ex close idle", "try-ex close"), ("ex close idle",))),
    Scope("unused, a value", (("ex put close idle",), ("ex close idle", "pr get close"))),
    Scope("unused, death", (("ex close idle",), ("pr close idle", "ex close")), deaths=1),
    Scope("unused, lost answer", (("ex close idle", "pr close"), ("ex close idle",)), losses=1),
    Scope("unused and unlinked", (("ex close idle", "unlink"), ("ex close",)), losses=1),
    Scope("leave", (("ex put close leave",), ("pr get close leave",)), quick=True),
    Scope("leave, death", (("ex close leave",), ("pr close leave",)), deaths=1),
    Scope(
        "leave, lost answer", (("ex close leave",), ("pr close leave",)), losses=1, before=CACHED
    ),
    # Two locks
    Scope("two locks", (("ex close", "ex@b close"), ("ex close",)), before=((0, 0),), quick=True),
    Scope(
        "two locks, crossed",
        (("ex ex@b close close",), ("pr@b close", "pr close")),
        before=((0, 0), (1, 0)),
    ),
    Scope(
        "two locks, lost answer",
        (("ex close", "ex@b close"), ("ex close",)),
        losses=1,
        before=((0, 0), (0, 1)),
        faulty=(0,),
    ),
)
"""By name, see `Scope`."""
