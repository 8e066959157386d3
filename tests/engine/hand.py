"""The simulated cluster driven by hand: one lock, a quiet network, and every open at its moment.

`SimCluster` draws what happens from a seed; a race that is known is told step by step instead.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from dlmfs.core.events import Claim, Stage
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.records import Head
from dlmfs.errors import DlmfsError
from dlmfs.model import HolderRule, Mode
from dlmfs.store.base import BOUNDS, Bounds, Txn, TxnDone
from dlmfs.store.memory_store import Faults
from tests.engine.cluster import Program, SimCluster, SimNode

LOCK = b"lock0"
QUEUE = b"d/dom/w/"
SOON_S = 0.1
"""Time for whatever needs no waiting: a hundred of the network's delays."""


def waits(claim: Claim) -> bool:
    return claim.stage is Stage.WAITING


def holds(claim: Claim) -> bool:
    return claim.stage is Stage.HELD


def ended(claim: Claim) -> bool:
    return claim.stage is Stage.ENDED


class Steady(Random):
    """Draws for a network whose delays are exactly those asked for, and which loses nothing."""

    def uniform(self, a: float, b: float) -> float:
        return b

    def random(self) -> float:
        return 0.99


class HandNode(SimNode):
    """A node that keeps the reason of every failed open instead of judging it."""

    def __init__(self, cluster: SimCluster, name: str, rule: HolderRule) -> None:
        self.reasons: dict[int, int] = {}
        self.faults: list[str] | None = None
        """Where exceptions came that a test has provoked; None: none may come."""
        super().__init__(cluster, name, rule)

    def failed(self, claim: Claim, reason: int) -> None:
        self.reasons[claim.fh] = reason
        self.programs.pop(claim.fh, None)

    def broken(self, where: str, error: Exception) -> None:
        if self.faults is None:
            super().broken(where, error)
        else:
            self.faults.append(where)

    @property
    def joined(self) -> Lockspace:
        assert self.space is not None
        return self.space

    @property
    def lock(self) -> ClusterLock:
        return self.joined.lock(LOCK)

    @property
    def head(self) -> Head:
        """The lock's head as this node knows it."""
        return self.lock.view.head

    def network(self, *, delay_s: float = 0.001, watch_delay_s: float = 0.001) -> None:
        """From now on these very delays, for this node alone."""
        self.store.faults = Faults(delay_s=delay_s, watch_delay_s=watch_delay_s)
        self.store.rng = Steady()

    def medium(self, *, full: bool) -> None:
        """Whether the store refuses this node's writes for want of space."""
        self.store.faults = Faults(full=full)

    def answer_next(self, answer: Callable[[Txn, TxnDone], None]) -> None:
        """Have `answer` take this node's next transaction in the place of the store."""
        store = self.store
        real = store.txn

        def once(txn: Txn, done: TxnDone) -> None:
            setattr(store, "txn", real)  # noqa: B010 - a method, to mypy
            answer(txn, done)

        setattr(store, "txn", once)  # noqa: B010


class HandCluster(SimCluster):
    """`count` nodes called n0, n1, ... in one domain, and the lock `LOCK`."""

    def __init__(
        self,
        count: int,
        rule: HolderRule = HolderRule.NODE,
        *,
        seed: int = 1,
        watch_delay_s: float = 0.001,
        bounds: Bounds = BOUNDS,
    ) -> None:
        faults = Faults(watch_delay_s=watch_delay_s)
        super().__init__(seed, nodes=0, locks=1, faults=faults, rules=(rule,), bounds=bounds)
        self.hands = [HandNode(self, f"n{i}", rule) for i in range(count)]
        self.nodes.extend(self.hands)
        assert self.loop.run_until(lambda: all(n.space is not None for n in self.hands), 10)

    def pass_time(self, seconds: float = SOON_S) -> None:
        self.loop.run_for(seconds)

    def begin(self, node: HandNode, mode: Mode, *, trying: bool = False) -> Claim:
        """A program of its own opens the lock; nothing else happens yet."""
        self.fh += 1
        claim = Claim(self.fh, mode, trying=trying, pid=1000 + self.fh)
        node.programs[claim.fh] = Program(claim, LOCK, node, self.loop.time())
        if node.lock.open(claim):
            node.granted(claim)
        return claim

    def open(self, node: HandNode, mode: Mode, *, trying: bool = False) -> Claim:
        """The same, and time for the answer."""
        claim = self.begin(node, mode, trying=trying)
        self.pass_time()
        return claim

    def hold(self, node: HandNode, mode: Mode) -> Claim:
        """An open that must succeed."""
        claim = self.open(node, mode)
        assert holds(claim)
        return claim

    def cache(self, node: HandNode, mode: Mode) -> None:
        """Leave the lock with the node at that level, used by nobody."""
        self.end(node, self.hold(node, mode))

    def end(self, node: HandNode, claim: Claim) -> None:
        """The program closes its descriptor; nothing else happens yet."""
        del node.programs[claim.fh]
        node.lock.close(claim)

    def put_value(self, node: HandNode, claim: Claim) -> None:
        """The holder writes a new value, durably."""
        self.write(node.programs[claim.fh])
        self.pass_time()

    def leave(self, node: HandNode) -> list[DlmfsError | None]:
        """Begin a clean leave; what it came to will stand in the list."""
        said: list[DlmfsError | None] = []
        node.joined.leave(said.append)
        return said

    def wish_stands(self) -> bool:
        """Whether the store holds a request that could not be granted at once."""
        return any(key.startswith(QUEUE) for key in self.server.data)
