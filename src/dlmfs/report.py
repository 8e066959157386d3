"""What a node says of itself: the answers behind `dlmfs status` and `dlmfs info`.

Read-only, without touching the mount, bounded and in slices; each for one asker (`permission`).
Layout of both answers: docs/reference.md.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dlmfs import __version__, reading
from dlmfs.core.events import Claim
from dlmfs.engine.badrecords import BadRecords
from dlmfs.engine.ending import Ending
from dlmfs.engine.hearing import read_wish
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.membership import Membership
from dlmfs.engine.queue import ordered
from dlmfs.engine.records import NODES, Head, decode_head, member_of, node_of
from dlmfs.errors import UsageError
from dlmfs.inquiry import facts_of
from dlmfs.pace import PROCESS, ROW, Pace
from dlmfs.permission import Sight
from dlmfs.proc import command
from dlmfs.store.base import Get, KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.node import Node

LISTED_MAX: Final = 1000
"""Locks that `status` has a row for."""
ROW_CLAIMS_MAX: Final = 16
"""Holders, and waiters, in such a row."""
CLAIMS_MAX: Final = 10_000
"""The same for the one lock of `info`."""
NAMES_MAX: Final = 100
"""Nodes of a domain, and domains of a node."""

Facts = dict[str, Any]


async def status(node: Node, sight: Sight) -> Facts:
    """The whole node, JSON-ready: lease, store, domains, locks with their holders and waiters; of the
    locks `LISTED_MAX`, the busy ones first, and how many more there are."""
    domains = await _domains(node, sight)
    await node.look_at_store()
    return {
        "version": __version__,
        "node": node.membership.name,
        "pid": os.getpid(),
        "source": node.config.source_text,
        "mountpoint": node.config.mountpoint,
        "holder_rule": node.config.options.holder.value,
        "options": list(node.config.words) if sight.whole else None,
        "uptime_s": round(node.membership.clock() - node.started, 1),
        "lease": _lease(node.membership),
        "ending": _ending(node.membership.ending),
        "store": node.store.describe(),
        "faults": node.faults.told(whole=sight.whole),
        "log": {"to": node.config.log_to, "lately": node.lately.told()} if sight.whole else None,
        "watchdog": node.watchdog.told() if node.watchdog is not None and sight.whole else None,
        **_bad(node.membership.bad, sight),
        "domains": domains,
        "hidden_domains": len(node.membership.spaces) - len(domains),
    }


def brief(node: Node) -> Facts:
    """What fits into an extended attribute of the mount: for who cannot reach the control socket."""
    return {
        "version": __version__,
        "node": node.membership.name,
        "pid": os.getpid(),
        "source": node.config.source_text,
        "holder_rule": node.config.options.holder.value,
        "uptime_s": round(node.membership.clock() - node.started, 1),
        "lease": _lease(node.membership),
        "ending": _ending(node.membership.ending),
        "run": node.run_folder,
    }


def _bad(bad: BadRecords, sight: Sight) -> Facts:
    """What is wrong with records that cannot be read; their keys name locks and nodes."""
    told = bad.told() if sight.whole else []
    return {"bad_records": told, "more_bad_records": len(bad.found) - len(told)}


def _lease(member: Membership) -> Facts:
    member.serving()
    fence_at = member.fence_at
    return {
        "state": member.state.value,
        "reason": member.reason,
        "ttl_s": member.timing.ttl_s if fence_at is not None else None,
        "left_s": round(fence_at - member.clock(), 2) if fence_at is not None else None,
        "fences": member.fences,
        "stamped": member.stamped,
    }


def _ending(ending: Ending) -> Facts | None:
    if not ending.begun:
        return None
    return {"phase": ending.phase.value, "reason": ending.reason}


async def hindrance(node: Node, sight: Sight, domain: str, name: str) -> Facts:
    """Why a lock cannot be had, if it is not for others who have it: the node's `state`, the `reason` if
    it is not good, the store's `trouble`; `held`: whether a program has the lock here. Raises
    NotPermitted."""
    sight.demand(os.fsencode(domain), os.fsencode(name))
    space = node.membership.spaces.get(os.fsencode(domain))
    lock = space.locks.get(os.fsencode(name)) if space is not None else None
    await node.look_at_store()
    lease = _lease(node.membership)
    return {
        "state": lease["state"],
        "reason": None if lease["state"] == "HEALTHY" else lease["reason"],
        "trouble": node.store.describe().get("trouble"),
        "held": lock is not None and bool(lock.res.holders),
    }


async def nodes(node: Node, sight: Sight) -> list[Facts]:
    """All nodes of the lock space, and the domains each is in. Raises Unavailable."""
    pace = Pace()
    domains: dict[str, list[str]] = {}
    hidden: Counter[str] = Counter()
    async for kv in reading.members(node, pace):
        member = member_of(kv.key)
        if member is None:
            continue
        if sight.names(member[0]) and len(domains.setdefault(member[1], [])) < NAMES_MAX:
            domains[member[1]].append(os.fsdecode(member[0]))
        else:
            hidden[member[1]] += 1
    found = []
    async for kv in reading.records(node, NODES, pace):
        name = node_of(kv.key)
        if name is None:
            continue
        facts = facts_of(kv)
        found.append(
            {
                "node": name,
                "own": name == node.membership.name,
                "host": facts.get("host"),
                "pid": facts.get("pid"),
                "mountpoint": facts.get("mount"),
                "ttl_s": facts.get("ttl"),
                "domains": sorted(domains.get(name, [])),
                "more_domains": hidden[name],
            }
        )
    return found


# -- locks --------------------------------------------------------------------------------------------


class _Told:
    """What is told of a domain's locks: `rows` of them, and how many there are besides."""

    def __init__(self) -> None:
        self.rows: list[ClusterLock] = []
        self.count = self.busy = self.hidden = 0


async def _domains(node: Node, sight: Sight) -> list[Facts]:
    pace = Pace()
    spaces = [space for space in node.membership.spaces.values() if sight.names(space.domain)]
    told = {space.domain: _Told() for space in spaces}
    for lock in await _first(spaces, told, sight, pace):
        told[lock.space.domain].rows.append(lock)
    telling = _Telling(node.loop.time(), sight, pace)
    return [await telling.domain(space, told[space.domain]) for space in spaces]


async def _first(
    spaces: list[Lockspace], told: dict[bytes, _Told], sight: Sight, pace: Pace
) -> list[ClusterLock]:
    """The locks that get a row, by name; counts all into `told`."""
    first: list[ClusterLock] = []
    for space in spaces:
        seen, about = sight.lists(space.domain), told[space.domain]
        async for some in pace.slices(list(space.locks.values())):
            listed = [lock for lock in some if seen(lock.name)]
            about.hidden += len(some) - len(listed)
            about.count += len(listed)
            about.busy += sum(map(_is_busy, listed))
            if len(first) == LISTED_MAX:
                last = _rank(first[-1])
                listed = [lock for lock in listed if _rank(lock) < last]
            if listed:
                first = heapq.nsmallest(LISTED_MAX, [*first, *listed], key=_rank)
    return sorted(first, key=lambda lock: lock.name)


def _is_busy(lock: ClusterLock) -> bool:
    told = lock.res.holders or lock.res.waiters or lock.view.wishes
    return bool(told) or lock.wreck_left is not None


def _rank(lock: ClusterLock) -> tuple[bool, bytes, bytes]:
    return not _is_busy(lock), lock.space.domain, lock.name


class _Telling(NamedTuple):
    """What all rows of an answer share."""

    now: float
    sight: Sight
    pace: Pace

    async def domain(self, space: Lockspace, told: _Told) -> Facts:
        members = sorted(space.members)
        await self.pace.did(ROW + len(members) // ROW)
        return {
            "name": os.fsdecode(space.domain),
            "state": space.life.value,
            "reason": space.reason,
            "members": members[:NAMES_MAX],
            "more_members": len(members[NAMES_MAX:]),
            **_bad(space.bad, self.sight),
            "locks": [await self.lock(lock) for lock in told.rows],
            "count": told.count,
            "busy": told.busy,
            "hidden": told.hidden,
        }

    async def lock(self, lock: ClusterLock) -> Facts:
        others = lock.view.others()
        await self.pace.did(ROW + len(others))
        return {
            "name": os.fsdecode(lock.name),
            "level": lock.res.level.name,
            "phase": lock.phase,
            **await self.claims("holders", lock.res.holders, ROW_CLAIMS_MAX),
            **await self.claims("waiters", lock.res.waiters, ROW_CLAIMS_MAX),
            "wanted_by": [
                {"node": w.node, "mode": w.mode.name, "try": w.trying} for w in others[:NAMES_MAX]
            ],
            "more_wanted_by": len(others[NAMES_MAX:]),
        }

    async def claims(self, what: str, claims: Mapping[int, Claim], most: int) -> Facts:
        """The first claims, and how many more there are."""
        rows = []
        for claim in list(islice(claims.values(), most)):
            rows.append(self.sight.claim(_claim(claim, self.now)))
            await self.pace.did(PROCESS)
        return {what: rows, f"more_{what}": max(0, len(claims) - len(rows))}


def _claim(claim: Claim, now: float) -> Facts:
    return {
        "mode": claim.mode.name,
        "pid": claim.pid,
        "command": command(claim.pid) if claim.pid else "",
        "since_s": round(now - claim.since, 3),
        "token": claim.token or None,
    }


async def info(node: Node, sight: Sight, domain: str, name: str) -> Facts:
    """One lock as the store knows it, all nodes included. Raises NotPermitted, UsageError for an unknown
    domain, Unavailable if the store does not answer."""
    sight.demand(os.fsencode(domain), os.fsencode(name))
    space = node.membership.spaces.get(os.fsencode(domain))
    if space is None:
        raise UsageError(f"this node is not in a domain {domain!r}: mkdir it first")
    key = os.fsencode(name)
    keys = space.keys
    result = await node.transact(
        Txn((), (Get(keys.head(key)), Range(keys.queue(key)), Range(keys.members)))
    )
    record, queue, members = result.responses
    assert record is None or isinstance(record, KeyValue)
    assert isinstance(queue, tuple)
    assert isinstance(members, tuple)
    head = decode_head(record) if record is not None else Head({})
    alive = {kv.key: kv.create_revision for kv in members if isinstance(kv, KeyValue)}
    found = [read_wish(space, kv) for kv in queue if isinstance(kv, KeyValue)]
    wishes = ordered(wish for wish in found if wish is not None)
    lock = space.locks.get(key)
    pace = Pace()
    telling = _Telling(node.loop.time(), sight, pace)
    holders = lock.res.holders if lock is not None else {}
    waiters = lock.res.waiters if lock is not None else {}
    token = 0
    async for some in pace.slices(list(holders.values())):
        token = max(token, *(claim.token for claim in some))
    return {
        "domain": domain,
        "lock": name,
        "mode": lock.res.level.name if lock is not None else "NL",
        "token": token or None,
        "lvb_hex": head.lvb.hex(),
        "abandoned": None
        if head.abandoned is None
        else {"node": head.abandoned.node, "token": space.tokens.of(head.abandoned.revision)},
        "members": [
            {
                "node": member,
                "level": m.level.name,
                "token": space.tokens.of(m.revision),
                "alive": alive.get(keys.member(member)) == m.incarnation,
            }
            for member, m in sorted(head.members.items())
        ],
        "waiters": [
            {"node": w.node, "mode": w.mode.name, "try": w.trying, "convert": w.convert}
            for w in wishes
        ],
        **await telling.claims("local_holders", holders, CLAIMS_MAX),
        **await telling.claims("local_waiters", waiters, CLAIMS_MAX),
    }
