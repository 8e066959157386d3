"""A store that is put back to a copy of itself: what a run may do there, and what must follow.

Rules of this file
------------------
* Who knows a stamp, or the record of a lock of its own, that the copy has not, must be fenced; all others
  are told by it. So all that had a session are, if anything was lost.
* If every node knows by the stamp, nobody is granted anything for a lease time: there may be others who
  have not looked. If only some do (the copy is too young) the others may be granted at once: then the
  rest of the run is judged like one with wild clocks (docs/reference.md, "A restored store").
* A daemon that starts anew knows nothing. None does before those who know have told.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.model import Mode
from dlmfs.sim.oracle import Violation
from dlmfs.store.base import Put, Txn

if TYPE_CHECKING:
    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode
    from dlmfs.sim.oracle import Memory
    from dlmfs.store.memory import Snapshot

TENANT: Final = b"tenant"


class Copy(NamedTuple):
    """A copy of the store, and what the oracle knew then."""

    snapshot: Snapshot
    memory: Memory


class Witness(NamedTuple):
    """A life that must be fenced, and how often its daemon had been by then."""

    node: SimNode
    life: int
    fences: int


class Restores:
    """Of one run. `blind`: one has happened of which not all nodes could know."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.blind = False
        self.last = float("-inf")
        """When the last one was."""
        self._copy: Copy | None = None
        self._restored = False
        self._witnesses: list[Witness] = []
        self._raises = 0

    @property
    def untold(self) -> bool:
        """Whether the store was restored, and those who know have not said so yet."""
        if self.cluster.oracle.raises != self._raises:
            return False
        return any(w.node.life == w.life and not w.node.machine.dead for w in self._witnesses)

    def copy(self, rng: Random) -> None:
        arbiter = self.cluster.arbiter
        self._copy = Copy(arbiter.snapshot(), self.cluster.oracle.remember())
        self._others(rng)

    def _others(self, rng: Random) -> None:
        """Another tenant of the store commits something."""
        for _ in range(rng.choice([0, 0, 3, 300])):
            self.cluster.arbiter.apply(Txn((), (Put(TENANT, b""),)))

    def restore(self, rng: Random) -> None:
        """The store is what the copy has, under revisions that may be larger."""
        cluster, copy = self.cluster, self._copy
        if copy is None or not all(node.settled for node in cluster.nodes):
            return
        if not cluster.arbiter.available:
            return
        since = copy.snapshot.revision
        lost = cluster.oracle.touched > since
        living = [node for node in cluster.nodes if not node.machine.dead]
        if lost and not all(_knows(node, since) for node in living):
            self.blind = True
            living = [node for node in living if _has_more(node, since)]
        arbiter = cluster.arbiter
        bump = rng.choice([0, 0, 1_000_000])
        term = max(1, arbiter.term + rng.choice([-1, 0, 1]))
        arbiter.restore(copy.snapshot, bump=bump, term=term)
        self._restored = True
        cluster.oracle.put_back(copy.memory)
        self.last = cluster.loop.time()
        cluster.checks.put_back()
        self._others(rng)
        for node in cluster.nodes:
            node.store.restarted()
        if lost:
            self._raises = cluster.oracle.raises
            self._witnesses = [
                Witness(node, node.life, node.membership.fences)
                for node in living
                if node.has_session
            ]
            if self._witnesses and not self.blind:
                cluster.oracle.closed_until = cluster.loop.time() + cluster.scenario.ttl_s
        cluster.disturb(6 * cluster.scenario.ttl_s)

    def check(self) -> None:
        """After the healing: everybody was fenced who had to be, and nobody for nothing."""
        if self.cluster.oracle.raises and not self._restored:
            raise Violation("a node says that the store was restored, and it was not")
        for node, life, fences in self._witnesses:
            if node.life == life and node.membership.fences == fences:
                raise Violation(f"{node.name} was not fenced, and the store went back")
        self.cluster.arbiter.data.pop(TENANT, None)


def _knows(node: SimNode, since: int) -> bool:
    """Whether the node has seen a stamp that is younger than that."""
    return node.membership.stamped > since


def _has_more(node: SimNode, since: int) -> bool:
    """Whether it has a lock by a grant that is younger."""
    found = False
    for space in node.membership.spaces.values():
        for lock in space.locks.values():
            mine = lock.view.mine()
            if space.live and mine is not None and mine.level is not Mode.NL:
                found |= mine.revision > since and not lock.busy
    return found
