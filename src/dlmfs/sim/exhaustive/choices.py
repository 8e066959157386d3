"""A small cluster in which every pending thing is a choice: nodes of the real engine, the store's exact
semantics, and between them everything that can be late, out of order, lost, or dead.

A state of the world is a tuple of numbers; what a node or the store makes of a choice is looked up in
`steps`. One reduction, without loss: a lost transaction that can never apply is dropped. It demands of a
key a modification revision that the key no longer has, and revisions do not come again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dlmfs.model import HolderRule
from dlmfs.sim.exhaustive import oracle
from dlmfs.sim.exhaustive.actors import Facts, Node, NoTime, Program, Seen, parse
from dlmfs.sim.exhaustive.oracle import Ledger
from dlmfs.sim.exhaustive.promises import exclusion, stuck, unheard
from dlmfs.sim.exhaustive.snapshot import BASE
from dlmfs.sim.exhaustive.steps import Effects, Table, taken
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
from dlmfs.store.base import Txn, WatchBatch
from dlmfs.store.check import writes
from dlmfs.store.memory import MemoryServer


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
        at_once = len(scope.locks) < 2 and not scope.gaps
        self._table = Table(self.names, self.node_names, copying=copying, at_once=at_once)
        self.facts = self._table.facts
        self._seen_batches: dict[tuple[int, tuple[bytes, ...]], int] = {}
        self._moved: dict[object, tuple[int, str]] = {}

    # -- looking at a world ---------------------------------------------------------------------

    def program(self, index: int, world: World, number: int) -> Program:
        """A program of a node, to be looked at."""
        return self._table.node(index, world.nodes[index]).programs[number]

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

    # -- the start --------------------------------------------------------------------------------

    def start(self) -> World:
        """Everybody has joined and knows it."""
        count, scope = self.scope.nodes, self.scope
        budget = Budget(scope.deaths, scope.rejoins, scope.losses, scope.gaps, scope.hasty)
        nothing: tuple[Any, ...] = ((),) * count
        ledgers = tuple(self.names.number(Ledger()) for _ in scope.locks)
        server = self._table.put("server", MemoryServer(NoTime(), BASE, scope.bounds))
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
        served = self._table.serve(world.server, index, 0, "grant")
        scope = self.scope
        name, rule = self.node_names[index], scope.rule
        node = Node(name, index, served.result, rule, programs, bounds=scope.bounds)
        leases = _set(world.leases, index, served.result)
        world = world._replace(server=served.server, leases=leases)
        sent = taken(node)
        return self._sent(_with_node(world, index, self._table.put(index, node)), index, sent)

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
            number, effects = self._table.step(index, world.nodes[index], kind, payload, slot)
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
            served = self._table.serve(world.server, index, world.leases[index], kind)
            world = world._replace(nodes=_set(world.nodes, index, GONE))
        elif kind == "late":
            served = self._table.serve(world.server, index, world.late[which][1], kind)
            late = (*world.late[:which], *world.late[which + 1 :])
            world = world._replace(late=late)
        else:
            wire = world.wire[index]
            place = next(i for i, m in enumerate(wire) if m.slot == which)
            served = self._table.serve(world.server, index, wire[place].payload, kind)
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
            shared = self.scope.rule is HolderRule.NODE
            ledger = self.names.things[world.ledgers[at]]
            after, problem = oracle.saw(ledger, seen, index, shared=shared)
            known = self._moved[key] = self.names.number(after), problem
        return world._replace(ledgers=_set(world.ledgers, at, known[0])), known[1]


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
