"""The way of the locks' transactions to the store: many of one turn share a commit (engine rule 3).

Rules of this file
------------------
* Every commit carries the guard "m/<me> still has my epoch" (engine rule 2).
* What comes back is told apart here, and lock by lock only if it was applied: an unknown outcome
  needs a new epoch first (rule 4), a guard that failed means an old epoch or a lost membership.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.engine.records import encode_news
from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown
from dlmfs.store.base import Compare, Get, KeyValue, Put, Txn, TxnResult, unchanged
from dlmfs.store.check import operations, size

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.engine.lockspace import Lockspace

BATCH_MAX: Final = 32
"""Locks per commit, as far as they fit: each takes an operation of the commit, and the one that takes
the most takes as many again."""

ROOM: Final = 512
"""Bytes of a commit that its guard may take."""

IN_FLIGHT_MAX: Final = 2
"""Commits under way at once: what comes meanwhile goes into the next ones together."""


class Part(NamedTuple):
    """One lock's transaction, and who gets the answer."""

    lock: ClusterLock
    txn: Txn
    done: Callable[[TxnResult], None]
    first_value: bool = False
    """It writes a value where there was none."""


class Sender:
    """See the rules at the head of the file."""

    def __init__(self, space: Lockspace) -> None:
        self._space = space
        self._queue: list[Part] = []
        self._flushing = False
        self._in_flight = 0

    def submit(self, part: Part) -> None:
        """Send one lock's transaction, with what else comes in this turn."""
        self._queue.append(part)
        if not self._flushing:
            self._flushing = True
            self._space.loop.call_soon(self._space.enter, self.flush)

    def flush(self) -> None:
        """Send what may go now. While the domain is not running: when the new epoch is in force, or
        the lease good again."""
        self._flushing = False
        space = self._space
        while self._queue and space.running and self._in_flight < IN_FLIGHT_MAX:
            self._in_flight += 1
            count = self._fitting()
            parts = self._queue[:count]
            del self._queue[:count]
            guard = unchanged(space.keys.mine, space.epoch)
            txn = Txn((guard,), tuple(p.txn for p in parts), (Get(space.keys.mine),))
            txn = self._with_news(txn, parts)
            space.commit(txn, partial(self._answered, parts))

    def _fitting(self) -> int:
        """How many of the first fit into one commit (engine rule 17): one at least."""
        bounds, deepest, total, news = self._space.store.bounds, 0, ROOM, False
        for count, part in enumerate(self._queue[:BATCH_MAX]):
            news |= part.first_value
            deepest = max(deepest, operations(part.txn))
            total += size(part.txn)
            total += len(encode_news([part.lock.name])) if part.first_value else 0
            if count and (count + 1 + news + deepest > bounds.operations or total > bounds.size):
                return count
        return min(len(self._queue), BATCH_MAX)

    def _with_news(self, txn: Txn, parts: list[Part]) -> Txn:
        """With word of first values, if some node wants to hear of them (`keeping`)."""
        locks = [part.lock.name for part in parts if part.first_value]
        if not locks:
            return txn
        keys = self._space.keys
        nobody = Compare(keys.files, "create", "=", 0, prefix=True)
        put = Put(keys.my_news, encode_news(locks), self._space.lease)
        return txn._replace(then=(*txn.then, Txn((nobody,), (), (put,))))

    def clear(self) -> None:
        """Forget what was not sent yet."""
        self._queue.clear()

    def drop(self, lock: ClusterLock) -> None:
        """Forget what one lock has not sent yet: its state was broken."""
        self._queue = [part for part in self._queue if part.lock is not lock]

    def _answered(self, parts: list[Part], result: TxnResult | DlmfsError) -> None:
        self._in_flight -= 1
        if not self._space.serving() or not self._space.live:
            return
        for part in parts:
            part.lock.answered()
        self._take_in(parts, result)
        if self._queue:
            self.flush()

    def _take_in(self, parts: list[Part], result: TxnResult | DlmfsError) -> None:
        if isinstance(result, OutcomeUnknown):
            for part in parts:
                part.lock.reread()
            self._space.revive()
        elif isinstance(result, LockLost):
            self._space.lose(str(result))
        elif isinstance(result, DlmfsError):
            for part in parts:
                part.lock.failed(result)
        elif not result.succeeded:
            self._guard_failed(result, parts)
        else:
            space = self._space
            space.newest = max(space.newest, result.revision)
            for part, response in zip(parts, result.responses, strict=False):  # news come last
                assert isinstance(response, TxnResult)
                part.lock.enter(part.done, response)

    def _guard_failed(self, result: TxnResult, parts: list[Part]) -> None:
        mine = result.responses[0]
        if not isinstance(mine, KeyValue) or mine.create_revision != self._space.incarnation:
            self._space.lose("the membership record was removed from the store")
            return
        # Sent under the old epoch: surely not applied. What it was to tell has to be asked for again:
        # a look that was due when it was sent is noted nowhere else.
        for part in parts:
            part.lock.reread()
            part.lock.resume()
        if mine.mod_revision != self._space.epoch:  # a put by another hand that looks like ours
            self._space.revive()
