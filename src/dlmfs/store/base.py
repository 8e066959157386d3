"""The store contract: where cluster state lives. etcd's v3 API fulfils it as it stands.

A store is a map from keys to values with one revision number for the whole store. Every
transaction that changes anything gets the next revision; a key remembers the revision that
created it and the one that last changed it (0 stands for an absent key in compares).

Rules every implementation keeps (tests/store/test_contract.py):

* `txn` is atomic and linearizable. Compares, at every nesting depth, see the state from before
  the whole transaction. Nested transactions run in place and report their own `succeeded`.
  One request touches a key at most once (etcd refuses it otherwise).
* `done` is called exactly once, later, from the scheduler, never from inside the call.
* An answer that did not come is `OutcomeUnknown`: it may have been applied, or be applied later.
  `StoreFull` and `LockLost` are definite: nothing was applied.
* `watch` delivers events in revision order, all events of one revision in one batch, without
  gaps or repeats, starting with `from_revision`. When it cannot (log trimmed) it says so once with a
  `WatchGap` and delivers nothing more.
* Keys put with a session's lease vanish together, in one revision, when the session ends.
* One transaction is no larger than `Bounds`, counted as etcd does (`check`).
* A store that is out of reach for a moment may be another one when it answers again: restored from a
  copy, perhaps with larger revisions than it had. A session that has a `Witness` loses its trust with
  each connection. Until the witness has looked and found nothing amiss no answer is believed: a `txn`
  under way is `OutcomeUnknown`, later ones wait for as long as one may take, and watches deliver nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from dlmfs.errors import DlmfsError


class KeyValue(NamedTuple):
    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Compare(NamedTuple):
    """Holds when `field` of the key (with `prefix`, of every key that starts so) is `op` value."""

    key: bytes
    field: Literal["create", "mod"]
    op: Literal["=", "<"]
    value: int
    prefix: bool = False


def created_at(key: bytes, revision: int) -> Compare:
    """The key is the one created at `revision`; 0: there is no such key."""
    return Compare(key, "create", "=", revision)


def unchanged(key: bytes, revision: int) -> Compare:
    """The key was last changed at `revision`; 0: there is no such key."""
    return Compare(key, "mod", "=", revision)


def none_newer(prefix: bytes, revision: int) -> Compare:
    """No key below `prefix` was changed after `revision`. Deletions do not count."""
    return Compare(prefix, "mod", "<", revision + 1, prefix=True)


class Put(NamedTuple):
    key: bytes
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    key: bytes


class Get(NamedTuple):
    """Answered with `KeyValue | None`."""

    key: bytes


class Range(NamedTuple):
    """Answered with a tuple of `KeyValue`, by key; of those behind the key `behind`, if it is given (it
    starts with `prefix`), and no more than `limit` (0: all)."""

    prefix: bytes
    behind: bytes = b""
    limit: int = 0


class Txn(NamedTuple):
    """If all `compares` hold run `then`, else `otherwise`. May stand among its own operations."""

    compares: tuple[Compare, ...]
    then: tuple[Op, ...]
    otherwise: tuple[Op, ...] = ()


Op = Put | Delete | Get | Range | Txn


class Bounds(NamedTuple):
    """How large a transaction may be. `operations` is etcd's default (`--max-txn-ops`), counted as etcd
    counts; `size` is in bytes of keys and values, and leaves a third of etcd's default
    (`--max-request-bytes`, 1.5 MiB) to what its messages add."""

    operations: int = 128
    size: int = 1 << 20


BOUNDS: Final = Bounds()


class TxnResult(NamedTuple):
    """`responses` match the branch that ran: None for Put and Delete, see the others.

    `revision` is the store's after the transaction (its own one if it wrote anything).
    """

    succeeded: bool
    revision: int
    responses: tuple[Response, ...]


Response = KeyValue | tuple[KeyValue, ...] | TxnResult | None

TxnDone = Callable[[TxnResult | DlmfsError], None]


class Event(NamedTuple):
    """A change of a key. For a deletion `kv` has an empty value and `mod_revision` is its revision."""

    kind: Literal["put", "delete"]
    kv: KeyValue


class WatchBatch(NamedTuple):
    revision: int
    events: tuple[Event, ...]


class WatchGap(NamedTuple):
    """The watch ended: events before `oldest` are gone. Read everything anew, watch again."""

    oldest: int


TIMELINE: Final = b"t/"
"""Below it stands what tells whether a store went back (`engine.timeline`); read with each renewal."""


class Look(NamedTuple):
    """What a session read of the store, linearizably: whether its own record is as it put it, all below
    TIMELINE, and the `keys` that the witness asked for. `revision`: the store's, when it began."""

    mine: bool
    timeline: tuple[KeyValue, ...]
    found: tuple[KeyValue | None, ...]
    revision: int


class Witness(Protocol):
    """Who knows what a store had, and can tell whether it still has it."""

    def doubt(self) -> None:
        """A connection was lost: serve nothing of what is known until `trust`."""

    def keys(self) -> Sequence[bytes]:
        """What the next look must read besides."""

    def judge(self, look: Look) -> DlmfsError | None:
        """What came of a look. StoreRestored: the store went back; OutcomeUnknown: look once more;
        another error ends the session as well."""

    def trust(self) -> None:
        """The store is the one that it was, and the connection there is believed."""


class Watch(Protocol):
    def cancel(self) -> None:
        """After this returns nothing more is delivered."""


class Session(Protocol):
    """One node's life in the store. All its leased keys live and die with it."""

    @property
    def lease(self) -> int:
        """The number to put in `Put.lease`."""

    @property
    def renewed_at(self) -> float | None:
        """When the last good renewal was sent, in seconds on the clock that the store was given.
        None: the session cannot run out (one host)."""

    @property
    def ttl_s(self) -> float:
        """The lease time that the store granted; may be more than was asked for."""

    @property
    def born(self) -> int:
        """The revision of its own record in the store; 0: it cannot run out and has none."""

    @property
    def seen(self) -> int:
        """The largest revision that an answer of the store named."""

    def abandon(self) -> None:
        """Renew no more and tell nothing more: the session runs out, or `end_session` ends it."""

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        """End the session: its keys vanish in one revision."""


class Store(Protocol):
    """One node's handle on a store."""

    @property
    def bounds(self) -> Bounds:
        """How large a transaction may be: a larger one raises Bug."""

    def txn(self, txn: Txn, done: TxnDone) -> None: ...

    def watch(
        self,
        prefixes: Sequence[bytes],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> Watch: ...

    def open_session(
        self,
        node: str,
        ttl_s: float,
        lost: Callable[[DlmfsError], None],
        done: Callable[[Session | DlmfsError], None],
        witness: Witness | None = None,
    ) -> None:
        """Begin a session for `node`. `lost` is called once if it ends without close(): with
        LockLost if another session may be begun, StoreRestored if no other may be before all of the
        store's past are over, BadState if none may. Each renewal counts only if the `witness` finds
        nothing amiss in a look made after it."""

    def end_session(self, lease: int, done: Callable[[DlmfsError | None], None]) -> None:
        """End another session, whose owner is known to be over: its keys vanish in one revision.
        None also if it had ended before; OutcomeUnknown."""

    def kill_stopped(self, lease: int) -> bool:
        """Where no lease can run out: kill the process of a session if it is stopped, so that the
        session ends. Whether that was done; False also if it is not known or not permitted."""

    def lease_left(self, lease: int, done: Callable[[float | DlmfsError | None], None]) -> None:
        """Seconds until a session ends if it is not renewed any more, 0 if it has ended; None: it cannot
        run out (one host). OutcomeUnknown."""

    def describe(self) -> dict[str, object]:
        """Facts for `dlmfs status`: where the state is, its health, who holds it up."""

    def size_mb(self) -> float:
        """What the state takes up, in megabytes; may be a second old."""

    def close(self) -> None:
        """Let go of everything. Sessions still open end as if the node had died."""
