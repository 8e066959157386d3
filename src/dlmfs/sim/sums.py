"""What is counted in a run, and summed over many.

Nothing of the product is imported here: a worker has this before a bug is planted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Sums:
    """`seconds` are simulated; `margin` is the least of any run (see `Checks.margin`)."""

    seconds: float = 0.0
    events: int = 0
    faults: int = 0
    grants: int = 0
    reads: int = 0
    writes: int = 0
    commits: int = 0
    judged: int = 0
    margin: float | None = None

    def add(self, other: Sums) -> None:
        """Take the counts of one or more runs in."""
        for name in NAMES:
            if name != "margin":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.margin is not None:
            self.margin = other.margin if self.margin is None else min(self.margin, other.margin)

    @staticmethod
    def of(told: dict[str, Any]) -> Sums:
        """Those among other things in a worker's line."""
        return Sums(**{name: told[name] for name in NAMES})


NAMES = tuple(field.name for field in fields(Sums))
