"""What happens in one run, drawn from its seed: the cluster, its faults, and the steps of the story.

A scenario is data. The same one gives the same run, so a failing one can be kept in a file, and made
smaller by leaving out steps and faults (`shrink`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, Final, NamedTuple

from dlmfs.model import DeadValue, HolderRule
from dlmfs.store.base import BOUNDS, Bounds
from dlmfs.store.memory_store import Faults

FORMAT: Final = 1

RATIO: Final = 1.45
"""Clock rates within the stated ratio (design: 1.49), the rounding of renewals left aside."""


class Step(NamedTuple):
    """After `after_s` seconds `verb` happens to node number `node`; `salt` seeds its details."""

    after_s: float
    verb: str
    node: int
    salt: int


PROGRAMS: Final = {
    "open": 30,
    "act": 40,
    "signal": 4,
    "kill": 2,
    "fork": 2,
    "unlink": 3,
    "rmdir": 1,
}
"""What programs do, and how often."""

STOPS: Final = ("stop", "stop", "storm")

TROUBLE: Final = (
    "crash",
    "cut",
    "cut-up",
    "cut-down",
    "heal",
    "pause",
    "suspend",
    "leader",
    "stale-leader",
    "compact",
    "break-watch",
    "umount",
    "evict",
    "full",
)
"""The faults that come by a step; `Faults` has those that come with messages."""

LEASES: Final = 0.1
"""The share of runs that are about leases alone: they need several faults in a row."""

LEASE_TROUBLE: Final = ("stale-leader", "stale-leader", "cut", "pause", "leader")

RESTORED: Final = 0.15
"""The share of runs in which the store is put back to a copy."""

BEYOND: Final = "freeze"
"""A virtual machine stopped together with its clocks: only tokens and values hold."""


@dataclass(frozen=True)
class Scenario:
    """`lenient`: clocks are beyond the stated ratio, or stand still with their machines; then tokens
    and values must hold, exclusion in time need not (design, promise 1)."""

    seed: int
    rules: tuple[str, ...]
    rates: tuple[float, ...]
    domains: int
    locks: int
    ttl_s: float
    leased: bool
    lock_delay_s: float
    provable: bool
    """A crashed node's end can be seen by its successor of the same name."""
    lenient: bool
    fitful: float
    nap_s: float
    faults: Faults
    steps: tuple[Step, ...]
    bounds: Bounds = BOUNDS
    dead_values: tuple[str, ...] = ()
    """By node, `dead-value=`; empty: it is kept everywhere."""
    transient: bool = False
    """Who opens a lock makes its file for that alone."""
    forget_s: float = 0.0
    """`forget=`; 0: not given."""

    @property
    def nodes(self) -> int:
        return len(self.rules)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Scenario:
        """Raises ValueError for another format."""
        record: dict[str, Any] = json.loads(text)
        if record.pop("format", None) != FORMAT:
            raise ValueError(f"this is not a scenario of format {FORMAT}")
        record["faults"] = Faults(**record["faults"])
        record["steps"] = tuple(Step(*step) for step in record["steps"])
        record["bounds"] = Bounds(*record.get("bounds", BOUNDS))
        for name in ("rules", "rates", "dead_values"):
            record[name] = tuple(record.get(name, ()))
        return Scenario(**record)


def _network(rng: Random) -> Faults:
    """Each fault may be absent, so that others show alone."""

    def chance(most: float) -> float:
        return rng.choice([0.0, 0.0, rng.uniform(0, most)])

    return Faults(
        delay_s=rng.choice([0.0, 0.001, 0.001, 0.02, 0.2]),
        watch_delay_s=rng.choice([0.0, 0.001, 0.001, 0.05, 0.5]),
        lose_request=chance(0.1),
        lose_answer=chance(0.1),
        apply_late=chance(0.1),
        repeat=chance(0.2),
    )


def _in_time(faults: Faults, seed: int) -> Faults:
    """In half of the runs the answer to a late request still counts: it was overtaken by others."""
    rng = Random(f"lateness {seed}")
    if rng.random() < 0.5:
        return faults
    return replace(faults, late_from_s=0.0, late_s=rng.choice([0.1, 1.0, 3.0]))


def _touched(steps: tuple[Step, ...], nodes: int, seed: int) -> tuple[Step, ...]:
    """In half of the runs files are made, too, that are not opened."""
    rng = Random(f"touches {seed}")
    share = rng.choice([0.0, 0.0, 0.05, 0.2])
    out: list[Step] = []
    for step in steps:
        if rng.random() < share:
            out.append(Step(0.0, "touch", rng.randrange(nodes), rng.randrange(1 << 32)))
        out.append(step)
    return tuple(out)


def _bounds(seed: int) -> Bounds:
    """In a third of the runs a commit is so small that few waiters, members and mails fit into one."""
    rng = Random(f"bounds {seed}")
    if rng.random() < 2 / 3:
        return BOUNDS
    return Bounds(rng.choice([6, 8, 10, 16]), rng.choice([1800, BOUNDS.size]))


def _stopped(steps: tuple[Step, ...], nodes: int, seed: int) -> tuple[Step, ...]:
    """In a third of the runs programs are stopped while they wait, and signalled while they write."""
    rng = Random(f"stops {seed}")
    if rng.random() < 2 / 3:
        return steps
    more = list(steps)
    for _ in range(len(steps) // 8):
        step = Step(0.0, rng.choice(STOPS), rng.randrange(nodes), rng.randrange(1 << 32))
        more.insert(rng.randrange(len(more)), step)
    return tuple(more)


def _dead_values(nodes: int, seed: int) -> tuple[str, ...]:
    rng = Random(f"dead values {seed}")
    if rng.random() < 0.5:
        return ()
    return tuple(rng.choice([dead.value for dead in DeadValue]) for _ in range(nodes))


UNUSED: Final = 0.2
"""The share of runs in which files go that nobody uses."""


def _unused(seed: int) -> tuple[bool, float]:
    rng = Random(f"housekeeping names {seed}")
    if rng.random() >= UNUSED:
        return False, 0.0
    return rng.choice([(True, 0.0), (True, 0.0), (True, 5.0), (False, 5.0)])


MEDDLING: Final = ("restore", "spoil")
"""What makes records say nothing of who was told what, and when."""

ENDS: Final = ("end", "abort", "evict", "end", "abort")
"""How a node ends by somebody's will, whatever its programs have open."""


def _ends(seed: int, nodes: int, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """In a quarter of the runs nodes are made to end, at some point of the story."""
    rng = Random(f"ends {seed}")
    if rng.random() >= 0.25:
        return steps
    story = list(steps)
    for _ in range(rng.choice([1, 2, 4])):
        end = Step(0.0, rng.choice(ENDS), rng.randrange(nodes), rng.randrange(1 << 32))
        story.insert(rng.randrange(len(story) // 4, len(story)), end)
    return tuple(story)


def _rates(rng: Random, nodes: int, *, lenient: bool) -> tuple[float, ...]:
    kind = rng.choice(["true", "near", "edge"])
    if lenient:
        return tuple(rng.choice([0.2, 0.5, 1.0, 2.0]) for _ in range(nodes))
    if kind == "true":
        return (1.0,) * nodes
    if kind == "near":
        return tuple(rng.uniform(0.98, 1.02) for _ in range(nodes))
    return tuple(rng.choice([1 / RATIO, 1.0, RATIO]) for _ in range(nodes))


def _steps(rng: Random, nodes: int, *, lenient: bool, leased: bool) -> tuple[Step, ...]:
    verbs = {verb: weight * rng.choice([0.3, 1, 1, 3]) for verb, weight in PROGRAMS.items()}
    trouble = [verb for verb in TROUBLE if rng.random() < 0.35]
    if lenient:
        trouble.append(BEYOND)
    if not leased:  # one host: no network to be cut, no leader to be changed
        embedded = {"crash", "pause", "suspend", "umount", "evict", "full", "compact"}
        trouble = [verb for verb in trouble if verb in embedded]
    share = rng.choice([0.0, 0.02, 0.05, 0.1])
    if leased and rng.random() < LEASES:
        trouble, share = list(LEASE_TROUBLE), 0.3
    share *= sum(verbs.values())
    for verb in trouble:
        verbs[verb] = verbs.get(verb, 0.0) + share / len(trouble)
    pace_s = rng.choice([0.001, 0.005, 0.05, 0.5, 5.0])
    names, weights = list(verbs), list(verbs.values())
    steps = []
    for _ in range(rng.choice([40, 80, 80, 160])):
        after = rng.choice([0.0, pace_s * 0.1, pace_s, rng.expovariate(1 / pace_s)])
        verb = rng.choices(names, weights)[0]
        steps.append(Step(round(after, 6), verb, rng.randrange(nodes), rng.randrange(1 << 32)))
    return tuple(steps)


BUGGY: Final = 0.3
"""The share of runs with exceptions in locks and requests."""


def _with_bugs(steps: tuple[Step, ...], nodes: int, seed: int) -> tuple[Step, ...]:
    """Drawn by itself: the other runs are what they were."""
    rng = Random(f"bugs {seed}")
    found = list(steps)
    if rng.random() < BUGGY:
        for _ in range(rng.choice([1, 2, 5])):
            step = Step(0.0, "bug", rng.randrange(nodes), rng.randrange(1 << 32))
            found.insert(rng.randrange(len(found) // 4, len(found)), step)
    return tuple(found)


def _more(steps: tuple[Step, ...], nodes: int, seed: int) -> tuple[Step, ...]:
    """What was thought of later, drawn by generators of its own."""
    more = _touched(_stopped(steps, nodes, seed), nodes, seed)
    return _with_bugs(more, nodes, seed)


def _restored(steps: tuple[Step, ...], seed: int, ttl_s: float) -> tuple[Step, ...]:
    """In some runs a copy is made, and the store put back to it: most often after so long that all
    nodes have seen a stamp of what came since."""
    rng = Random(f"restore {seed}")
    if rng.random() >= RESTORED:
        return steps
    begin = rng.randrange(len(steps))
    end = rng.randrange(begin, min(begin + 30, len(steps)))
    wait_s = rng.choice([0.0, 0.1, 0.8 * ttl_s, 0.8 * ttl_s, 1.5 * ttl_s])
    restore = [Step(wait_s, "restore", 0, rng.randrange(1 << 32))]
    if rng.random() < 0.2:
        restore.append(
            Step(rng.choice([0.1, ttl_s, 3 * ttl_s]), "restore", 0, rng.randrange(1 << 32))
        )
    return (
        *steps[:begin],
        Step(0.0, "copy", 0, rng.randrange(1 << 32)),
        *steps[begin:end],
        *restore,
        *steps[end:],
    )


def _spoilt(steps: tuple[Step, ...], seed: int) -> tuple[Step, ...]:
    """In an eighth of the runs records are overwritten with what nobody can read; not where a store goes
    back to a copy with such records, or where the nodes themselves fail."""
    rng = Random(f"spoilt {seed}")
    if rng.random() < 7 / 8 or {step.verb for step in steps} & {"restore", "bug"}:
        return steps
    more = list(steps)
    for _ in range(rng.choice([1, 2, 5, 10])):
        step = Step(rng.choice([0.0, 0.01, 1.0]), "spoil", 0, rng.randrange(1 << 32))
        more.insert(rng.randrange(len(more) + 1), step)
    return tuple(more)


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = Random(f"scenario {seed}")
    nodes = rng.choice([1, 2, 2, 2, 3, 3, 3, 4, 5, 7])
    leased = rng.random() < 0.85
    lenient = leased and rng.random() < 0.15
    kind = rng.choice(["node", "file", "mixed"])
    rules = tuple(
        rng.choice([rule.value for rule in HolderRule]) if kind == "mixed" else kind
        for _ in range(nodes)
    )
    faults = _in_time(_network(rng), seed)
    if not leased:
        faults = replace(faults, lose_request=0.0, lose_answer=0.0, apply_late=0.0, repeat=0.0)
    ttl_s = rng.choice([5.0, 15.0, 15.0, 60.0, 600.0])
    fitful = rng.choice([0.0, 0.0, rng.uniform(0, 0.02)])
    scenario = Scenario(
        seed=seed,
        rules=rules,
        rates=_rates(rng, nodes, lenient=lenient),
        domains=rng.choice([1, 1, 1, 2]),
        locks=rng.choice([1, 1, 2, 3]),
        ttl_s=ttl_s,
        leased=leased,
        lock_delay_s=rng.choice([0.0, 0.0, 0.0, ttl_s / 2]),
        provable=rng.random() < 0.5,
        lenient=lenient,
        fitful=fitful,
        nap_s=rng.choice([0.01, ttl_s * 0.3, ttl_s * 1.5]),
        faults=faults,
        steps=_more(_steps(rng, nodes, lenient=lenient, leased=leased), nodes, seed),
        bounds=_bounds(seed),
        dead_values=_dead_values(nodes, seed),
    )
    transient, forget_s = _unused(seed)
    scenario = replace(scenario, transient=transient, forget_s=forget_s)
    steps = _restored(scenario.steps, seed, ttl_s) if leased else scenario.steps
    steps = _spoilt(steps, seed)
    if {step.verb for step in steps}.isdisjoint(MEDDLING):
        steps = _ends(seed, nodes, steps)
    return replace(scenario, steps=steps)
