"""What a node says of itself: the answers behind `dlmfs status` and `dlmfs info`.

Read-only, and without touching the mount. Layout of both answers: docs/reference.md.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from dlmfs import __version__
from dlmfs.core.events import Claim
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.membership import Membership
from dlmfs.engine.queue import ordered
from dlmfs.engine.records import DOMAINS, NODES, Head, decode_head, member_of
from dlmfs.errors import UsageError
from dlmfs.fs.kin import command
from dlmfs.model import TOKEN_SHIFT
from dlmfs.store.base import Get, KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.node import Node


def status(node: Node) -> dict[str, Any]:
    """The whole node, JSON-ready: lease, store, domains, locks with their holders and waiters."""
    return {
        "version": __version__,
        "node": node.membership.name,
        "pid": os.getpid(),
        "source": node.config.source_text,
        "mountpoint": node.config.mountpoint,
        "owner": node.config.options.owner.value,
        "uptime_s": round(node.membership.clock() - node.started, 1),
        "lease": _lease(node.membership),
        "store": node.store.describe(),
        "domains": [_domain(node, space) for space in node.membership.spaces.values()],
    }


def _lease(member: Membership) -> dict[str, Any]:
    member.serving()
    fence_at = member.fence_at
    return {
        "state": member.state.value,
        "reason": member.reason,
        "ttl_s": member.timing.ttl_s if fence_at is not None else None,
        "left_s": round(fence_at - member.clock(), 2) if fence_at is not None else None,
        "fences": member.fences,
    }


async def nodes(node: Node) -> list[dict[str, Any]]:
    """All nodes of the lock space, and the domains each is in. Raises Unavailable."""
    result = await node.transact(Txn((), (Range(NODES), Range(DOMAINS))))
    records, rest = result.responses
    assert isinstance(records, tuple)
    assert isinstance(rest, tuple)
    domains: dict[str, list[str]] = {}
    for kv in rest:
        assert isinstance(kv, KeyValue)
        member = member_of(kv.key)
        if member is not None:
            domains.setdefault(member[1], []).append(os.fsdecode(member[0]))
    found = []
    for kv in records:
        assert isinstance(kv, KeyValue)
        name = kv.key[len(NODES) :].decode()
        if "/" in name:
            continue
        facts = json.loads(kv.value)
        found.append(
            {
                "node": name,
                "own": name == node.membership.name,
                "host": facts.get("host"),
                "pid": facts.get("pid"),
                "mountpoint": facts.get("mount"),
                "ttl_s": facts.get("ttl"),
                "domains": sorted(domains.get(name, [])),
            }
        )
    return found


def _domain(node: Node, space: Lockspace) -> dict[str, Any]:
    now = node.loop.time()
    return {
        "name": os.fsdecode(space.domain),
        "state": space.life.value,
        "reason": space.reason,
        "members": sorted(space.members),
        "locks": [_lock(lock, now) for _, lock in sorted(space.locks.items())],
    }


def _lock(lock: ClusterLock, now: float) -> dict[str, Any]:
    others = lock.view.others()
    return {
        "name": os.fsdecode(lock.name),
        "level": lock.res.level.name,
        "phase": lock.res.phase.name.lower(),
        "holders": [_claim(c, now) for c in lock.res.holders.values()],
        "waiters": [_claim(c, now) for c in lock.res.waiters.values()],
        "wanted_by": [{"node": w.node, "mode": w.mode.name, "try": w.trying} for w in others],
    }


def _claim(claim: Claim, now: float) -> dict[str, Any]:
    return {
        "mode": claim.mode.name,
        "pid": claim.pid,
        "command": command(claim.pid) if claim.pid else "",
        "since_s": round(now - claim.since, 3),
        "token": claim.token or None,
    }


async def info(node: Node, domain: str, name: str) -> dict[str, Any]:
    """One lock as the store knows it, all nodes included. Raises UsageError for an unknown domain,
    Unavailable if the store does not answer."""
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
    wishes = ordered(space.wish_of(kv) for kv in queue if isinstance(kv, KeyValue))
    lock = space.locks.get(key)
    now = node.loop.time()
    holders = list(lock.res.holders.values()) if lock is not None else []
    waiters = list(lock.res.waiters.values()) if lock is not None else []
    return {
        "domain": domain,
        "lock": name,
        "mode": lock.res.level.name if lock is not None else "NL",
        "token": max((c.token for c in holders), default=None),
        "lvb_hex": head.lvb.hex(),
        "abandoned": None
        if head.abandoned is None
        else {"node": head.abandoned.node, "token": head.abandoned.revision << TOKEN_SHIFT},
        "members": [
            {
                "node": member,
                "level": m.level.name,
                "token": m.revision << TOKEN_SHIFT,
                "alive": alive.get(keys.member(member)) == m.incarnation,
            }
            for member, m in sorted(head.members.items())
        ],
        "waiters": [
            {"node": w.node, "mode": w.mode.name, "try": w.trying, "convert": w.convert}
            for w in wishes
        ],
        "local_holders": [_claim(c, now) for c in holders],
        "local_waiters": [_claim(c, now) for c in waiters],
    }
