"""The exhaustive small-scope check: every interleaving of a few nodes of the real engine.

Breadth first, so the first violation found is a shortest one. A state that was seen is not explored
again: two are the same if all that can matter of them is (`snapshot.shape`), up to an order-preserving
renaming of revisions. A found violation is run once more from the start, on objects that were never
copied, before it is believed.
"""

from __future__ import annotations

import marshal
import time
from array import array
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from dlmfs.errors import Bug
from dlmfs.sim.exhaustive.choices import Explorer
from dlmfs.sim.exhaustive.scopes import SCOPES as SCOPES
from dlmfs.sim.exhaustive.story import Line, tell
from dlmfs.sim.exhaustive.world import OPTIONAL, Choice, Scope, World

ENDLESS: Final = "from here on it never comes to an end: a livelock"


@dataclass(frozen=True, slots=True)
class Limit:
    """When to stop without an end: seconds of the processor, and states."""

    seconds: float = 60.0
    states: int = 3_000_000


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong, and how it comes about."""

    problem: str
    choices: tuple[Choice, ...]
    story: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n".join([*self.story, f"==> {self.problem}"])


@dataclass(frozen=True, slots=True)
class Result:
    """`complete`: all states of the scope were explored, so that no violation is a proof."""

    states: int
    transitions: int
    complete: bool
    violation: Violation | None
    seconds: float


def fingerprint(explorer: Explorer, world: World) -> bytes:
    """The canonical name of the whole state, revisions renamed to their ranks."""
    names = explorer.names.names
    atoms: list[object] = []
    revisions: list[int] = []

    def add(number: int) -> None:
        atom, own = names[number]
        atoms.append(atom)
        revisions.extend(own)

    for number in world.nodes:
        if number < 0:
            atoms.append(number)
        else:
            add(number)
    add(world.server)
    for ledger in world.ledgers:
        add(ledger)
    for wire, told in zip(world.wire, world.told, strict=True):
        atoms.append((len(wire), len(told)))
        for message in wire:
            atoms.append(message[:2])
            add(message.payload)
        for batch in told:
            add(batch)
    for index, payload in world.late:
        atoms.append(index)
        add(payload)
    rank = {revision: i for i, revision in enumerate(sorted(set(revisions)))}
    ranks = [rank[revision] for revision in revisions]
    whole = marshal.dumps((atoms, tuple(world.budget), world.lives, world.leases, ranks), 2)
    return blake2b(whole, digest_size=16).digest()


class _Search:
    def __init__(self, scope: Scope) -> None:
        self.explorer = Explorer(scope)
        self.seen: dict[bytes, int] = {}
        self.met: dict[int, int] = {}
        self.parents = array("q")
        self.by = array("h")
        self.moves: list[Choice] = []
        self._numbers: dict[Choice, int] = {}
        self.transitions = 0
        self.queue: deque[tuple[int, World]] = deque()
        self.ends = bytearray()
        """By state: whether nothing need happen any more."""
        self.edges = array("q"), array("q")
        """From and to, of the steps that no fault and no signal takes."""

    def run(self, limit: Limit) -> tuple[bool, tuple[str, list[Choice]] | None]:
        """Whether everything was explored, and the first problem with the way to it."""
        start = time.process_time()
        explorer = self.explorer
        self.add(explorer.start(), -1, None)
        while self.queue:
            if len(self.seen) > limit.states or time.process_time() - start > limit.seconds:
                return False, None
            at, world = self.queue.popleft()
            choices = explorer.choices(world)
            problem = explorer.judge(world, choices)
            if problem:
                return False, (problem, self.way(at))
            self.ends[at] = all(choice.kind in OPTIONAL for choice in choices)
            for choice in choices:
                self.transitions += 1
                step = explorer.take(world, choice)
                if step.problem:
                    return False, (step.problem, [*self.way(at), choice])
                to = self.add(step.world, at, choice)
                if choice.kind not in OPTIONAL:
                    self.edges[0].append(at)
                    self.edges[1].append(to)
        endless = self.endless()
        return True, None if endless < 0 else (ENDLESS, self.way(endless))

    def endless(self) -> int:
        """The first state from which no way leads to an end, whatever the order; -1: there is none."""
        good, changed = bytearray(self.ends), True
        while changed:
            changed = False
            for at, to in zip(reversed(self.edges[0]), reversed(self.edges[1]), strict=True):
                if good[to] and not good[at]:
                    good[at] = changed = True
        return good.find(0)

    def add(self, world: World, parent: int, choice: Choice | None) -> int:
        """The number of the state; a new one will be explored."""
        # Steps that commute meet in the very same numbers; only who passes this is named. By 64 bits:
        # of a million states two are confused with a probability of one in ten million.
        exact = hash(world)
        known = self.met.get(exact)
        if known is None:
            name = fingerprint(self.explorer, world)
            known = self.met[exact] = self.seen.setdefault(name, len(self.parents))
        if known == len(self.parents):
            self.parents.append(parent)
            self.by.append(-1 if choice is None else self.number(choice))
            self.ends.append(0)
            self.queue.append((known, world))
        return known

    def number(self, choice: Choice) -> int:
        known = self._numbers.get(choice)
        if known is None:
            known = self._numbers[choice] = len(self.moves)
            self.moves.append(choice)
        return known

    def way(self, at: int) -> list[Choice]:
        out = []
        while self.parents[at] >= 0:
            out.append(self.moves[self.by[at]])
            at = self.parents[at]
        return out[::-1]


def check(scope: Scope, limit: Limit | None = None) -> Result:
    """Explore the scope. Raises Bug if a violation cannot be repeated on objects never copied."""
    start = time.process_time()
    search = _Search(scope)
    complete, found = search.run(limit or Limit())
    violation = None
    if found is not None:
        problem, choices = found
        story, again = tell(scope, choices)
        if problem not in (again, ENDLESS) and not problem.startswith("Traceback"):
            raise Bug(
                f"not repeated: {problem}; on the real objects: {again or 'nothing is wrong'}"
            )
        violation = Violation(problem, tuple(choices), tuple(story))
    seconds = time.process_time() - start
    return Result(len(search.seen), search.transitions, complete, violation, seconds)
