"""The busy locks of a node and how often they are granted: the answer behind `dlmfs top`.

Asked for each second or so: bounded in what it looks at and tells.
"""

from __future__ import annotations

import heapq
import os
from typing import TYPE_CHECKING, Any, Final

from dlmfs.facts import claim_facts
from dlmfs.model import Mode

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.node import Node

LOOKED_AT_MAX: Final = 100_000
"""Locks per look: some 30 ms of the event loop's time."""
ROWS_MAX: Final = 200
WISHES_MAX: Final = 64
SPAN_S: Final = 0.4
"""Rates are of no shorter time: several may look at once."""
FORGET_S: Final = 60.0

Facts = dict[str, Any]


class Traffic:
    """What was counted at the look before."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._counted: dict[ClusterLock, int] = {}
        self._rates: dict[ClusterLock, float] = {}
        self._at: float | None = None

    def look(self, wanted: str, *, idle: bool) -> Facts:
        """The locks whose "domain/lock" has `wanted` in it and that are held, awaited or were granted
        since the look before (`idle`: all), the busiest `ROWS_MAX` of them, and how many there are."""
        node = self.node
        member = node.membership
        member.serving()
        names = self._names(wanted.casefold())
        self._count(names)
        busy = [lock for lock in names if idle or self._is_busy(lock)]
        first = heapq.nlargest(ROWS_MAX, busy, key=self._business)
        return {
            "node": member.name,
            "mountpoint": node.config.mountpoint,
            "source": node.config.source_text,
            "owner": node.config.options.owner.value,
            "state": member.state.value,
            "reason": member.reason,
            "all_locks": sum(len(space.locks) for space in member.spaces.values()),
            "looked_at": len(names),
            "busy": len(busy),
            "locks": [self._row(lock) for lock in first],
        }

    def _names(self, wanted: str) -> dict[ClusterLock, str]:
        found = {}
        for space in self.node.membership.spaces.values():
            domain = os.fsdecode(space.domain)
            for lock in space.locks.values():
                name = f"{domain}/{os.fsdecode(lock.name)}"
                if wanted in name.casefold():
                    found[lock] = name
                    if len(found) == LOOKED_AT_MAX:
                        return found
        return found

    def _count(self, locks: dict[ClusterLock, str]) -> None:
        now = self.node.loop.time()
        if self._at is not None and now - self._at < SPAN_S:
            return
        span = now - self._at if self._at is not None else None
        before = self._counted
        self._rates = {}
        if span is not None and span < FORGET_S:
            for lock in locks:
                if lock in before:  # else it was not there, or was filtered out
                    self._rates[lock] = (lock.res.grants - before[lock]) / span
        self._counted = {lock: lock.res.grants for lock in locks}
        self._at = now
        self.node.loop.call_later(FORGET_S, self._forget, now)

    def _forget(self, counted_at: float) -> None:
        """Nobody looks any more: hold no locks that may have been dropped."""
        if self._at == counted_at:
            self._at = None
            self._counted, self._rates = {}, {}

    def _is_busy(self, lock: ClusterLock) -> bool:
        res = lock.res
        return bool(res.holders or res.waiters or lock.view.wishes or self._rates.get(lock))

    def _business(self, lock: ClusterLock) -> tuple[int, float, int]:
        waiting = len(lock.res.waiters) + len(lock.view.wishes)
        return waiting, self._rates.get(lock, 0.0), len(lock.res.holders)

    def _row(self, lock: ClusterLock) -> Facts:
        res, view = lock.res, lock.view
        first = next(iter(res.waiters.values()), None)
        holder = next(iter(res.holders.values()), None)
        rate = self._rates.get(lock)
        own = self.node.membership.name
        # Who holds it elsewhere is known where somebody waits for it: the wish came with a reading.
        others = [n for n, m in view.head.members.items() if n != own and m.level is not Mode.NL]
        return {
            "domain": os.fsdecode(lock.space.domain),
            "lock": os.fsdecode(lock.name),
            "level": res.level.name,
            "holders": len(res.holders),
            "holder": claim_facts(self.node, holder) if holder is not None else None,
            "held_by": sorted(others) if res.waiters and res.level is Mode.NL else [],
            "waiters": len(res.waiters),
            "wanted_by": [w.node for w in view.others()][:WISHES_MAX],
            "longest_s": round(self.node.loop.time() - first.since, 3) if first else None,
            "grants": res.grants,
            "grants_per_s": round(rate, 2) if rate is not None else None,
        }
