"""Scenarios like a given one: other draws, other times, a step more or less.

What a run meets hangs on every draw of the network, and these move with each message that the engine
sends otherwise. So a kept scenario may stop to show its fault though the fault would still be caught:
then some neighbour shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from dlmfs.sim.scenario import Scenario, Step


def neighbours(scenario: Scenario, count: int) -> Iterator[Scenario]:
    """The scenario itself first, then `count` others, always the same ones."""
    yield scenario
    rng = Random(scenario.to_json())
    for number in range(count):
        steps = [_another(rng, step, times=number % 3 > 0) for step in scenario.steps]
        if number % 3 == 2 and len(steps) > 1:
            place = rng.randrange(len(steps))
            if rng.random() < 0.5:
                steps.insert(place, rng.choice(steps))
            else:
                steps.pop(place)
        yield replace(scenario, seed=rng.randrange(10**6), steps=tuple(steps))


def _another(rng: Random, step: Step, *, times: bool) -> Step:
    if rng.random() < 0.5:
        step = step._replace(salt=rng.randrange(2**32))
    if times and rng.random() < 0.4:
        step = step._replace(after_s=step.after_s * rng.choice([0, 0.3, 0.5, 0.8, 1.2, 2, 3, 8]))
    return step
