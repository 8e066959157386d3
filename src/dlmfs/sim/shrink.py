"""Make a failing scenario small: leave out steps, then faults, then nodes, while it still fails alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

from dlmfs.sim.scenario import Scenario, Step
from dlmfs.store.memory_store import Faults

Fails = Callable[[Scenario], bool]
Smaller = Callable[[Scenario], Iterator[Scenario]]


def shrink(scenario: Scenario, fails: Fails, tries: int = 600) -> tuple[Scenario, int]:
    """The smallest failing scenario found, and the number of runs that it took, `tries` at most."""
    used = 0

    def smallest(scenario: Scenario, smaller: Smaller) -> Scenario:
        """As long as one of the candidates fails, go on with its own."""
        nonlocal used
        found: Scenario | None = scenario
        while found is not None:
            scenario, found = found, None
            for candidate in smaller(scenario):
                if used >= tries:
                    break
                used += 1
                if fails(candidate):
                    found = candidate
                    break
        return scenario

    before = None
    while scenario != before:
        before = scenario
        scenario = smallest(scenario, _fewer)
        size = max(1, len(scenario.steps) // 2)
        while size:
            scenario = smallest(scenario, partial(_shorter, size))
            size //= 2
        scenario = smallest(scenario, _calmer)
    return scenario, used


def _shorter(size: int, scenario: Scenario) -> Iterator[Scenario]:
    """Without `size` steps in a row."""
    steps = scenario.steps
    for start in range(0, len(steps), size):
        yield replace(scenario, steps=steps[:start] + steps[start + size :])


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
            rules=tuple(scenario.rules[number] for number in keep),
            rates=tuple(scenario.rates[number] for number in keep),
            steps=steps,
        )
