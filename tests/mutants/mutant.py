"""What a mutant is: a replacement in one file, and the tests that notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `file` (below src/dlmfs); with `new` in its place one of `tests`, each
    a file or function that pytest understands, fails. `what`: what a user would feel of it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    what: str

    def applied(self, source: str) -> str:
        """The faulty source. Raises ValueError if the text is not there exactly once."""
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"mutant {self.name}: its text is {found} times in {self.file}")
        return source.replace(self.old, self.new)
