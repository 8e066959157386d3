"""A small cluster in which every pending thing is a choice: nodes of the real engine, the store's exact
semantics, and between them everything that can be late, out of order, lost, or dead.

Why it is fast
--------------
A node's step depends on its own state and on what comes to it, the store's on its data and the
transaction. So each such step runs once, on a thawed copy of the real object; afterwards it is a look
into a table, and a state of the world is a tuple of numbers. The explorer can also run without copies
(`copying=False`): that is how a violation is told and proved, and how the copies are tested.

Two reductions, both without loss:

* *A flush is sent at once* where nothing can come between, with one lock and no gap to come: the
  transaction is built already, one lock has one at a time, and what `Lockspace._flush` looks at
  changes only by the answer to that very transaction. Nobody but the store sees a flush, and the
  store only when it applies the transaction, which is a choice of its own.
* *A lost transaction that can never apply is dropped*: it demands of a key a modification revision
  that the key no longer has, and revisions do not come again.
"""

from __future__ import annotations

import traceback
from typing import Any, Final, NamedTuple

from dlmfs.engine.lockspace import Lockspace
from dlmfs.errors import LockLost, OutcomeUnknown
from dlmfs.model import Owner
from dlmfs.sim.exhaustive import oracle
from dlmfs.sim.exhaustive.actors import (
    SPECIAL,
    Clock,
    Facts,
    Node,
    NoTime,
    Program,
    Seen,
    facts,
    parse,
)
from dlmfs.sim.exhaustive.oracle import Ledger
from dlmfs.sim.exhaustive.promises import exclusion, stuck, unheard
from dlmfs.sim.exhaustive.snapshot import BASE, freeze, shape, thaw
from dlmfs.sim.exhaustive.world import (
    DEAD,
    GONE,
    OPTIONAL,
    Budget,
    Choice,
    Message,
    Names,
    Scope,
    World,
)
from dlmfs.store.base import Txn, WatchBatch, WatchGap
from dlmfs.store.memory import MemoryServer, writes

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


class Step(NamedTuple):
    world: World
    problem: str
    effects: Effects


class Explorer:
    """The choices in a world, and what each leads to. Everything here is a function of the world."""

    def __init__(self, scope: Scope, *, copying: bool = True, names: Names | None = None) -> None:
        self.scope = scope
        self.names = names or Names()
        self.node_names = [f"n{i}" for i in range(scope.nodes)]
        self.facts: dict[int, Facts] = {}
        self._states: dict[object, int] = {}
        self._steps: dict[object, tuple[int, Effects]] = {}
        self._served: dict[object, Served] = {}
        self._seen_batches: dict[tuple[int, tuple[bytes, ...]], int] = {}
        self._moved: dict[object, tuple[int, str]] = {}
        self._live: dict[object, Any] | None = None if copying else {}
        self._at_once = len(scope.locks) < 2 and not scope.gaps

    # -- real objects and their numbers ---------------------------------------------------------

    def _put(self, key: object, thing: Node | MemoryServer) -> int:
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

    def _node(self, index: int, number: int) -> Node:
        node = thaw(self.names.things[number]) if self._live is None else self._live[index]
        assert isinstance(node, Node)
        return node

    def _server(self, number: int) -> MemoryServer:
        server = thaw(self.names.things[number][0]) if self._live is None else self._live["server"]
        assert isinstance(server, MemoryServer)
        return server

    def program(self, index: int, world: World, number: int) -> Program:
        """A program of a node, to be looked at."""
        return self._node(index, world.nodes[index]).programs[number]

    def alive(self, world: World) -> dict[str, Facts]:
        """What is known of the nodes that live, by name."""
        pairs = zip(self.node_names, world.nodes, strict=True)
        return {name: self.facts[number] for name, number in pairs if number >= 0}

    def judge(self, world: World, choices: list[Choice]) -> str:
        """What is wrong with a world in which these are the choices; empty: nothing."""
        if all(choice.kind in OPTIONAL for choice in choices):
            return stuck(self.alive(world), self.data(world))
        if self.is_quiet(world):
            return unheard(self.alive(world), self.data(world), self.scope.locks)
        return ""

    def data(self, world: World) -> oracle.Data:
        found: oracle.Data = self.names.things[world.server][1]
        return found

    # -- the steps of a node and of the store ---------------------------------------------------

    def _step(self, index: int, number: int, kind: str, payload: int = 0, slot: int = 0) -> Any:
        key = (index, number, kind, payload, slot)
        known = self._steps.get(key) if self._live is None else None
        if known is None:
            node = self._node(index, number)
            effects = self._run(node, kind, payload, slot)
            known = self._steps[key] = self._put(index, node), effects
        return known

    def _run(self, node: Node, kind: str, payload: int, slot: int) -> Effects:
        problem = ""
        try:
            self._event(node, kind, self.names.things[payload] if kind != "act" else None, slot)
            while self._at_once and node.clock.soon and _is_flush(node.clock):
                node.clock.run_soon()
        except Exception:  # a broken invariant of the engine is what we look for
            problem = traceback.format_exc(limit=-4)
        sent, node.handle.sent = tuple(node.handle.sent), []
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

    def _serve(self, number: int, index: int, payload: int, kind: str) -> Served:
        """Apply a transaction, or end the lease `payload`."""
        key = (number, index, payload, kind)
        known = self._served.get(key) if self._live is None else None
        if known is not None:
            return known
        server = self._server(number)
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
        known = Served(self._put("server", server), result, batch, problem, values)
        self._served[key] = known
        return known

    # -- the start --------------------------------------------------------------------------------

    def start(self) -> World:
        """Everybody has joined and knows it."""
        count, scope = self.scope.nodes, self.scope
        budget = Budget(scope.deaths, scope.rejoins, scope.losses, scope.gaps, scope.hasty)
        nothing: tuple[Any, ...] = ((),) * count
        ledgers = tuple(self.names.number(Ledger()) for _ in scope.locks)
        server = self._put("server", MemoryServer(NoTime(), BASE))
        world = World(
            (GONE,) * count,
            (0,) * count,
            (0,) * count,
            server,
            nothing,
            (),
            nothing,
            budget,
            ledgers,
        )
        for index in range(count):
            world = self._begin(world, index)
            world = self._settled(world)
        world = world._replace(lives=(0,) * count)
        for index, program in scope.before:
            step = self.take(world, Choice("act", index, program))
            assert not step.problem, step.problem
            world = self._settled(step.world)
        return world

    def _settled(self, world: World) -> World:
        """The world when all that is under way has happened, in the plainest order."""
        plain = ("apply", "answer", "watch", "soon")
        while busy := next((c for c in self.choices(world) if c.kind in plain), None):
            world, problem, _ = self.take(world, busy)
            assert not problem, problem
        return world

    def _programs(self, index: int, life: int) -> list[Program]:
        scope = self.scope
        returns = scope.rejoins and scope.may_fail(index)
        programs = [Program(i, parse(text)) for i, text in enumerate(scope.scripts[index])]
        for program in programs:
            if returns and (program is programs[-1]) != bool(life):
                program.at = len(program.steps)
        return programs

    def _begin(self, world: World, index: int) -> World:
        programs = self._programs(index, world.lives[index])
        served = self._serve(world.server, index, 0, "grant")
        node = Node(self.node_names[index], index, served.result, self.scope.owner, programs)
        leases = _set(world.leases, index, served.result)
        world = world._replace(server=served.server, leases=leases)
        sent = _taken(node)
        return self._sent(_with_node(world, index, self._put(index, node)), index, sent)

    # -- choices ----------------------------------------------------------------------------------

    def choices(self, world: World) -> list[Choice]:
        out: list[Choice] = []
        for index, number in enumerate(world.nodes):
            if number == DEAD:
                out.append(Choice("expire", index))
            elif number == GONE:
                if world.budget.rejoins and world.lives[index]:
                    out.append(Choice("rejoin", index))
            else:
                self._of_node(world, index, out)
        timers = [i for i, n in enumerate(world.nodes) if n >= 0 and self.facts[n].timer]
        if timers and self.is_quiet(world):
            out.extend(Choice("timer", index) for index in timers)
        elif world.budget.hasty:
            out.extend(Choice("hasty", index) for index in timers)
        out.extend(Choice("late", it[0], place) for place, it in enumerate(world.late))
        return out

    def _of_node(self, world: World, index: int, out: list[Choice]) -> None:
        known, budget = self.facts[world.nodes[index]], world.budget
        may_fail = self.scope.may_fail(index)
        if known.soon:
            out.append(Choice("soon", index))
        for message in world.wire[index]:
            out.append(Choice("answer" if message.answered else "apply", index, message.slot))
            if budget.losses and may_fail:
                out.append(Choice("lose", index, message.slot))
        if known.watching is not None:
            if world.told[index]:
                out.append(Choice("watch", index))
            if budget.gaps and may_fail:
                out.append(Choice("gap", index))
        out.extend(Choice("act", index, p) for p in known.acts)
        out.extend(Choice("interrupt", index, p) for p in known.interrupts)
        if budget.deaths and may_fail:
            out.append(Choice("die", index))

    def is_quiet(self, world: World) -> bool:
        """Whether no message and no call is under way, only programs and timers."""
        if DEAD in world.nodes or any(world.wire):
            return False
        for index, number in enumerate(world.nodes):
            if number >= 0:
                known = self.facts[number]
                if known.soon or (known.watching is not None and world.told[index]):
                    return False
        return True

    # -- taking one -----------------------------------------------------------------------------

    def take(self, world: World, choice: Choice) -> Step:
        kind, index, _ = choice
        effects = Effects()
        problem = ""
        if kind in ("apply", "expire", "late"):
            world, problem = self._at_store(world, choice)
        elif kind == "die":
            world = self._die(world, index)
        elif kind == "rejoin":
            world = self._rejoin(world, index)
        else:
            world, payload, slot, kind = self._arrive(world, choice)
            before = self.facts[world.nodes[index]].watching
            number, effects = self._step(index, world.nodes[index], kind, payload, slot)
            world = self._sent(_with_node(world, index, number), index, effects.sent)
            if (now := self.facts[number].watching) != before:
                world = self._watch_changed(world, index)
                assert now is None or now is not before
            problem = effects.problem
            for seen in effects.seen:
                world, what = self._note(world, seen, index)
                problem = problem or what
        return Step(
            world, problem or exclusion([self.facts[n] for n in world.nodes if n >= 0]), effects
        )

    def _arrive(self, world: World, choice: Choice) -> tuple[World, int, int, str]:
        """Take the thing that comes to a node off its way: payload, slot, and the node's event."""
        kind, index, which = choice
        budget = world.budget
        payload = 0
        if kind in ("answer", "lose"):
            message = next(m for m in world.wire[index] if m.slot == which)
            rest = tuple(m for m in world.wire[index] if m.slot != which)
            world = world._replace(wire=_set(world.wire, index, rest))
            payload = message.payload
            if kind == "lose":
                budget = budget._replace(losses=budget.losses - 1)
                if not message.answered:
                    world = self._now_late(world, [(index, payload)])
                payload = 0
        elif kind == "watch":
            payload = world.told[index][0]
            world = world._replace(told=_set(world.told, index, world.told[index][1:]))
        elif kind == "gap":
            budget = budget._replace(gaps=budget.gaps - 1)
            world = world._replace(told=_set(world.told, index, ()))
            which = self.names.names[world.server][1][0] + 1
        elif kind == "hasty":
            budget, kind = budget._replace(hasty=budget.hasty - 1), "timer"
        return world._replace(budget=budget), payload, which, kind

    def _at_store(self, world: World, choice: Choice) -> tuple[World, str]:
        kind, index, which = choice
        if kind == "expire":
            served = self._serve(world.server, index, world.leases[index], kind)
            world = world._replace(nodes=_set(world.nodes, index, GONE))
        elif kind == "late":
            served = self._serve(world.server, index, world.late[which][1], kind)
            late = (*world.late[:which], *world.late[which + 1 :])
            world = world._replace(late=late)
        else:
            wire = world.wire[index]
            place = next(i for i, m in enumerate(wire) if m.slot == which)
            served = self._serve(world.server, index, wire[place].payload, kind)
            answer = Message(which, True, served.result)
            world = world._replace(wire=_set(world.wire, index, _set(wire, place, answer)))
        world = world._replace(server=served.server)
        if served.batch:
            told = (self._tell(world, i, served.batch) for i in range(self.scope.nodes))
            world = world._replace(told=tuple(told))
            world = self._now_late(world._replace(late=()), list(world.late))
        for lock, value in served.values:
            at = self.scope.locks.index(lock)
            ledger = oracle.committed(self.names.things[world.ledgers[at]], value)
            world = world._replace(ledgers=_set(world.ledgers, at, self.names.number(ledger)))
        return world, served.problem

    def _tell(self, world: World, index: int, batch: int) -> tuple[int, ...]:
        """What a node's watch has to deliver after a commit. Before it watches: everything."""
        told, number = world.told[index], world.nodes[index]
        if number < 0:
            return ()
        watching = self.facts[number].watching
        if watching is not None:
            batch = self._filtered(batch, watching.prefixes)
        elif not self.facts[number].to_watch:
            return ()
        return (*told, batch) if batch else told

    def _filtered(self, batch: int, prefixes: tuple[bytes, ...]) -> int:
        known = self._seen_batches.get((batch, prefixes))
        if known is None:
            whole = self.names.things[batch]
            assert isinstance(whole, WatchBatch)
            events = tuple(e for e in whole.events if e.kv.key.startswith(prefixes))
            known = self.names.number(WatchBatch(whole.revision, events)) if events else 0
            self._seen_batches[batch, prefixes] = known
        return known

    def _watch_changed(self, world: World, index: int) -> World:
        watching = self.facts[world.nodes[index]].watching
        kept: tuple[int, ...] = ()
        if watching is not None:
            first, things = watching.from_revision, self.names.things
            late = (b for b in world.told[index] if things[b].revision >= first)
            kept = tuple(b for b in (self._filtered(b, watching.prefixes) for b in late) if b)
        return world._replace(told=_set(world.told, index, kept))

    def _sent(self, world: World, index: int, sent: tuple[tuple[int, Txn], ...]) -> World:
        if not sent:
            return world
        new = tuple(Message(slot, False, self.names.number(txn)) for slot, txn in sent)
        wire = tuple(sorted((*world.wire[index], *new)))
        return world._replace(wire=_set(world.wire, index, wire))

    def _now_late(self, world: World, late: list[tuple[int, int]]) -> World:
        data = self.data(world)
        kept = [it for it in late if not _never(self.names.things[it[1]], data)]
        return world._replace(late=(*world.late, *kept))

    def _die(self, world: World, index: int) -> World:
        """The node's machine stops; what it had sent may still be applied."""
        sent = [(index, m.payload) for m in world.wire[index] if not m.answered]
        world = world._replace(
            nodes=_set(world.nodes, index, DEAD),
            lives=_set(world.lives, index, world.lives[index] + 1),
            wire=_set(world.wire, index, ()),
            told=_set(world.told, index, ()),
            budget=world.budget._replace(deaths=world.budget.deaths - 1),
        )
        return self._now_late(world, sent)

    def _rejoin(self, world: World, index: int) -> World:
        budget = world.budget._replace(rejoins=world.budget.rejoins - 1)
        world = world._replace(budget=budget)
        return self._begin(world, index)

    def _note(self, world: World, seen: Seen, index: int) -> tuple[World, str]:
        at = self.scope.locks.index(seen.lock)
        key = (world.ledgers[at], seen, index)
        known = self._moved.get(key)
        if known is None:
            shared = self.scope.owner is Owner.NODE
            ledger = self.names.things[world.ledgers[at]]
            after, problem = oracle.saw(ledger, seen, index, shared=shared)
            known = self._moved[key] = self.names.number(after), problem
        return world._replace(ledgers=_set(world.ledgers, at, known[0])), known[1]


def _is_flush(clock: Clock) -> bool:
    callback = clock.soon[0].callback
    return getattr(callback, "__func__", None) is Lockspace._flush  # noqa: SLF001


def _taken(node: Node) -> tuple[tuple[int, Txn], ...]:
    sent, node.handle.sent = tuple(node.handle.sent), []
    return sent


def _set(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _with_node(world: World, index: int, number: int) -> World:
    return world._replace(nodes=_set(world.nodes, index, number))


def _never(txn: Txn, data: oracle.Data) -> bool:
    """Whether the transaction can change nothing any more, whatever else happens."""
    if writes(Txn((), txn.otherwise)):
        return False
    for compare in txn.compares:
        kv = data.get(compare.key)
        if compare.op == "=" and compare.field == "mod" and compare.value and not compare.prefix:
            if kv is None or kv.mod_revision != compare.value:
                return True
    return not writes(txn)
