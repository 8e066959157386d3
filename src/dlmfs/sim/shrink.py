"""Make a failing scenario small: leave out steps, then faults, then nodes, while it still fails alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from dlmfs.sim.scenario import Scenario, Step
from dlmfs.store.memory_store import Faults

Fails = Callable[[Scenario], bool]


def shrink(scenario: Scenario, fails: Fails, tries: int = 400) -> tuple[Scenario, int]:
    """The smallest failing scenario found, and the number of runs that it took, `tries` at most."""
    used = 0

    def still(candidate: Scenario) -> bool:
        nonlocal used
        used += 1
        return fails(candidate)

    changed = True
    while changed and used < tries:
        changed = False
        for candidate in _smaller(scenario):
            if used >= tries:
                break
            if still(candidate):
                scenario, changed = candidate, True
                break
    return scenario, used


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Candidates, the boldest first."""
    steps = scenario.steps
    size = len(steps) // 2
    while size:
        for start in range(0, len(steps), size):
            yield replace(scenario, steps=steps[:start] + steps[start + size :])
        size //= 2
    if len(steps) == 1:
        yield replace(scenario, steps=())
    yield from _calmer(scenario)
    yield from _fewer(scenario)


def _calmer(scenario: Scenario) -> Iterator[Scenario]:
    plain = Faults()
    for fault in fields(Faults):
        value = getattr(plain, fault.name)
        if getattr(scenario.faults, fault.name) != value:
            yield replace(scenario, faults=replace(scenario.faults, **{fault.name: value}))
    if scenario.fitful:
        yield replace(scenario, fitful=0.0)
    if set(scenario.rates) != {1.0}:
        yield replace(scenario, rates=(1.0,) * scenario.nodes)
    if scenario.lock_delay_s:
        yield replace(scenario, lock_delay_s=0.0)
    if scenario.ttl_s != 15.0:
        yield replace(scenario, ttl_s=15.0)


def _fewer(scenario: Scenario) -> Iterator[Scenario]:
    if scenario.locks > 1:
        yield replace(scenario, locks=1)
    if scenario.domains > 1:
        yield replace(scenario, domains=1)
    for gone in range(scenario.nodes if scenario.nodes > 1 else 0):
        keep = [number for number in range(scenario.nodes) if number != gone]
        steps = tuple(
            Step(step.after_s, step.verb, keep.index(step.node), step.salt)
            for step in scenario.steps
            if step.node != gone
        )
        yield replace(
            scenario,
            owners=tuple(scenario.owners[number] for number in keep),
            rates=tuple(scenario.rates[number] for number in keep),
            steps=steps,
        )
