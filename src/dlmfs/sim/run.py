"""One run of one scenario, and what came of it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dlmfs.sim.cluster import Cluster
from dlmfs.sim.scenario import Scenario
from dlmfs.sim.sums import Sums


@dataclass(kw_only=True)
class Outcome(Sums):
    """`failure` is None for a run in which every promise was kept; `rule` names what was not: the check,
    or the place in the product whose invariant was broken."""

    seed: int
    failure: str | None = None
    rule: str = ""
    history: list[str] = field(default_factory=list)


@contextmanager
def quiet() -> Iterator[None]:
    """Nodes are fenced by the thousand here; their log is for other readers."""
    log = logging.getLogger("dlmfs")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def run(scenario: Scenario, *, trace: bool = False) -> Outcome:
    """Run it to its end, or to the first broken promise. The same scenario gives the same outcome."""
    outcome = Outcome(seed=scenario.seed)
    with quiet():
        cluster = Cluster(scenario, trace=trace)
        try:
            cluster.run()
        except Exception as error:  # an invariant of the product is a finding like any other
            outcome.failure = str(error) or repr(error)
            outcome.rule = _rule(error)
    checks = cluster.checks
    outcome.seconds, outcome.events = cluster.loop.time(), cluster.loop.steps
    outcome.faults = cluster.injected + sum(node.network_faults() for node in cluster.nodes)
    outcome.grants, outcome.reads, outcome.writes = checks.grants, checks.reads, checks.writes
    outcome.commits, outcome.judged = cluster.oracle.commits, checks.judged
    outcome.margin = checks.margin
    outcome.history = cluster.trace or []
    return outcome


def _rule(error: Exception) -> str:
    """The function that found it: as good a name as any, and one that can be looked up."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.name.startswith("_fail")
    ]
    return frames[-1].name.strip("_") if frames else type(error).__name__
