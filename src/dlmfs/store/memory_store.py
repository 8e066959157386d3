"""One node's way to a `MemoryServer`: the store contract over a network with every fault.

What the network does is drawn from a seeded generator: a request or its answer is late, lost or
comes twice, a transaction is applied after its sender was told "unknown", the watch lags or breaks,
the node is cut off in one direction or both.

Rules of this file
------------------
* A request is served at most once, however often it arrives, and its sender hears of it once: a
  transport does this by its sequence numbers, and the contract (`base`) asks for it.
* What the server does happens on the server's clock, what the node does on the node's machine.
* A connection is to one process of the server. A request that was not answered in time ends it, and so
  does that process's end; with a witness nothing is believed then before a look (`base`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from dlmfs.core.lease import Renewal
from dlmfs.errors import (
    DlmfsError,
    LockLost,
    OutcomeUnknown,
    StoreFull,
    StoreRestored,
    Unavailable,
)
from dlmfs.store.base import (
    Session,
    Txn,
    TxnDone,
    TxnResult,
    WatchBatch,
    WatchGap,
    Witness,
)
from dlmfs.store.check import check, writes
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_session import MemorySession, MemoryWatch
from dlmfs.timing import Clock, Scheduler, Timer

RECONNECT_S: Final = 0.5


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

    __slots__ = ("answer", "done", "life", "serve", "served", "through", "timer")

    def __init__(
        self, serve: Callable[[], Any], done: Callable[[Any], None], life: int, through: int
    ) -> None:
        self.serve = serve
        self.life = life
        self.through = through
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
        self.life = server.life
        """The process of the server that the connection is to."""
        self.seen = 0
        self.floor = 0
        """No answer of this session may name a revision below."""
        self._witness: Witness | None = None
        self.doubted = False
        self._flying: set[_Request] = set()
        self._waiting: list[Callable[[], None]] = []
        """Transactions that wait for trust."""
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
        request = _Request(serve, done, self.life, self.connection)
        self._flying.add(request)
        patience = faults.timeout_s if timeout_s is None else timeout_s
        request.timer = self.machine.call_later(patience, self._silent, request)
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
        if request.life != self.server.life:  # nobody is there any more at the other end
            self.machine.call_later(self._delay(), self.broken, request.through)
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

    def _silent(self, request: _Request) -> None:
        """It was not answered in time."""
        if request.done is not None:
            self._done(request, None)
            self.broken(request.through)

    def _done(self, request: _Request, answered: _Request | None) -> None:
        done, request.done = request.done, None
        self._flying.discard(request)
        if done is None or self.dead:
            return
        request.timer.cancel()
        done(OutcomeUnknown("no answer from the store") if answered is None else answered.answer)

    # -- connections --------------------------------------------------------------------------

    def restarted(self) -> None:
        """The server's process is another one: who is connected hears of that."""
        if self.connected and not self.dead:
            self.machine.call_later(self._delay(), self.broken, self.connection)

    def broken(self, connection: int) -> None:
        """That connection is of no use any more; the next one may lead to another store."""
        if connection != self.connection or self.dead:
            return
        self.life = self.server.life
        if self._witness is None:
            return
        self.connection += 1
        self.doubted = True
        self._witness.doubt()
        for request in list(self._flying):
            self._done(request, None)
        if self.session is not None:
            self.session.hurry()

    def trust(self, connection: int) -> None:
        """The witness has looked through that connection, and found nothing amiss."""
        if connection == self.connection and self.doubted and self._witness is not None:
            self.doubted = False
            self._witness.trust()
            self._go_on()

    def let_go(self, session: MemorySession) -> None:
        """A session is over: nothing is known that could be doubted."""
        if self.session is session:
            self._witness, self.doubted = None, False
            self._go_on()

    def _go_on(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            request()
        for watch in list(self.watches):
            watch.pull()

    def heard(self, revision: int, floor: int) -> StoreRestored | None:
        """An answer names a revision; one of `floor` was known when it was asked for."""
        self.seen = max(self.seen, revision)
        if revision >= floor:
            self.floor = max(self.floor, revision)
            return None
        self.floor = 0
        error = StoreRestored(f"the store went back from revision {floor} to {revision}")
        if self.session is not None:
            self.session.lose(error)
        return error

    # -- the contract -----------------------------------------------------------------------

    def txn(self, txn: Txn, done: TxnDone) -> None:
        check(txn, self.bounds)
        if self.doubted:
            self._wait(txn, done)
            return
        floor = self.floor

        def answered(result: TxnResult | DlmfsError) -> None:
            error = self.heard(result.revision, floor) if isinstance(result, TxnResult) else None
            done(error or result)

        self.ask(lambda: self._apply(txn), answered)

    def _wait(self, txn: Txn, done: TxnDone) -> None:
        """For trust; at most as long as an answer may take."""
        over = False

        def end() -> None:
            nonlocal over
            if not over and not self.dead:
                over = True
                done(OutcomeUnknown("the connection was lost, and the store is not proved yet"))

        def go() -> None:
            nonlocal over
            if not over and not self.dead:
                over = True
                timer.cancel()
                self.txn(txn, done)

        timer = self.machine.call_later(self.faults.timeout_s, end)
        self._waiting.append(go)

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
        witness: Witness | None = None,
    ) -> None:
        server, sent = self.server, self.clock()
        self.floor = 0

        def grant() -> tuple[int, int, int]:
            self._lease = server.grant(node, ttl_s if self.leased else None)
            return self._lease, server.term, server.revision

        def granted(answer: tuple[int, int, int] | OutcomeUnknown) -> None:
            if isinstance(answer, OutcomeUnknown):
                done(Unavailable("the store cannot be reached"))
                return
            lease, term, born = answer
            renewal = Renewal(sent, term, self.connection) if self.leased else None
            self.session = MemorySession(self, lease, ttl_s, lost, renewal=renewal)
            if self.leased:
                self.session.born = born
                self.session.witness = self._witness = witness
            done(self.session)

        self.ask(grant, granted)

    def end_session(self, lease: int, done: Callable[[DlmfsError | None], None]) -> None:
        self.ask(lambda: self.server.expire(lease), done)

    def kill_stopped(self, lease: int) -> bool:  # noqa: ARG002 - no process of its own
        return False

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
