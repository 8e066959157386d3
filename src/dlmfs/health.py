"""What a node finds in its lock space: the answer behind `dlmfs doctor`, without judging it.

Reads only, but for the question to the other nodes, which leaves nothing behind; in pages and slices.
Of the locks an ordinary user is told about his own: others' are not worth the cluster's work for him.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from dlmfs import __version__, inquiry, reading
from dlmfs.engine.inspection import inspect, marked
from dlmfs.engine.questions import ASKED_MAX, Answers
from dlmfs.engine.records import HEADS, NODES, Keys, decode_head, lock_of, member_of, node_of
from dlmfs.errors import BadState, DlmfsError
from dlmfs.fs.tree import Directory
from dlmfs.pace import ROW, Pace
from dlmfs.permission import Sight
from dlmfs.store.base import Get, KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.node import Node

READS: Final = 5
HEADS_MAX: Final = 10_000
"""Locks looked at."""
OWN_MAX: Final = 1000
"""Of an ordinary user's own."""
GETS: Final = 100
"""Keys read at once; etcd takes 128 operations."""
SAID: Final = ("version", "state", "reason", "holder_rule")
"""What a node says of itself."""
SAID_MAX: Final = 500
NAMES_MAX: Final = 100
"""Locks named, and nodes of a domain; of the others only how many there are."""
DECODED: Final = 10
"""A head decoded, in units of work."""

Facts = dict[str, Any]


async def health(node: Node, sight: Sight) -> Facts:
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
    await node.look_at_store()
    pace = Pace()
    nodes = [kv async for kv in reading.records(node, NODES, pace)]
    named = ((node_of(kv.key), kv) for kv in nodes)
    records = {name: kv for name, kv in named if name is not None}
    looked = _Looked(sight)
    for kv in nodes:
        looked.whether_good(kv)
    async for kv in reading.members(node, pace):
        looked.member(kv)
    heads = _heads(node, pace) if sight.whole else _own_heads(node, sight, pace)
    async for kv in heads:
        looked.head(kv)
        await pace.did(DECODED)
    return {
        "trouble": None,
        "version": __version__,
        "read_ms": [round(seconds * 1000, 2) for seconds in took],
        "nodes": await _nodes(node, records),
        "evicted": [name for name in map(marked, nodes) if name is not None],
        "bad_records": looked.bad if sight.whole else [],
        "domains": [row async for row in looked.rows(pace)],
        "heads": "all" if sight.whole else "own",
        "heads_max": looked.heads if looked.heads in (HEADS_MAX, OWN_MAX) else None,
    }


async def _heads(node: Node, pace: Pace) -> AsyncIterator[KeyValue]:
    """The first locks of all."""
    count = 0
    async for kv in reading.records(node, HEADS, pace):
        yield kv
        count += 1
        if count == HEADS_MAX:
            return


async def _own_heads(node: Node, sight: Sight, pace: Pace) -> AsyncIterator[KeyValue]:
    """Those of the first locks whose files on this mount are the asker's and may be read by him."""
    keys = await _own_keys(node, sight, pace)
    for start in range(0, len(keys), GETS):
        some = tuple(Get(key) for key in keys[start : start + GETS])
        for kv in (await node.transact(Txn((), some))).responses:
            if isinstance(kv, KeyValue):
                yield kv


async def _own_keys(node: Node, sight: Sight, pace: Pace) -> list[bytes]:
    found: list[bytes] = []
    for folder in list(node.fs.tree.root.children.values()):
        assert isinstance(folder, Directory)
        seen, keys = sight.lists(folder.name), Keys(folder.name, "")
        async for some in pace.slices(list(folder.children.values())):
            found += [
                keys.head(file.name)
                for file in some
                if file.uid == sight.asker.uid and seen(file.name)
            ]
            if len(found) >= OWN_MAX:
                return found[:OWN_MAX]
    return found


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
            "left_s": await inquiry.lease_left(node, kv.lease) if name in answers else None,
            "silent": None,
        }
        if name in answers:
            row["silent"] = await inquiry.silent(node, kv, answers[name])
            answer = answers[name] or {}
            if row["silent"] is None:
                row |= {key: _text(answer.get(key)) for key in SAID}
        found.append(row)
    return found


def _text(said: object) -> str | None:
    return None if said is None else str(said)[:SAID_MAX]


class _Domain:
    """What was found of a domain."""

    def __init__(self) -> None:
        self.alive: dict[str, int] = {}
        """Its nodes, and since when."""
        self.locks = self.ownerless = 0
        self.unowned: list[str] = []
        """The first locks that no living node has."""
        self.marks: dict[str, str] = {}
        """The first doubtful values, and whose death made them so."""
        self.abandoned = 0


class _Looked:
    """The domains that the asker may hear of, as the records bring them: members first, then heads."""

    def __init__(self, sight: Sight) -> None:
        self.sight = sight
        self.heads = 0
        self.bad: list[str] = []
        """What is wrong with the first records that cannot be read."""
        self._domains: dict[bytes, _Domain] = {}

    def whether_good(self, kv: KeyValue) -> bool:
        try:
            inspect(kv)
        except BadState as error:
            if len(self.bad) < NAMES_MAX:
                self.bad.append(str(error))
            return False
        return True

    def member(self, kv: KeyValue) -> None:
        self.whether_good(kv)  # whatever is in it, somebody is a member by it
        member = member_of(kv.key)
        if member is not None and self.sight.names(member[0]):
            self._domains.setdefault(member[0], _Domain()).alive[member[1]] = kv.create_revision

    def head(self, kv: KeyValue) -> None:
        self.heads += 1
        found = lock_of(kv.key)
        if not self.whether_good(kv) or found is None:
            return
        name, lock = found
        domain = self._domains.setdefault(name, _Domain())
        head = decode_head(kv)
        shown = os.fsdecode(lock)
        domain.locks += 1
        if not any(domain.alive.get(n) == m.incarnation for n, m in head.members.items()):
            domain.ownerless += 1
            if len(domain.unowned) < NAMES_MAX:
                domain.unowned.append(shown)
        if head.abandoned is not None:
            domain.abandoned += 1
            if len(domain.marks) < NAMES_MAX:
                domain.marks[shown] = head.abandoned.node

    async def rows(self, pace: Pace) -> AsyncIterator[Facts]:
        for name, found in sorted(self._domains.items()):
            nodes = sorted(found.alive)
            yield {
                "domain": os.fsdecode(name),
                "nodes": nodes[:NAMES_MAX],
                "more_nodes": len(nodes[NAMES_MAX:]),
                "locks": found.locks,
                "ownerless": found.unowned,
                "more_ownerless": found.ownerless - len(found.unowned),
                "abandoned": found.marks,
                "more_abandoned": found.abandoned - len(found.marks),
            }
            await pace.did(ROW + len(nodes) // ROW)
