"""One node's way to a `MemoryServer`: the store contract over a network with every fault.

What the network does is drawn from a seeded generator: a request or its answer is late, lost or
comes twice, a transaction is applied after its sender was told "unknown", the watch lags or breaks,
the node is cut off in one direction or both.

Rules of this file
------------------
* A request is served at most once, however often it arrives, and its sender hears of it once: a
  transport does this by its sequence numbers, and the contract (`base`) asks for it.
* What the server does happens on the server's clock, what the node does on the node's machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Final

from dlmfs.core.lease import Renewal
from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown, StoreFull, Unavailable
from dlmfs.store.base import Session, Txn, TxnDone, TxnResult, WatchBatch, WatchGap
from dlmfs.store.check import check, writes
from dlmfs.store.memory import MemoryServer
from dlmfs.timing import Clock, Scheduler, Timer, Timing

RECONNECT_S: Final = 0.5
RETRY_S: Final = 0.2
CLOSE_MAX_S: Final = 1.0


@dataclass
class Faults:
    """What the network does. Probabilities per request; delays in seconds, drawn evenly."""

    delay_s: float = 0.001
    watch_delay_s: float = 0.001
    lose_request: float = 0.0
    lose_answer: float = 0.0
    apply_late: float = 0.0
    repeat: float = 0.0
    late_from_s: float = 1.0
    """How late a late request is at least: no sooner than its sender gives up, or as little as none."""
    late_s: float = 5.0
    timeout_s: float = 1.0
    full: bool = False


def _no_lag() -> float:
    return 0.0


class _Request:
    """One request under way. `answer` is filled in at the server, when it first arrives."""

    __slots__ = ("answer", "done", "serve", "served", "timer")

    def __init__(self, serve: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.serve = serve
        self.served = False
        self.answer: Any = None
        self.done: Callable[[Any], None] | None = done
        self.timer: Timer


class MemoryStore:
    """One node's handle. After `crash` nothing is ever called back.

    `machine` and `clock` are the node's own; `lag` is how many seconds (of true time) behind the
    present whatever it sends now is really sent, since its machine stands still in between.
    `leased`: sessions run out; otherwise a crash ends them at once, as in the embedded engine.
    """

    def __init__(
        self,
        server: MemoryServer,
        rng: Random | None = None,
        faults: Faults | None = None,
        *,
        machine: Scheduler | None = None,
        clock: Clock | None = None,
        lag: Callable[[], float] = _no_lag,
        leased: bool = True,
    ) -> None:
        self.server = server
        self.bounds = server.bounds
        self.network = server.loop
        self.rng = rng or Random(0)
        self.faults = faults or Faults()
        self.machine = machine or server.loop
        self.clock = clock or self.machine.time
        self.lag = lag
        self.leased = leased
        self.up = self.down = True
        """Whether messages get to the server, and from it."""
        self.stale = False
        """One member is a former leader that does not know that it is none any more: it answers
        renewals, and cannot serve a read before it hears from the others."""
        self.connection = 1
        """Counts the node's moves from member to member."""
        self._held: list[_Request] = []
        """Reads that the former leader cannot serve yet."""
        self.dead = False
        self.mishaps = 0
        """Messages that were lost, late or repeated."""
        self.watches: list[MemoryWatch] = []
        self.session: MemorySession | None = None
        self._lease = 0

    # -- faults -----------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.up and self.down

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """Nothing gets through any more, in either direction or in one."""
        self.up &= not up
        self.down &= not down

    def heal(self) -> None:
        self.up = self.down = True
        for watch in self.watches:
            watch.pull()

    def break_watches(self, seconds: float = RECONNECT_S) -> None:
        """The watches' streams end, and come back behind what they delivered last."""
        for watch in self.watches:
            watch.broken = True
            self.network.call_later(seconds, watch.resume)

    def refresh(self) -> None:
        """The former leader hears from the others."""
        self.stale = False
        held, self._held = self._held, []
        for request in held:
            self.network.call_later(self._delay(), self._arrive, request, False)

    def crash(self) -> None:
        """The node dies: its lease runs out by itself."""
        self.dead = True
        self.close()
        if not self.leased:
            self.network.call_later(self._delay(), self.server.expire, self._lease)

    def _delay(self) -> float:
        return self.rng.uniform(0, self.faults.delay_s)

    # -- messages ---------------------------------------------------------------------------

    def ask(
        self,
        serve: Callable[[], Any],
        done: Callable[[Any], None],
        timeout_s: float | None = None,
        *,
        hold: bool = False,
    ) -> None:
        """Have the server do something; `done` gets its result, or OutcomeUnknown after `timeout_s`.
        `hold`: it waits at the former leader."""
        faults, draw = self.faults, self.rng.random()
        request = _Request(serve, done)
        patience = faults.timeout_s if timeout_s is None else timeout_s
        request.timer = self.machine.call_later(patience, self._done, request, None)
        if not self.up or draw < faults.lose_request:
            self.mishaps += 1
            return
        if hold:
            self._held.append(request)
            return
        draw -= faults.lose_request
        late = (
            faults.late_from_s + self.rng.uniform(0, faults.late_s)
            if draw < faults.apply_late
            else 0.0
        )
        draw -= faults.apply_late
        lost = not late and draw < faults.lose_answer
        again = faults.repeat > 0 and self.rng.random() < faults.repeat
        self.mishaps += (late > 0) + again
        for _ in range(1 + again):
            delay = self.lag() + (late or self._delay())
            self.network.call_later(delay, self._arrive, request, lost)

    def _arrive(self, request: _Request, lost: bool) -> None:
        # What a node had sent before it died may still arrive; on one host there is nothing in between.
        gone = self.dead and (not self.leased or self.rng.random() < 0.5)
        if not self.server.available or not self.up or gone:
            return
        if not request.served:
            request.served = True
            request.answer = request.serve()
        if lost:
            self.mishaps += 1
        else:
            self.machine.call_later(self._delay(), self._answered, request)

    def _answered(self, request: _Request) -> None:
        if self.down:
            self._done(request, request)

    def _done(self, request: _Request, answered: _Request | None) -> None:
        done, request.done = request.done, None
        if done is None or self.dead:
            return
        request.timer.cancel()
        done(OutcomeUnknown("no answer from the store") if answered is None else answered.answer)

    # -- the contract -----------------------------------------------------------------------

    def txn(self, txn: Txn, done: TxnDone) -> None:
        check(txn, self.bounds)
        self.ask(lambda: self._apply(txn), done)

    def _apply(self, txn: Txn) -> TxnResult | DlmfsError:
        try:
            if self.faults.full and writes(txn):
                return StoreFull("the store is full")
            return self.server.apply(txn)
        except LockLost as error:
            return error

    def watch(
        self,
        prefixes: Sequence[bytes],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> MemoryWatch:
        watch = MemoryWatch(self, tuple(prefixes), from_revision, sink)
        self.watches.append(watch)
        self.server.watchers.append(watch.pull)
        watch.pull()
        return watch

    def open_session(
        self,
        node: str,
        ttl_s: float,
        lost: Callable[[DlmfsError], None],
        done: Callable[[Session | DlmfsError], None],
    ) -> None:
        server, sent = self.server, self.clock()

        def grant() -> tuple[int, int]:
            self._lease = server.grant(node, ttl_s if self.leased else None)
            return self._lease, server.term

        def granted(answer: tuple[int, int] | OutcomeUnknown) -> None:
            if isinstance(answer, OutcomeUnknown):
                done(Unavailable("the store cannot be reached"))
                return
            lease, term = answer
            renewal = Renewal(sent, term, self.connection) if self.leased else None
            self.session = MemorySession(self, lease, ttl_s, lost, renewal=renewal)
            done(self.session)

        self.ask(grant, granted)

    def end_session(self, lease: int, done: Callable[[DlmfsError | None], None]) -> None:
        self.ask(lambda: self.server.expire(lease), done)

    def lease_left(self, lease: int, done: Callable[[float | DlmfsError | None], None]) -> None:
        self.ask(lambda: self.server.left(lease), done)

    def describe(self) -> dict[str, object]:
        return {"store": "memory", "connected": self.connected}

    def size_mb(self) -> float:
        return 0.0

    def close(self) -> None:
        for watch in list(self.watches):
            watch.cancel()
        if self.session is not None:
            self.session.abandon()


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
        if self.cancelled or self.broken or store.dead or not store.down:
            return
        server = store.server
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
        self.ended = False
        self._at_stale = False
        self._every = Timing(ttl_s).renew_every_s
        self._timer: Timer | None = None
        if renewal is not None:
            self._timer = store.machine.call_later(self._every, self._renew)

    @property
    def renewed_at(self) -> float | None:
        return None if self.renewal is None else self.renewal.renewed_at

    def _renew(self) -> None:
        if self.ended or self.store.dead:
            return
        store, sent = self.store, self.store.clock()
        # Through which member, where it matters: it may be another one for the renewal than it was for
        # the read before, and another one for the read after.
        stale = store.stale and store.rng.random() < 0.7
        if stale != self._at_stale:
            store.connection += 1
        self._at_stale = stale
        through = store.connection

        def kept(alive: bool | OutcomeUnknown) -> None:
            if isinstance(alive, OutcomeUnknown):
                self._moved_on()
                return
            if self._at_stale and store.rng.random() < 0.3:
                self._at_stale = False
                store.connection += 1
            hold = self._at_stale and store.stale
            done = partial(self._confirmed, sent, through, alive)
            store.ask(self._look, done, self._every, hold=hold)

        store.ask(lambda: store.server.keep_alive(self.lease, stale=stale), kept, self._every)

    def _look(self) -> tuple[int, bool]:
        """The read that confirms: under which leader, and whether the lease is there."""
        server = self.store.server
        return server.term, self.lease in server.leases

    def _moved_on(self) -> None:
        """No answer: the next attempt goes to the next member."""
        self.store.connection += 1
        self._again(RETRY_S)

    def _confirmed(
        self, sent: float, through: int, alive: bool, answer: tuple[int, bool] | OutcomeUnknown
    ) -> None:
        if self.ended:
            return
        if isinstance(answer, OutcomeUnknown):
            self._moved_on()
            return
        term, there = answer
        if not alive or not there:
            self.ended = True
            self.lost(LockLost("the lease has ended in the store"))
            return
        assert self.renewal is not None
        unbroken = through if through == self.store.connection else None
        good = self.renewal.confirmed(sent, term, unbroken)
        self._again(max(0.0, self._every - (self.store.clock() - sent)) if good else 0.0)

    def _again(self, delay: float) -> None:
        if not self.ended:
            self._timer = self.store.machine.call_later(delay, self._renew)

    def abandon(self) -> None:
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        self.abandon()
        server = self.store.server
        self.store.ask(lambda: server.expire(self.lease), lambda _answer: done(None), CLOSE_MAX_S)
