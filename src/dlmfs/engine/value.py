"""The value of one lock at this node: its programs' writes, one after the other, and their reads.

Rules of this file
------------------
* A write is done when its commit is durable (promise 4); each is made of the value before it.
* While a write's outcome is unknown nobody is told a value (engine rule 13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dlmfs.engine.view import View
from dlmfs.errors import DlmfsError
from dlmfs.model import LVB_SIZE

if TYPE_CHECKING:
    from dlmfs.engine.lock import Done


class Write(NamedTuple):
    offset: int
    data: bytes
    done: Done


class Value:
    """See the rules at the head of the file. `writes`: those that are not done yet."""

    __slots__ = ("_reads", "_view", "writes")

    def __init__(self, view: View) -> None:
        self._view = view
        self.writes: list[Write] = []
        self._reads: list[Callable[[bytes], None]] = []

    def read(self, done: Callable[[bytes], None], *, unsure: bool) -> None:
        """`done` gets the value: now, or, if the outcome of a commit is `unsure`, by `answer_reads`."""
        if unsure and self.writes:
            self._reads.append(done)
        else:
            done(self._view.head.lvb)

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """Note that `data` is to be put at `offset`."""
        assert 0 <= offset < LVB_SIZE
        assert len(data) <= LVB_SIZE - offset
        self.writes.append(Write(offset, data, done))

    def next(self) -> bytes | None:
        """The value that the first write makes; None if the head has it already."""
        write, head = self.writes[0], self._view.head
        new = head.lvb[: write.offset] + write.data + head.lvb[write.offset + len(write.data) :]
        if new == head.lvb and head.abandoned is None and self._view.head_revision:
            return None
        return new

    def written(self, error: DlmfsError | None) -> None:
        """The first write is done, or has failed."""
        self.writes.pop(0).done(error)

    def answer_reads(self) -> None:
        """It is known what the value is."""
        reads, self._reads = self._reads, []
        for done in reads:
            done(self._view.head.lvb)

    def lose(self, error: DlmfsError) -> None:
        """All that waits here ends."""
        writes, self.writes = self.writes, []
        for write in writes:
            write.done(error)
        self.answer_reads()
