"""Elections for programs with threads: see `ballot` for how they are made of locks."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from dlmfs.client.ballot import Ballot, said
from dlmfs.client.sync import Lock

R = TypeVar("R")


class Election(Ballot[Lock]):
    """`with Election("jobs/leader", "web1") as lead:` leads for the block, alone in the cluster.

    `lock` is the lock that makes it the leader: its `lost`, `wanted` and `wait_lost` are of use.
    """

    _kind = Lock

    def campaign(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Stand for election until elected. Arguments, return and errors as of `Lock.acquire`."""
        if not self.lock.acquire(blocking, timeout):
            return False
        try:
            self._announce()
        except BaseException:
            self.lock.release()
            raise
        return True

    def _announce(self) -> None:
        with Lock(self._word, mount=self._mount) as word:
            self.lock.check()
            if said(word.get_value())[0] < self.lock.token:
                word.set_value(self._says(self.lock.token))

    def run(self, work: Callable[[Self], R]) -> R:
        """Stand for election, and when elected do `work`, which is given this object; then resign. What
        it returns. Raises LockLost if the leadership was lost meanwhile, and as `campaign`."""
        with self:
            return work(self)

    def leader(self) -> str | None:
        """The leader's name; None: there is none now. It may be out of date when it is here."""
        if self.lock.held:
            return self.name
        with Lock(self._word, shared=True, mount=self._mount) as word:
            _, name = said(word.get_value())
        return name if self.lock.locked() else None

    def __enter__(self) -> Self:
        self.campaign()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Resign. Raises LockLost if the leadership was lost, unless something else is raised."""
        self.lock.__exit__(kind, error, trace)
