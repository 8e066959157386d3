"""The store for tests and simulation: the cluster's memory, with exact semantics and no delay.

A node's way to it, with a network between them that has every fault, is `memory_store`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dlmfs.errors import LockLost
from dlmfs.store.base import (
    BOUNDS,
    Bounds,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Put,
    Range,
    Response,
    Txn,
    TxnResult,
    WatchBatch,
)
from dlmfs.store.check import check, writes
from dlmfs.timing import Scheduler, Timer


@dataclass
class _Lease:
    """`ttl_s` is None for a session that does not run out (the embedded engine's)."""

    node: str
    ttl_s: float | None
    renewed: float
    born: int
    """The store's revision when it was granted."""
    keys: set[bytes] = field(default_factory=set)
    timer: Timer | None = None


class Snapshot(NamedTuple):
    """A copy of the store: of each lease whose it is, its time, since which revision, its keys."""

    revision: int
    data: dict[bytes, KeyValue]
    leases: dict[int, tuple[str, float | None, int, set[bytes]]]


class MemoryServer:
    """The data, its history and its leases. All calls are instantaneous and definite.

    `term` counts the leaders; with `available` false nobody is answered, as during an election. `life`
    counts the server's processes: a connection is to one of them.
    """

    def __init__(self, loop: Scheduler, start_revision: int = 0, bounds: Bounds = BOUNDS) -> None:
        self.loop = loop
        self.bounds = bounds
        self.revision = start_revision
        self.data: dict[bytes, KeyValue] = {}
        self.history: list[WatchBatch] = []
        self.compacted = start_revision
        self.leases: dict[int, _Lease] = {}
        self.watchers: list[Callable[[], None]] = []
        self.commits = 0
        self.term = 1
        self.life = 1
        self.available = True
        self._next_lease = 1
        self._last_leaders: set[int] = set()
        """The leases that the leader before this one knew."""

    # -- transactions ------------------------------------------------------------------------

    def apply(self, txn: Txn) -> TxnResult:
        """Raises LockLost if it names a lease that has ended; nothing is applied then."""
        check(txn, self.bounds)
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
                keys = [k for k in sorted(after) if k.startswith(op.prefix) and k > op.behind]
                responses.append(tuple(after[key] for key in keys[: op.limit or None]))
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

    def since(self, revision: int) -> list[WatchBatch]:
        """The history from `revision` on. Every revision is there, unless it was compacted."""
        return self.history[max(0, revision - self.compacted - 1) :]

    def compact(self, revision: int) -> None:
        """Forget the history up to and including `revision`."""
        self.compacted = max(self.compacted, revision)
        self.history = [b for b in self.history if b.revision > self.compacted]

    # -- leases ---------------------------------------------------------------------------------

    def grant(self, node: str, ttl_s: float | None) -> int:
        lease = self._next_lease
        self._next_lease += 1
        self.leases[lease] = _Lease(node, ttl_s, self.loop.time(), self.revision)
        self._watch_over(lease)
        return lease

    def left(self, lease: int) -> float | None:
        """Seconds until the lease ends if nobody renews it; 0: it has ended; None: it never does."""
        record = self.leases.get(lease)
        if record is None:
            return 0.0
        return None if record.ttl_s is None else record.renewed + record.ttl_s - self.loop.time()

    def renew(self, lease: int) -> bool:
        """Whether the lease was still there."""
        if lease not in self.leases:
            return False
        self.leases[lease].renewed = self.loop.time()
        return True

    def keep_alive(self, lease: int, *, stale: bool = False) -> bool:
        """A renewal as a client asks for it. `stale`: it reached the former leader, which was paused
        and says yes for a lease that the present one lets run out (protocol-traps 15)."""
        return lease in self._last_leaders if stale else self.renew(lease)

    def change_leader(self) -> None:
        """A new leader gives every lease its full time again (etcd-notes 5)."""
        self.term += 1
        self._last_leaders = set(self.leases)
        for lease in self.leases:
            self.renew(lease)

    # -- copies -----------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A copy of everything, as a backup has it."""
        leases = {
            number: (lease.node, lease.ttl_s, lease.born, set(lease.keys))
            for number, lease in self.leases.items()
        }
        return Snapshot(self.revision, self.data, leases)

    def restore(self, snapshot: Snapshot, *, bump: int = 0, term: int = 2) -> None:
        """Another server process with that copy takes over, under the raft term `term`. Its leases have
        their full time again. Its revision is that of the copy, or larger by `bump`."""
        for lease in self.leases.values():
            if lease.timer is not None:
                lease.timer.cancel()
        self.leases = {}
        self.data = dict(snapshot.data)
        self.revision = self.compacted = snapshot.revision + bump
        self.history = []
        self.term = term
        self.life += 1
        self._last_leaders = set()
        for number, (node, ttl_s, born, keys) in snapshot.leases.items():
            self.leases[number] = _Lease(node, ttl_s, self.loop.time(), born, set(keys))
            self._watch_over(number)

    def _watch_over(self, lease: int) -> None:
        """One timer for each lease, put off when it fires: renewals are many and ends are few."""
        record = self.leases.get(lease)
        if record is None or record.ttl_s is None:
            return
        left = record.renewed + record.ttl_s - self.loop.time()
        if left > 0:
            record.timer = self.loop.call_later(left, self._watch_over, lease)
        else:
            self.expire(lease)

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
