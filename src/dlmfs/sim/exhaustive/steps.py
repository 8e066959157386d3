"""What a node makes of one event, and the store of one transaction: each run once, then looked up.

Why it is fast
--------------
A node's step depends on its own state and on what comes to it, the store's on its data and the
transaction. So each such step runs once, on a thawed copy of the real object; afterwards it is a look
into a table. The table can also run without copies (`copying=False`): that is how a violation is told
and proved, and how the copies are tested.

One reduction, without loss: a flush is sent at once where nothing can come between, with one lock and no
gap to come (`at_once`). The transaction is built already, one lock has one at a time, and what
`Sender.flush` looks at changes only by the answer to that very transaction. Nobody but the store
sees a flush, and the store only when it applies the transaction, which is a choice of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from dlmfs.engine.sender import Sender
from dlmfs.errors import LockLost, OutcomeUnknown
from dlmfs.sim.exhaustive import oracle
from dlmfs.sim.exhaustive.actors import SPECIAL, Clock, Facts, Node, Seen, facts
from dlmfs.sim.exhaustive.snapshot import freeze, shape, thaw
from dlmfs.sim.exhaustive.world import Names
from dlmfs.store.base import Txn, WatchGap
from dlmfs.store.memory import MemoryServer

TTL_S: Final = 15.0


class Effects(NamedTuple):
    """What a node's step did to the world around it."""

    sent: tuple[tuple[int, Txn], ...] = ()
    seen: tuple[Seen, ...] = ()
    problem: str = ""


class Served(NamedTuple):
    """What a transaction did to the store."""

    server: int
    result: int
    batch: int
    problem: str
    values: tuple[tuple[bytes, bytes], ...]


class Table:
    """The states met so far by their numbers, and the steps between them."""

    def __init__(
        self, names: Names, node_names: Sequence[str], *, copying: bool, at_once: bool
    ) -> None:
        self.names = names
        self.node_names = node_names
        self.facts: dict[int, Facts] = {}
        """Of each state of a node."""
        self._states: dict[object, int] = {}
        self._steps: dict[object, tuple[int, Effects]] = {}
        self._served: dict[object, Served] = {}
        self._live: dict[object, Any] | None = None if copying else {}
        self._at_once = at_once

    # -- real objects and their numbers ---------------------------------------------------------

    def put(self, key: object, thing: Node | MemoryServer) -> int:
        """The number of a state of a node or of the server."""
        name = shape(thing, SPECIAL)
        number = self._states.get(name)
        if number is None:
            blob = freeze(thing) if self._live is None else None
            number = self._states[name] = self.names.named(blob, name.atoms, name.revisions)
            if isinstance(thing, Node):
                self.facts[number] = facts(thing)
            else:
                self.names.things[number] = (blob, dict(thing.data))
        if self._live is not None:
            self._live[key] = thing
        return number

    def node(self, index: int, number: int) -> Node:
        """A copy of a node in that state, or the very node."""
        node = thaw(self.names.things[number]) if self._live is None else self._live[index]
        assert isinstance(node, Node)
        return node

    def server(self, number: int) -> MemoryServer:
        """The same of the server."""
        server = thaw(self.names.things[number][0]) if self._live is None else self._live["server"]
        assert isinstance(server, MemoryServer)
        return server

    def step(
        self, index: int, number: int, kind: str, payload: int = 0, slot: int = 0
    ) -> tuple[int, Effects]:
        """The node's state after an event: a choice's kind, with what comes by it in `payload`."""
        key = (index, number, kind, payload, slot)
        known = self._steps.get(key) if self._live is None else None
        if known is None:
            node = self.node(index, number)
            effects = self._run(node, kind, payload, slot)
            known = self._steps[key] = self.put(index, node), effects
        return known

    def _run(self, node: Node, kind: str, payload: int, slot: int) -> Effects:
        problem = ""
        try:
            self._event(node, kind, self.names.things[payload] if kind != "act" else None, slot)
            while self._at_once and node.clock.soon and _is_flush(node.clock):
                node.clock.run_soon()
        except Exception:  # a broken invariant of the engine is what we look for
            problem = traceback.format_exc(limit=-4)
        sent = taken(node)
        seen, node.seen = tuple(node.seen), []
        return Effects(sent, seen, problem)

    @staticmethod
    def _event(node: Node, kind: str, payload: Any, slot: int) -> None:
        handle = node.handle
        if kind == "soon":
            node.clock.run_soon()
        elif kind == "timer":
            node.clock.run_timer()
        elif kind == "act":
            node.act(slot)
        elif kind == "interrupt":
            node.interrupt(slot)
        elif kind == "answer":
            handle.pending.pop(slot)(payload)
        elif kind == "lose":
            handle.pending.pop(slot)(OutcomeUnknown("no answer from the store"))
        else:
            sink = handle.sink
            assert sink is not None
            if kind == "gap":
                handle.sink = None
                sink(WatchGap(slot))
            else:
                sink(payload)

    def serve(self, number: int, index: int, payload: int, kind: str) -> Served:
        """Apply a transaction, or end the lease `payload`."""
        key = (number, index, payload, kind)
        known = self._served.get(key) if self._live is None else None
        if known is not None:
            return known
        server = self.server(number)
        before = server.data
        result = 0
        if kind == "expire":
            server.expire(payload)
        elif kind == "grant":
            result = server.grant(self.node_names[index], TTL_S)
        else:
            try:
                result = self.names.number(server.apply(self.names.things[payload]))
            except LockLost:
                assert kind == "late"
        batches, server.history = server.history, []
        assert len(batches) <= 1
        batch = self.names.number(batches[0]) if batches else 0
        actor = "" if kind == "expire" else self.node_names[index]
        problem = oracle.judge(before, server.data, actor) if batch else ""
        values = oracle.new_values(before, server.data) if batch else ()
        known = Served(self.put("server", server), result, batch, problem, values)
        self._served[key] = known
        return known


def _is_flush(clock: Clock) -> bool:
    callback = clock.soon[0].callback
    return getattr(callback, "__func__", None) is Sender.flush


def taken(node: Node) -> tuple[tuple[int, Txn], ...]:
    """Take what the node has sent."""
    sent, node.handle.sent = tuple(node.handle.sent), []
    return sent
