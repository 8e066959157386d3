"""Greedy nodes, whose users overlap for ever: every waiting open must still get its turn (promise 5).

Each node always has a few programs at the lock, and the last one that holds it goes only when it has
to. A node that let its newcomers pass those who wait elsewhere would never give the lock away.
"""

from __future__ import annotations

import os
from random import Random
from typing import Final, NamedTuple

import pytest

from dlmfs.core.events import Claim
from dlmfs.model import HolderRule, Mode
from tests.engine.hand import HandCluster, HandNode, ended, holds, waits

LONG = bool(os.environ.get("DLMFS_LONG"))
SEEDS: Final = 200 if LONG else 12
STEPS: Final = 3000 if LONG else 1500
PROGRAMS: Final = 4
"""At each node, all the time."""
RELUCTANT_S: Final = 0.05
"""How long the last holder of a node waits for another one to relieve it."""
PATIENCE_S: Final = 3.0
"""Hundreds of hand-overs: who waits longer is starved."""
TASTES: Final = (
    (Mode.EX,),
    (Mode.PR, Mode.EX),
    (Mode.PR, Mode.PR, Mode.PR, Mode.EX),
)
"""What the programs of a node ask for."""


class Open(NamedTuple):
    node: HandNode
    claim: Claim
    since: float


class Greed:
    """One run: a cluster, and the open files on it."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.cluster = HandCluster(
            self.rng.randint(2, 4),
            self.rng.choice(list(HolderRule)),
            seed=seed,
            watch_delay_s=self.rng.choice([0.0, 0.001, 0.01]),
        )
        self.tastes = {node.name: self.rng.choice(TASTES) for node in self.cluster.hands}
        self.trying = self.rng.choice([0.0, 0.3])
        self.opens: list[Open] = []

    def step(self) -> None:
        self.fill()
        self.cluster.pass_time(self.rng.choice([0.001, 0.005]))
        self.opens = [it for it in self.opens if not ended(it.claim)]
        self.relieve()

    def fill(self) -> None:
        """Have the same number of programs at every node."""
        now = self.cluster.loop.time()
        for node in self.cluster.hands:
            here = sum(it.node is node for it in self.opens)
            for _ in range(PROGRAMS - here):
                mode = self.rng.choice(self.tastes[node.name])
                trying = self.rng.random() < self.trying
                self.opens.append(Open(node, self.cluster.begin(node, mode, trying=trying), now))

    def relieve(self) -> None:
        """End every holder that leaves another one behind on its node, and those long there."""
        held = [it for it in self.opens if holds(it.claim)]
        self.rng.shuffle(held)
        for it in held:
            others = any(o.node is it.node and o is not it and holds(o.claim) for o in self.opens)
            if others or self.cluster.loop.time() - it.since > RELUCTANT_S:
                self.cluster.end(it.node, it.claim)
                self.opens.remove(it)

    def starved(self) -> list[Open]:
        now = self.cluster.loop.time()
        return [it for it in self.opens if waits(it.claim) and now - it.since > PATIENCE_S]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_open_gets_its_turn_while_users_overlap(seed: int) -> None:
    greed = Greed(seed)
    for _ in range(STEPS):
        greed.step()
        assert not greed.starved()
    assert greed.cluster.grants > STEPS / 10


def test_who_comes_to_the_front_by_a_withdrawal_looks_at_the_head_of_now() -> None:
    """The holder gives way to a reader; behind that a writer waits, and behind it another reader, who
    knows the head of before. When the writer gives up no head changes, and nobody tells the reader
    (traps 2): it must read the head, or it waits for a grant that nobody will make."""
    cluster = HandCluster(4)
    a, b, c, d = cluster.hands
    cluster.cache(a, Mode.EX)
    cluster.hold(a, Mode.PR)
    a.network(watch_delay_s=1.0)
    reader, writer, last = (
        cluster.open(b, Mode.PR),
        cluster.open(c, Mode.EX),
        cluster.open(d, Mode.PR),
    )
    cluster.pass_time(2.0)
    assert holds(reader)
    assert waits(writer)
    assert waits(last)
    del c.programs[writer.fh]
    c.lock.interrupt(writer)
    cluster.pass_time(0.5)
    assert holds(last)
