"""The store for tests and simulation: exact semantics, and every fault on command.

`MemoryServer` is the cluster's memory; `MemoryStore` is one node's way to it. Between them lies a
network whose faults are drawn from a seeded generator: a request or its answer is late or lost, a
transaction is applied after its sender was told "unknown", the watch lags, the node is cut off,
the lease runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from dlmfs.errors import Bug, DlmfsError, LockLost, OutcomeUnknown, StoreFull, Unavailable
from dlmfs.store.base import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Op,
    Put,
    Range,
    Response,
    Session,
    Txn,
    TxnDone,
    TxnResult,
    WatchBatch,
    WatchGap,
)
from dlmfs.timing import Scheduler, Timer

RECONNECT_S: Final = 0.5


@dataclass
class Faults:
    """What the network does. Probabilities per transaction; delays in seconds, drawn evenly."""

    delay_s: float = 0.001
    watch_delay_s: float = 0.001
    lose_request: float = 0.0
    lose_answer: float = 0.0
    apply_late: float = 0.0
    late_s: float = 5.0
    timeout_s: float = 1.0
    full: bool = False


def writes(txn: Txn) -> bool:
    """Whether any branch of the transaction changes anything."""
    return any(
        isinstance(op, (Put, Delete)) or (isinstance(op, Txn) and writes(op))
        for op in (*txn.then, *txn.otherwise)
    )


def _targets(ops: Iterable[Op]) -> set[bytes]:
    """The keys that the operations may change; Bug if two that can both run change one key.

    etcd refuses such a request ("duplicate key given in txn request").
    """
    seen: set[bytes] = set()
    for op in ops:
        if isinstance(op, (Put, Delete)):
            mine = {op.key}
        elif isinstance(op, Txn):
            mine = _targets(op.then) | _targets(op.otherwise)
        else:
            continue
        if mine & seen:
            raise Bug(f"a transaction changes the key {min(mine & seen)!r} twice")
        seen |= mine
    return seen


def check(txn: Txn) -> None:
    """Raises Bug for a transaction that no store may accept."""
    _targets(txn.then)
    _targets(txn.otherwise)


@dataclass
class _Lease:
    node: str
    ttl_s: float
    renewed: float
    keys: set[bytes] = field(default_factory=set)
    timer: Timer | None = None


class MemoryServer:
    """The data, its history and its leases. All calls are instantaneous and definite."""

    def __init__(self, loop: Scheduler, start_revision: int = 0) -> None:
        self.loop = loop
        self.revision = start_revision
        self.data: dict[bytes, KeyValue] = {}
        self.history: list[WatchBatch] = []
        self.compacted = start_revision
        self.leases: dict[int, _Lease] = {}
        self.watchers: list[Callable[[], None]] = []
        self.commits = 0
        self._next_lease = 1

    # -- transactions ------------------------------------------------------------------------

    def apply(self, txn: Txn) -> TxnResult:
        """Raises LockLost if it names a lease that has ended; nothing is applied then."""
        check(txn)
        before = self.data
        self._check_leases(txn, before)
        after = dict(before) if writes(txn) else before
        events: list[Event] = []
        revision = self.revision + 1
        succeeded, responses = self._run(txn, before, after, revision, events)
        if events:
            self.data = after
            self._commit(revision, events)
        return _stamp(TxnResult(succeeded, 0, responses), self.revision)

    def _check_leases(self, txn: Txn, before: dict[bytes, KeyValue]) -> None:
        for op in txn.then if self._holds(txn.compares, before) else txn.otherwise:
            if isinstance(op, Put) and op.lease and op.lease not in self.leases:
                raise LockLost("the lease has ended")
            if isinstance(op, Txn):
                self._check_leases(op, before)

    def _holds(self, compares: Sequence[Compare], before: dict[bytes, KeyValue]) -> bool:
        return all(self._compare(c, before) for c in compares)

    def _compare(self, compare: Compare, before: dict[bytes, KeyValue]) -> bool:
        if compare.prefix:
            found = [kv for key, kv in before.items() if key.startswith(compare.key)]
        else:
            found = [kv] if (kv := before.get(compare.key)) is not None else []
        values = [
            kv.create_revision if compare.field == "create" else kv.mod_revision for kv in found
        ]
        if not values:
            values = [0]
        if compare.op == "=":
            return all(value == compare.value for value in values)
        return all(value < compare.value for value in values)

    def _run(
        self,
        txn: Txn,
        before: dict[bytes, KeyValue],
        after: dict[bytes, KeyValue],
        revision: int,
        events: list[Event],
    ) -> tuple[bool, tuple[Response, ...]]:
        succeeded = self._holds(txn.compares, before)
        responses: list[Response] = []
        for op in txn.then if succeeded else txn.otherwise:
            if isinstance(op, Put):
                old = after.get(op.key)
                created = old.create_revision if old is not None else revision
                kv = KeyValue(op.key, op.value, created, revision, op.lease)
                self._attach(kv, old)
                after[op.key] = kv
                events.append(Event("put", kv))
                responses.append(None)
            elif isinstance(op, Delete):
                old = after.pop(op.key, None)
                if old is not None:
                    self._attach(None, old)
                    events.append(Event("delete", KeyValue(op.key, b"", 0, revision)))
                responses.append(None)
            elif isinstance(op, Get):
                responses.append(after.get(op.key))
            elif isinstance(op, Range):
                responses.append(
                    tuple(after[key] for key in sorted(after) if key.startswith(op.prefix))
                )
            else:
                inner = self._run(op, before, after, revision, events)
                responses.append(TxnResult(inner[0], 0, inner[1]))
        return succeeded, tuple(responses)

    def _attach(self, new: KeyValue | None, old: KeyValue | None) -> None:
        if old is not None and old.lease in self.leases:
            self.leases[old.lease].keys.discard(old.key)
        if new is not None and new.lease:
            self.leases[new.lease].keys.add(new.key)

    def _commit(self, revision: int, events: list[Event]) -> None:
        self.revision = revision
        self.commits += 1
        self.history.append(WatchBatch(revision, tuple(events)))
        for watcher in list(self.watchers):
            watcher()

    def compact(self, revision: int) -> None:
        """Forget the history up to and including `revision`."""
        self.compacted = max(self.compacted, revision)
        self.history = [b for b in self.history if b.revision > self.compacted]

    # -- leases ---------------------------------------------------------------------------------

    def grant(self, node: str, ttl_s: float) -> int:
        lease = self._next_lease
        self._next_lease += 1
        self.leases[lease] = _Lease(node, ttl_s, self.loop.time())
        self._arm(lease)
        return lease

    def renew(self, lease: int) -> bool:
        """Whether the lease was still there."""
        if lease not in self.leases:
            return False
        self.leases[lease].renewed = self.loop.time()
        self._arm(lease)
        return True

    def _arm(self, lease: int) -> None:
        record = self.leases[lease]
        if record.timer is not None:
            record.timer.cancel()
        record.timer = self.loop.call_later(record.ttl_s, self.expire, lease)

    def expire(self, lease: int) -> None:
        """End a lease: all its keys vanish in one revision. Idempotent."""
        record = self.leases.pop(lease, None)
        if record is None:
            return
        if record.timer is not None:
            record.timer.cancel()
        keys = sorted(record.keys)
        if keys:
            self.data = {k: kv for k, kv in self.data.items() if k not in record.keys}
            revision = self.revision + 1
            self._commit(revision, [Event("delete", KeyValue(k, b"", 0, revision)) for k in keys])


def _stamp(result: TxnResult, revision: int) -> TxnResult:
    """Fill the revision in at every depth."""
    responses = tuple(
        _stamp(r, revision) if isinstance(r, TxnResult) else r for r in result.responses
    )
    return TxnResult(result.succeeded, revision, responses)


class MemoryStore:
    """One node's handle. After `crash` nothing is ever called back."""

    def __init__(
        self, server: MemoryServer, rng: Random | None = None, faults: Faults | None = None
    ) -> None:
        self.server = server
        self.loop = server.loop
        self.rng = rng or Random(0)
        self.faults = faults or Faults()
        self.connected = True
        self.dead = False
        self.watches: list[MemoryWatch] = []
        self.session: MemorySession | None = None

    # -- faults -----------------------------------------------------------------------------

    def cut(self) -> None:
        """Nothing gets through any more, in either direction."""
        self.connected = False

    def heal(self) -> None:
        self.connected = True
        for watch in self.watches:
            watch.pull()

    def crash(self) -> None:
        """The node dies: its lease runs out by itself."""
        self.dead = True
        self.close()

    def call_back(self, callback: Callable[..., None], *args: object) -> None:
        if not self.dead:
            callback(*args)

    def _delay(self) -> float:
        return self.rng.uniform(0, self.faults.delay_s)

    # -- the contract -----------------------------------------------------------------------

    def txn(self, txn: Txn, done: TxnDone) -> None:
        check(txn)
        faults, draw = self.faults, self.rng.random()
        unknown = OutcomeUnknown("no answer from the store")
        if not self.connected or draw < faults.lose_request:
            self.loop.call_later(faults.timeout_s, self.call_back, done, unknown)
            return
        draw -= faults.lose_request
        if draw < faults.apply_late:
            self.loop.call_later(faults.timeout_s, self.call_back, done, unknown)
            late = faults.timeout_s + self.rng.uniform(0, faults.late_s)
            self.loop.call_later(late, self._apply, txn)
            return
        draw -= faults.apply_late
        self.loop.call_later(self._delay(), self._arrive, txn, done, draw < faults.lose_answer)

    def _apply(self, txn: Txn) -> TxnResult | DlmfsError:
        try:
            if self.faults.full and writes(txn):
                return StoreFull("the store is full")
            return self.server.apply(txn)
        except LockLost as error:
            return error

    def _arrive(self, txn: Txn, done: TxnDone, lose_answer: bool) -> None:
        if self.dead:
            return  # the request was still in the dead node's buffers
        result = self._apply(txn)
        if lose_answer or not self.connected:
            unknown = OutcomeUnknown("no answer from the store")
            self.loop.call_later(self.faults.timeout_s, self.call_back, done, unknown)
        else:
            self.loop.call_later(self._delay(), self.call_back, done, result)

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
        if not self.connected:
            error = Unavailable("the store cannot be reached")
            self.loop.call_later(self.faults.timeout_s, self.call_back, done, error)
            return
        self.session = MemorySession(self, node, ttl_s, lost)
        self.loop.call_later(self._delay(), self.call_back, done, self.session)

    def end_session(self, lease: int, done: Callable[[DlmfsError | None], None]) -> None:
        error = None if self.connected else OutcomeUnknown("no answer from the store")
        if self.connected:
            self.server.expire(lease)
        self.loop.call_later(self._delay(), self.call_back, done, error)

    def lease_left(self, lease: int, done: Callable[[float | DlmfsError | None], None]) -> None:
        left: float | DlmfsError = OutcomeUnknown("no answer from the store")
        if self.connected:
            record = self.server.leases.get(lease)
            now = self.loop.time()
            left = 0.0 if record is None else record.renewed + record.ttl_s - now
        self.loop.call_later(self._delay(), self.call_back, done, left)

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
        self._pending = False

    def pull(self) -> None:
        """Something may have happened: fetch it after the network's delay."""
        if not self._pending and not self.cancelled:
            self._pending = True
            delay = self.store.rng.uniform(0, self.store.faults.watch_delay_s)
            self.store.loop.call_later(delay, self._deliver)

    def _deliver(self) -> None:
        self._pending = False
        store = self.store
        if self.cancelled or store.dead or not store.connected:
            return
        server = store.server
        if self.next <= server.compacted:
            self.cancel()
            self.sink(WatchGap(server.compacted + 1))
            return
        for batch in list(server.history):
            if batch.revision < self.next or self.cancelled:
                continue
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
    """A lease kept alive over the node's network."""

    def __init__(
        self, store: MemoryStore, node: str, ttl_s: float, lost: Callable[[DlmfsError], None]
    ) -> None:
        self.store = store
        self.ttl_s = ttl_s
        self.lost = lost
        self.lease = store.server.grant(node, ttl_s)
        self.renewed_at: float | None = store.loop.time()
        self.ended = False
        self._timer = store.loop.call_later(ttl_s / 5, self._renew)

    def _renew(self) -> None:
        if self.ended or self.store.dead:
            return
        self._timer = self.store.loop.call_later(self.ttl_s / 5, self._renew)
        if not self.store.connected:
            return
        sent = self.store.loop.time()
        if self.store.server.renew(self.lease):
            self.renewed_at = sent
        else:
            self.ended = True
            gone = LockLost("the lease has ended in the store")
            self.store.loop.call_soon(self.store.call_back, self.lost, gone)

    def abandon(self) -> None:
        self.ended = True
        self._timer.cancel()

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        self.abandon()
        if self.store.connected:
            self.store.server.expire(self.lease)
        self.store.loop.call_soon(self.store.call_back, done, None)
