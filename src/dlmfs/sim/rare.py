"""Planted bugs (see `planted`) that a kept scenario shows (tests/sim/seeds), and no seed within reach."""

from __future__ import annotations

from typing import Final

from dlmfs.sim.planted import Planted

LOCK: Final = "engine/lock.py"
LOCAL: Final = "engine/local.py"
DOMAINS: Final = "engine/domains.py"
FILES: Final = "fs/filesystem.py"
OPEN: Final = "fs/openfiles.py"

RARE: Final[tuple[Planted, ...]] = (
    Planted(
        "told-nothing",
        LOCK,
        "            self.local.wanted = None\n",
        "            self.local.wanted = NOTHING\n",
        100,
        "the core is not told that nobody wants the lock any more (found)",
    ),
    Planted(
        "gap-hides-wishes",
        LOCK,
        "            self.local.tell_wanted(self.view)\n\n    @contained\n    def resume",
        "            pass\n\n    @contained\n    def resume",
        100,
        "who comes between a gap and the reading after it passes the wishes it told of (found)",
    ),
    Planted(
        "half-a-member",
        DOMAINS,
        """        if member.state is LeaseState.SUSPECT:
            member.loop.call_later(RETRY_S, self.join_again, domain)
            return
""",
        """        if member.state is LeaseState.SUSPECT:
            return
""",
        100,
        "a node that is suspect when it would rejoin a domain never does (found)",
    ),
    Planted(
        "joined-though-fenced",
        DOMAINS,
        "            if error is None and not member.up:  # fenced meanwhile;",
        "            if False:  # fenced meanwhile;",
        100,
        "a join that is answered after the fence stands for the domain (found)",
    ),
    Planted(
        "late-timer",
        LOCAL,
        "left = [c for c in later if c.stage is Stage.WAITING]",
        "left = later",
        100,
        "a trylock is put off by another's grant (found)",
    ),
    Planted(
        "made-while-removed",
        FILES,
        "if parent.removing or self.spaces[parent.ino].life is Life.LEAVING:",
        "if self.spaces[parent.ino].life is Life.LEAVING:",
        100,
        "a file is made in a directory whose removal goes on after its answer (found)",
    ),
    Planted(
        "uncounted-twice",
        OPEN,
        "        if handle.charged:\n",
        "        if True:\n",
        100,
        "a wait that is withdrawn as its lease runs out is taken off the account twice (found)",
    ),
)
