"""What a node finds in its lock space: the answer behind `dlmfs doctor`, without judging it.

Reads only, but for the question to the other nodes, which leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

from dlmfs import __version__, inquiry
from dlmfs.engine.eviction import EVICT
from dlmfs.engine.questions import ASKED_MAX, Answers
from dlmfs.engine.records import DOMAINS, NODES, decode_head, member_of
from dlmfs.errors import DlmfsError
from dlmfs.store.base import KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.node import Node

READS: Final = 5
HEADS: Final = b"h/"
HEADS_MAX: Final = 10_000
"""Locks looked at."""
PIECE: Final = 200

Facts = dict[str, Any]


async def health(node: Node) -> Facts:
    """The store's latency, the nodes and how they are, and what is left behind. Raises Unavailable."""
    loop = node.loop
    took = []
    for _ in range(READS):
        start = loop.time()
        try:
            async with asyncio.timeout(inquiry.STORE_S):
                await node.transact(Txn((), (Range(NODES + node.membership.name.encode()),)))
        except (DlmfsError, TimeoutError) as error:
            silence = f"it has said nothing for {inquiry.STORE_S:g} s"
            return {"trouble": str(error) or silence, "version": __version__}
        took.append(loop.time() - start)
    result = await node.transact(Txn((), (Range(NODES), Range(DOMAINS))))
    nodes, rest = (_records(part) for part in result.responses)
    heads = await _heads(node)
    records = {
        kv.key[len(NODES) :].decode(): kv for kv in nodes if b"/" not in kv.key[len(NODES) :]
    }
    return {
        "trouble": None,
        "version": __version__,
        "read_ms": [round(seconds * 1000, 2) for seconds in took],
        "nodes": await _nodes(node, records),
        "evicted": [
            kv.key[len(NODES) : -len(EVICT)].decode() for kv in nodes if kv.key.endswith(EVICT)
        ],
        "domains": _domains(rest, heads),
        "heads_max": HEADS_MAX if len(heads) == HEADS_MAX else None,
    }


def _records(part: object) -> list[KeyValue]:
    assert isinstance(part, tuple)
    return [kv for kv in part if isinstance(kv, KeyValue)]


async def _heads(node: Node) -> list[KeyValue]:
    """The first locks, in pieces: those of everybody at once would stop the event loop."""
    found: list[KeyValue] = []
    behind = b""
    while len(found) < HEADS_MAX:
        piece = await node.transact(Txn((), (Range(HEADS, behind, PIECE),)))
        (part,) = piece.responses
        if not (some := _records(part)):
            break
        found += some
        behind = some[-1].key
        await asyncio.sleep(0)
    return found[:HEADS_MAX]


async def _nodes(node: Node, records: dict[str, KeyValue]) -> list[Facts]:
    own = node.membership.name
    asked = [name for name in records if name != own][:ASKED_MAX]
    question: Facts = {"locks": [], "threads": []}
    answers: Answers = await inquiry.ask(node, records, asked, question)
    found = []
    for name, kv in records.items():
        facts = inquiry.facts_of(kv)
        row: Facts = {
            "node": name,
            "own": name == own,
            "host": facts.get("host"),
            "pid": facts.get("pid"),
            "ttl_s": facts.get("ttl"),
            "left_s": await inquiry.lease_left(node, kv.lease),
            "silent": None,
        }
        if name in answers:
            row["silent"] = await inquiry.silent(node, kv, answers[name])
            answer = answers[name] or {}
            if row["silent"] is None:
                row |= {key: answer.get(key) for key in ("version", "state", "reason", "owner")}
        found.append(row)
    return found


def _domains(rest: list[KeyValue], heads: list[KeyValue]) -> list[Facts]:
    """Each domain with its nodes, and its locks that no living node has."""
    alive: dict[str, dict[str, int]] = {}
    for kv in rest:
        member = member_of(kv.key)
        if member is not None:
            alive.setdefault(os.fsdecode(member[0]), {})[member[1]] = kv.create_revision
    locks: dict[str, list[tuple[str, bool, str | None]]] = {}
    for kv in heads:
        domain, _, lock = kv.key[len(HEADS) :].partition(b"/")
        name = os.fsdecode(domain)
        head = decode_head(kv)
        nodes = alive.get(name, {})
        living = any(nodes.get(n) == m.incarnation for n, m in head.members.items())
        mark = head.abandoned.node if head.abandoned is not None else None
        locks.setdefault(name, []).append((os.fsdecode(lock), living, mark))
    return [
        {
            "domain": name,
            "nodes": sorted(alive.get(name, {})),
            "locks": len(locks.get(name, ())),
            "ownerless": [lock for lock, living, _ in locks.get(name, ()) if not living],
            "abandoned": {lock: mark for lock, _, mark in locks.get(name, ()) if mark},
        }
        for name in sorted({*alive, *locks})
    ]
