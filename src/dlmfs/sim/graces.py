"""What a program holds is given to nobody before it had its time to stop (design, rule 19).

A program is told that its lock is over: by the node's end, by a fence, or by its daemon's death. Until
it has closed the file it counts as working, and who is granted the lock meanwhile works beside it,
unless the time that it was promised is over:

    a node that ends, is evicted or fenced   the grace from then on; no longer than the lease lasts
    a daemon that dies without a lease       the lock-delay
    a daemon that dies with one              the lease; the grace, if its successor there ends that

The store may end a lease by itself: that is promise 3's matter (`checks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dlmfs.model import Mode, compatible
from dlmfs.sim.oracle import Oracle, Violation
from dlmfs.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dlmfs.sim.checks import Open
    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode

ROUNDING_S: Final = 0.002


class Graces:
    """Who was told when, and whether somebody came too early."""

    def __init__(self, cluster: Cluster, oracle: Oracle) -> None:
        self.cluster = cluster
        self.oracle = oracle
        self.expired: set[int] = set()
        """Leases that the store itself ended."""

    def told(self, opens: Iterable[Open], at: float) -> None:
        """The programs of these know from `at` on that their locks are over."""
        for opened in opens:
            if opened.outcome == "ok" and opened.let_go is None:
                opened.told = at if opened.told is None else min(at, opened.told)

    def crashed(self, opens: Iterable[Open], at: float) -> None:
        """The daemon of these has died; its programs may live on."""
        opens = list(opens)
        self.told(opens, at)
        for opened in opens:
            opened.crashed = at

    def granted(self, node: SimNode, opened: Open, before: Iterable[Open]) -> None:
        """`opened` has its lock on `node`; `before`: all opens of that lock."""
        for other in before:
            if other.told is None or other.let_go is not None:
                continue
            if (other.node, other.life) == (node, node.life):
                continue
            if compatible(other.mode, opened.mode):
                continue
            until = self._until(other)
            now = self.cluster.loop.time()
            if now < until - ROUNDING_S:
                raise Violation(
                    f"{opened.number} was granted {until - now:.3f} s before the time was over that "
                    f"the holder of {other.number} on {other.node.name} had to close it"
                )
            self._marked(other)

    def _until(self, other: Open) -> float:
        """When its time is over, by the fastest clock that may measure it."""
        scenario = self.cluster.scenario
        assert other.told is not None
        fastest = max(scenario.rates)
        grace_s = other.node.membership.config.grace_s
        if scenario.leased:  # the lease may run out at any moment from then on
            timing = Timing(scenario.ttl_s)
            grace_s = min(grace_s, timing.ttl_s - timing.fence_after_s)
        grace_s /= fastest
        if other.lease in self.expired:
            return other.told
        if other.crashed is not None:
            delayed = other.crashed + scenario.lock_delay_s / fastest
            if other.crashed > other.told:  # at its node's end, say, and that was told before
                return min(other.told + grace_s, delayed)
            if not scenario.leased:
                return delayed
        return other.told + grace_s

    def _marked(self, other: Open) -> None:
        """Promise 4: it was never closed, so its node died having it, whatever was the end."""
        mark = (other.node.name, other.grant)
        record = self.oracle.lock(other.lock)
        if not other.grant or record.spoilt or record.disordered:
            return
        if other.mode is Mode.EX and mark not in record.marks:
            raise Violation(
                f"{other.node.name} ended with {other.number} in use, and no mark says so"
            )
