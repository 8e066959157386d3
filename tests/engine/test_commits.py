"""What each operation costs, in commits of the store (design, engine rules 1, 3, 7, 8)."""

from __future__ import annotations

from dlmfs.core.events import Claim, Stage
from dlmfs.model import HolderRule, Mode
from dlmfs.store.memory_store import Faults
from tests.engine.cluster import Program, SimCluster, SimNode

LOCK = b"lock0"


class Counted(SimCluster):
    """Two or three quiet nodes, and how much the store and they had to do since the last look."""

    def __init__(self, nodes: int = 2, locks: int = 1) -> None:
        super().__init__(1, nodes=nodes, locks=locks, faults=Faults(), rules=(HolderRule.NODE,))
        self.look()

    def look(self) -> int:
        """Commits since the last look, when all is quiet."""
        self.loop.run_for(1.0)
        commits = sum(node.space.commits for node in self.nodes if node.space is not None)
        since, self.seen = commits - getattr(self, "seen", 0), commits
        return since

    def open(
        self, node: SimNode, mode: Mode, *, lock: bytes = LOCK, trying: bool = False
    ) -> Program:
        self.fh += 1
        program = Program(Claim(self.fh, mode, trying=trying, pid=self.fh), lock, node, 0.0)
        node.programs[self.fh] = program
        assert node.space is not None
        if node.space.lock(lock).open(program.claim):
            node.granted(program.claim)
        return program


def held(program: Program) -> bool:
    return program.claim.stage is Stage.HELD


def test_an_uncontended_take_is_one_commit_and_a_cached_one_none() -> None:
    cluster = Counted()
    a, _b = cluster.nodes
    program = cluster.open(a, Mode.EX)
    assert cluster.look() == 1
    assert held(program)
    cluster.close(program)
    assert cluster.look() == 0
    assert held(cluster.open(a, Mode.EX))
    assert cluster.look() == 0


def test_uncontended_traffic_tells_no_other_node_anything() -> None:
    cluster = Counted(locks=3)
    a, b = cluster.nodes
    assert b.space is not None
    revision = b.space.revision
    for lock in cluster.locks:
        program = cluster.open(a, Mode.EX, lock=lock)
        cluster.look()
        cluster.write(program)
        cluster.close(program)
        cluster.look()
    assert b.space.revision == revision


def test_a_value_is_one_commit() -> None:
    cluster = Counted()
    program = cluster.open(cluster.nodes[0], Mode.EX)
    cluster.look()
    cluster.write(program)
    assert cluster.look() == 1


def test_a_hand_over_is_one_commit_of_the_holder_after_the_wish() -> None:
    """On the waiter's path: its wish, filed while the lock is in use, and the holder's one commit."""
    cluster = Counted()
    a, b = cluster.nodes
    first = cluster.open(a, Mode.EX)
    cluster.look()
    second = cluster.open(b, Mode.EX)
    assert cluster.look() == 1
    assert not held(second)
    cluster.close(first)
    assert cluster.look() == 1
    assert held(second)


def test_the_next_wish_goes_along_with_a_hand_over() -> None:
    """A program that closes and opens again at once: no commit for its wish."""
    cluster = Counted()
    a, b = cluster.nodes
    first = cluster.open(a, Mode.EX)
    cluster.look()
    second = cluster.open(b, Mode.EX)
    cluster.look()
    cluster.close(first)
    again = cluster.open(a, Mode.EX)
    assert cluster.look() == 1
    assert held(second)
    assert not held(again)
    cluster.close(second)
    cluster.look()
    assert held(again)


def test_a_trylock_of_an_idle_lock_elsewhere_succeeds() -> None:
    cluster = Counted()
    a, b = cluster.nodes
    program = cluster.open(a, Mode.EX)
    cluster.look()
    cluster.close(program)
    tried = cluster.open(b, Mode.EX, trying=True)
    assert cluster.look() <= 2
    assert held(tried)


def test_many_takes_share_a_commit() -> None:
    cluster = Counted(locks=32)
    programs = [cluster.open(cluster.nodes[0], Mode.EX, lock=lock) for lock in cluster.locks]
    assert cluster.look() == 1
    assert all(held(program) for program in programs)
