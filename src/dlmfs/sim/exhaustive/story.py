"""A way through the choices told for people, on real objects that are never copied."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dlmfs.sim.exhaustive.choices import Explorer, Step
from dlmfs.sim.exhaustive.oracle import Data
from dlmfs.sim.exhaustive.snapshot import BASE
from dlmfs.sim.exhaustive.world import Choice, Scope, World

Line = str


def tell(scope: Scope, choices: Sequence[Choice]) -> tuple[list[Line], str]:
    """The lines, and what is wrong at their end; empty: nothing."""
    explorer = Explorer(scope, copying=False)
    world = explorer.start()
    lines: list[Line] = []
    problem = ""
    for number, choice in enumerate(choices, 1):
        assert not problem, problem
        assert choice in explorer.choices(world), choice
        what = _what(explorer, world, choice)
        before = world
        step = explorer.take(world, choice)
        world, problem = step.world, step.problem
        lines.append(f"{number:3}. {what}")
        lines.extend(f"       {more}" for more in _more(explorer, before, step))
    if not problem:
        problem = explorer.judge(world, explorer.choices(world))
    return lines, problem


def _what(explorer: Explorer, world: World, choice: Choice) -> str:
    kind, index, which = choice
    node = explorer.node_names[index]
    if kind in ("act", "interrupt"):
        program = explorer.program(index, world, which)
        step = program.step if kind == "act" else program.steps[program.at - 1]
        assert step is not None
        word = f"{'try-' if step.trying else ''}{step.verb} {step.lock.decode()}"
        return f"{node}: program {which}: {'a signal ends ' if kind == 'interrupt' else ''}{word}"
    return {
        "soon": f"{node}: the loop runs what is due",
        "timer": f"{node}: a timer fires",
        "hasty": f"{node}: a timer fires early",
        "apply": f"store: applies {node}'s transaction",
        "late": f"store: applies {node}'s transaction of which nobody hears",
        "answer": f"{node}: the answer comes",
        "lose": f"{node}: no answer comes: unknown",
        "watch": f"{node}: the watch tells the next batch",
        "gap": f"{node}: the watch ends with a gap",
        "die": f"{node}: dies",
        "expire": f"store: {node}'s lease ends",
        "rejoin": f"{node}: begins a new life",
    }[kind]


def _more(explorer: Explorer, before: World, step: Step) -> Iterator[Line]:
    old, new = explorer.data(before), explorer.data(step.world)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield f"{key.decode()} = {_value(new, key)}"
    for seen in step.effects.seen:
        yield f"program {seen.program} sees: {seen.what} {seen.lock.decode()} {seen.mode.name}"
    for a, b in zip(before.nodes, step.world.nodes, strict=True):
        if b >= 0 and a >= 0:
            was, now = dict(explorer.facts[a].levels), dict(explorer.facts[b].levels)
            for lock, level in now.items():
                if was.get(lock, 0) != level:
                    yield f"level of {lock.decode()}: {level.name}"


def _value(data: Data, key: bytes) -> str:
    kv = data.get(key)
    if kv is None:
        return "none"
    created, changed = kv.create_revision - BASE, kv.mod_revision - BASE
    value = re.sub(r"\d{9,}", lambda found: str(int(found[0]) - BASE), kv.value.decode())
    return f"{value} (created at {created}, changed at {changed})"
