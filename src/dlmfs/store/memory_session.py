"""What a `MemoryStore` hands out: watches and sessions, over the node's network as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.core.lease import Renewal
from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown, StoreRestored
from dlmfs.store.base import TIMELINE, KeyValue, Look, WatchBatch, WatchGap, Witness
from dlmfs.timing import Timer, Timing

if TYPE_CHECKING:
    from dlmfs.store.memory_store import MemoryStore

RETRY_S: Final = 0.2
CLOSE_MAX_S: Final = 1.0


class MemoryWatch:
    """Delivers the history behind the node's network: late, in order, without gaps or repeats."""

    def __init__(
        self,
        store: MemoryStore,
        prefixes: tuple[bytes, ...],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> None:
        self.store = store
        self.prefixes = prefixes
        self.next = from_revision
        self.sink = sink
        self.cancelled = False
        self.broken = False
        self._pending = False

    def pull(self) -> None:
        """Something may have happened: fetch it after the network's delay."""
        if not self._pending and not self.cancelled and not self.broken:
            self._pending = True
            delay = self.store.rng.uniform(0, self.store.faults.watch_delay_s)
            self.store.machine.call_later(delay, self._deliver)

    def resume(self) -> None:
        """The stream is there again."""
        self.broken = False
        self.pull()

    def _deliver(self) -> None:
        self._pending = False
        store = self.store
        if self.cancelled or self.broken or store.dead or not store.down or store.doubted:
            return
        server = store.server
        if store.life != server.life:
            return  # its end is on the way
        if self.next <= server.compacted:
            self.cancel()
            self.sink(WatchGap(server.compacted + 1))
            return
        for batch in server.since(self.next):
            if self.cancelled:
                return
            self.next = batch.revision + 1
            events = tuple(e for e in batch.events if e.kv.key.startswith(self.prefixes))
            if events:
                self.sink(WatchBatch(batch.revision, events))
                if store.rng.random() < 0.3:  # the rest comes as a packet of its own
                    self.pull()
                    return

    def cancel(self) -> None:
        self.cancelled = True
        if self in self.store.watches:
            self.store.watches.remove(self)
            self.store.server.watchers.remove(self.pull)


class MemorySession:
    """A lease kept alive over the node's network, each renewal confirmed as on etcd."""

    def __init__(
        self,
        store: MemoryStore,
        lease: int,
        ttl_s: float,
        lost: Callable[[DlmfsError], None],
        *,
        renewal: Renewal | None,
    ) -> None:
        self.store = store
        self.ttl_s = ttl_s
        self.lost = lost
        self.lease = lease
        self.renewal = renewal
        self.witness: Witness | None = None
        self.born = 0
        self.ended = False
        self._at_stale = False
        self._every = Timing(ttl_s).renew_every_s
        self._timer: Timer | None = None
        if renewal is not None:
            self._timer = store.machine.call_later(self._every, self._renew)

    @property
    def renewed_at(self) -> float | None:
        return None if self.renewal is None else self.renewal.renewed_at

    @property
    def seen(self) -> int:
        return self.store.seen

    def hurry(self) -> None:
        """Look at once: the connection was lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._again(0.0)

    def _renew(self) -> None:
        self._timer = None
        if self.ended or self.store.dead:
            return
        store, sent = self.store, self.store.clock()
        # Through which member, where it matters: it may be another one for the renewal than it was for
        # the read before, and another one for the read after.
        stale = store.stale and store.rng.random() < 0.7
        if stale != self._at_stale:
            self._move(stale=stale)
        through = store.connection
        patience = store.faults.timeout_s if store.doubted else self._every

        def kept(alive: bool | OutcomeUnknown) -> None:
            if isinstance(alive, OutcomeUnknown):
                self._moved_on(through)
                return
            if self._at_stale and store.rng.random() < 0.3:
                self._move(stale=False)
            hold = self._at_stale and store.stale
            keys = tuple(self.witness.keys()) if self.witness is not None else ()
            done = partial(self._confirmed, sent, (through, store.floor), alive=alive)
            store.ask(partial(self._look, keys), done, patience, hold=hold)

        store.ask(lambda: store.server.keep_alive(self.lease, stale=stale), kept, patience)

    def _move(self, *, stale: bool) -> None:
        """To another member."""
        self._at_stale = stale
        if self.witness is None:
            self.store.connection += 1
        else:
            self.store.broken(self.store.connection)

    def _look(self, keys: Sequence[bytes]) -> tuple[int, Look]:
        """The read that confirms: under which leader, and what the witness wants to see."""
        server = self.store.server
        lease = server.leases.get(self.lease)
        mine = lease is not None and (self.witness is None or lease.born == self.born)
        timeline = [kv for key, kv in server.data.items() if key.startswith(TIMELINE)]
        found: list[KeyValue | None] = [server.data.get(key) for key in keys]
        return server.term, Look(mine, tuple(timeline), tuple(found), server.revision)

    def _moved_on(self, through: int) -> None:
        """No answer: the next attempt goes to the next member."""
        if self.witness is None:
            self.store.connection += 1
        elif through == self.store.connection:
            self.store.broken(through)
        self._again(RETRY_S)

    def _confirmed(
        self,
        sent: float,
        asked: tuple[int, int],
        answer: tuple[int, Look] | OutcomeUnknown,
        *,
        alive: bool,
    ) -> None:
        """`asked`: through which connection, and when no revision below which was to be expected."""
        through, floor = asked
        if self.ended:
            return
        if isinstance(answer, OutcomeUnknown):
            self._moved_on(through)
            return
        term, look = answer
        error = self._judge(term, floor, look._replace(mine=look.mine and alive))
        if self.ended:
            return
        if error is not None and not isinstance(error, OutcomeUnknown):
            self.lose(error)
            return
        assert self.renewal is not None
        unbroken = through if through == self.store.connection and error is None else None
        good = self.renewal.confirmed(sent, term, unbroken)
        if unbroken is not None:
            self.store.trust(unbroken)
        self._again(max(0.0, self._every - (self.store.clock() - sent)) if good else 0.0)

    def _judge(self, term: int, floor: int, look: Look) -> DlmfsError | None:
        if self.witness is None:
            return None if look.mine else LockLost("the lease has ended in the store")
        assert self.renewal is not None
        if term < self.renewal.ruled:
            return StoreRestored("the store went back to an earlier raft term")
        return self.store.heard(look.revision, floor) or self.witness.judge(look)

    def _again(self, delay: float) -> None:
        if not self.ended:
            self._timer = self.store.machine.call_later(delay, self._renew)

    def lose(self, error: DlmfsError) -> None:
        """It is over."""
        if not self.ended:
            self.abandon()
            self.lost(error)

    def abandon(self) -> None:
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self.store.let_go(self)

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        self.abandon()
        server = self.store.server
        self.store.ask(lambda: server.expire(self.lease), lambda _answer: done(None), CLOSE_MAX_S)
