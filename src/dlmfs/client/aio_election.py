"""Elections for asyncio: the same names as `dlmfs.client.election`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

from dlmfs.client.aio import Lock, begin_block
from dlmfs.client.ballot import Ballot, said

R = TypeVar("R")


class Election(Ballot[Lock]):
    """`async with Election("jobs/leader", "web1") as lead:` leads for the block, alone in the cluster.

    `lock` is the lock that makes it the leader: its `lost`, `wanted` and `wait_lost` are of use. If it
    is lost the block is cancelled and raises LockLost.
    """

    _kind = Lock

    async def campaign(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Stand for election until elected. Arguments, return and errors as of `Lock.acquire`."""
        if not await self.lock.acquire(blocking, timeout):
            return False
        try:
            await self._announce()
        except BaseException:
            self.lock.release()
            raise
        return True

    async def _announce(self) -> None:
        async with Lock(self._word, mount=self._mount) as word:
            self.lock.check()
            if said(await word.get_value())[0] < self.lock.token:
                await word.set_value(self._says(self.lock.token))

    async def run(self, work: Callable[[Self], Awaitable[R]]) -> R:
        """Stand for election, and when elected do `work`, which is given this object; then resign. What
        it returns. Raises LockLost if the leadership was lost meanwhile, and as `campaign`."""
        async with self:
            return await work(self)

    async def leader(self) -> str | None:
        """The leader's name; None: there is none now. It may be out of date when it is here."""
        if self.lock.held:
            return self.name
        async with Lock(self._word, shared=True, mount=self._mount) as word:
            _, name = said(await word.get_value())
        return name if await self.lock.locked() else None

    async def __aenter__(self) -> Self:
        await self.campaign()
        begin_block(self.lock)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Resign. Raises LockLost if the leadership was lost, unless something else is raised."""
        await self.lock.__aexit__(kind, error, trace)
