"""The value of one lock at this node: its programs' writes, one after the other, and their reads.

Rules of this file
------------------
* A write is done when its commit is durable (promise 4); each is made of the value before it.
* While a write's outcome is unknown nobody is told a value (engine rule 13).
* With `dead-value=invalid` there is no value from an exclusive holder's death until the next write,
  which begins with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dlmfs.engine import granting
from dlmfs.engine.view import View
from dlmfs.errors import DlmfsError, LockLost
from dlmfs.model import EMPTY_LVB, LVB_SIZE, DeadValue, Mode

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock, Done


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

    def read(self, done: Callable[[bytes], None], *, unsure: bool, frozen: bool) -> None:
        """`done` gets the value: now, or, if the outcome of a commit is `unsure` or nothing may be served
        now (`frozen`), by `answer_reads`."""
        if frozen or (unsure and self.writes):
            self._reads.append(done)
        else:
            done(self._value())

    def _value(self) -> bytes:
        return b"" if self._invalid() else self._view.head.lvb

    def _invalid(self) -> bool:
        view = self._view
        return view.head.abandoned is not None and view.space.dead_value is DeadValue.INVALID

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """Note that `data` is to be put at `offset`."""
        assert 0 <= offset < LVB_SIZE
        assert len(data) <= LVB_SIZE - offset
        self.writes.append(Write(offset, data, done))

    def next(self) -> bytes | None:
        """The value that the first write makes; None if the head has it already."""
        write, head = self.writes[0], self._view.head
        old = EMPTY_LVB if self._invalid() else head.lvb
        new = old[: write.offset] + write.data + old[write.offset + len(write.data) :]
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
            done(self._value())

    def lose(self, error: DlmfsError) -> None:
        """All that waits here ends."""
        writes, self.writes = self.writes, []
        for write in writes:
            write.done(error)
        self.answer_reads()


def step(lock: ClusterLock) -> None:
    """Commit the first write that waits."""
    mine = lock.view.mine()
    if mine is None or mine.level is not Mode.EX:
        finish(lock, LockLost("the exclusive lock was lost before the write"))
        return
    new = lock.value.next()
    if new is None:
        finish(lock, None)
    else:
        granting.put(lock, level=Mode.EX, lvb=new)


def finish(lock: ClusterLock, error: DlmfsError | None) -> None:
    """The first write is done without a commit, or has failed."""
    lock.value.written(error)
    lock.value.answer_reads()
    lock.resume()
