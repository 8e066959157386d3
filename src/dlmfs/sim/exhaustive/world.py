"""What the exhaustive check is about: scopes, choices, and states as tuples of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from dlmfs.model import HolderRule
from dlmfs.sim.exhaustive.actors import parse
from dlmfs.sim.exhaustive.snapshot import shape
from dlmfs.store.base import BOUNDS, Bounds

DEAD: Final = -3
"""In place of a node's state: it is gone, its lease stands."""
GONE: Final = -2
"""... and so is its lease."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What there is to explore: a name, the programs of each node (`actors.parse`), and how much may
    go wrong. Faults come at any moment, or never."""

    name: str
    scripts: tuple[tuple[str, ...], ...]
    rule: HolderRule = HolderRule.NODE
    losses: int = 0
    """Answers that do not come; the transaction is applied before, later, or never."""
    deaths: int = 0
    rejoins: int = 0
    """A faulty node's last program is not for its first life, but for the next."""
    gaps: int = 0
    """Watches that end since the store's log was trimmed."""
    hasty: int = 0
    """Timers that fire although messages are under way."""
    before: tuple[tuple[int, int], ...] = ()
    """Steps that are taken first, each by a program of a node, with time for all that follows: the
    interleavings begin behind them."""
    faulty: tuple[int, ...] | None = None
    """Whom faults may hit; None: everybody."""
    operations: int = BOUNDS.operations
    """How many of them the store takes in one transaction."""
    quick: bool = False

    @property
    def bounds(self) -> Bounds:
        return Bounds(operations=self.operations)

    def may_fail(self, index: int) -> bool:
        return self.faulty is None or index in self.faulty

    @property
    def nodes(self) -> int:
        return len(self.scripts)

    @property
    def locks(self) -> tuple[bytes, ...]:
        programs = (program for node in self.scripts for program in node)
        return tuple(sorted({s.lock for text in programs for s in parse(text)}))


class Choice(NamedTuple):
    """One thing that may happen now: `kind`, to which node, and which of several."""

    kind: str
    node: int
    which: int = 0


OPTIONAL: Final = frozenset({"die", "rejoin", "lose", "gap", "hasty", "late", "interrupt"})
"""What may also never happen: nobody's progress may depend on it."""


class Budget(NamedTuple):
    deaths: int
    rejoins: int
    losses: int
    gaps: int
    hasty: int


class Message(NamedTuple):
    """A transaction under way (`payload` is the Txn's number) or its answer (the result's)."""

    slot: int
    answered: bool
    payload: int


class World(NamedTuple):
    """A state of everything, in numbers of `Explorer`."""

    nodes: tuple[int, ...]
    lives: tuple[int, ...]
    leases: tuple[int, ...]
    server: int
    wire: tuple[tuple[Message, ...], ...]
    late: tuple[tuple[int, int], ...]
    """Transactions of which nobody will hear: node, payload."""
    told: tuple[tuple[int, ...], ...]
    """Batches that each node's watch has yet to deliver."""
    budget: Budget
    ledgers: tuple[int, ...]


class Names:
    """Numbers for things, and their canonical names."""

    def __init__(self) -> None:
        self.things: list[Any] = [None]
        self.names: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        self._numbers: dict[object, int] = {}
        self._atoms: dict[object, int] = {}

    def named(self, thing: object, atoms: object, revisions: tuple[int, ...]) -> int:
        self.things.append(thing)
        self.names.append((self._atoms.setdefault(atoms, len(self._atoms) + 1), revisions))
        return len(self.things) - 1

    def number(self, thing: object) -> int:
        """Of an immutable thing."""
        number = self._numbers.get(thing)
        if number is None:
            number = self._numbers[thing] = self.named(thing, *shape(thing))
        return number
