"""The busy locks of a node and how often they are granted: the answer behind `dlmfs top`.

Asked for each second or so: bounded in what it looks at and tells, and in slices.
"""

from __future__ import annotations

import asyncio
import heapq
import os
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from dlmfs.facts import claim_facts
from dlmfs.model import Mode
from dlmfs.pace import PROCESS, ROW, Pace
from dlmfs.permission import Sight

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.node import Node

LOOKED_AT_MAX: Final = 100_000
"""Locks per look."""
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
        self._looking = asyncio.Lock()

    async def look(self, sight: Sight, wanted: str, *, idle: bool) -> Facts:
        """The locks whose "domain/lock" has `wanted` in it and that are held, awaited or were granted
        since the look before (`idle`: all), the busiest `ROWS_MAX` of them, and how many there are; of
        those that the asker may hear of (`hidden`: how many of those looked at he may not)."""
        node, pace = self.node, Pace()
        member = node.membership
        member.serving()
        async with self._looking:
            await self._count(pace)
            locks, hidden = await self._named(sight, wanted.casefold(), pace)
            busy, first = await self._busiest(locks, pace, idle=idle)
        rows = []
        for lock in first:
            rows.append(self._row(lock, sight))
            await pace.did(ROW + PROCESS + len(lock.view.wishes))
        return {
            "node": member.name,
            "mountpoint": node.config.mountpoint,
            "source": node.config.source_text,
            "holder_rule": node.config.options.holder.value,
            "state": member.state.value,
            "reason": member.reason,
            "all_locks": sum(len(space.locks) for space in member.spaces.values()),
            "looked_at": len(locks),
            "busy": busy,
            "hidden": hidden,
            "locks": rows,
        }

    async def _named(self, sight: Sight, wanted: str, pace: Pace) -> tuple[list[ClusterLock], int]:
        found: list[ClusterLock] = []
        hidden = 0
        for space in list(self.node.membership.spaces.values()):
            domain, seen = os.fsdecode(space.domain), sight.lists(space.domain)
            async for some in pace.slices(list(space.locks.values())):
                listed = [lock for lock in some if seen(lock.name)]
                hidden += len(some) - len(listed)
                found += [
                    lock
                    for lock in listed
                    if wanted in f"{domain}/{os.fsdecode(lock.name)}".casefold()
                ]
                if len(found) >= LOOKED_AT_MAX:
                    return found[:LOOKED_AT_MAX], hidden
        return found, hidden

    async def _count(self, pace: Pace) -> None:
        """Of all locks, whoever asks for which: one asker's rates must not depend on another's look."""
        now = self.node.loop.time()
        if self._at is not None and now - self._at < SPAN_S:
            return
        span = now - self._at if self._at is not None else None
        before, counted = self._counted, dict["ClusterLock", int]()
        rates: dict[ClusterLock, float] = {}
        spaces = list(self.node.membership.spaces.values())
        for space in spaces:
            room = LOOKED_AT_MAX - len(counted)
            async for some in pace.slices(list(islice(space.locks.values(), room))):
                for lock in some:
                    counted[lock] = lock.res.grants
                    if span is not None and span < FORGET_S and lock in before:
                        rates[lock] = (lock.res.grants - before[lock]) / span
        self._counted, self._rates, self._at = counted, rates, now
        self.node.loop.call_later(FORGET_S, self._forget, now)

    async def _busiest(
        self, locks: list[ClusterLock], pace: Pace, *, idle: bool
    ) -> tuple[int, list[ClusterLock]]:
        """How many are busy, and the first of them."""
        count, first = 0, list["ClusterLock"]()
        async for some in pace.slices(locks):
            busy = [lock for lock in some if idle or self._is_busy(lock)]
            count += len(busy)
            if busy:
                first = heapq.nlargest(ROWS_MAX, [*first, *busy], key=self._business)
        return count, first

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

    def _row(self, lock: ClusterLock, sight: Sight) -> Facts:
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
            "holder": sight.claim(claim_facts(self.node, holder)) if holder is not None else None,
            "held_by": sorted(others)[:WISHES_MAX] if res.waiters and res.level is Mode.NL else [],
            "waiters": len(res.waiters),
            "wanted_by": [w.node for w in view.others()][:WISHES_MAX],
            "longest_s": round(self.node.loop.time() - first.since, 3) if first else None,
            "grants": res.grants,
            "grants_per_s": round(rate, 2) if rate is not None else None,
        }
