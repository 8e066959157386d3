"""Between the store contract and etcd's messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence

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
    Txn,
    TxnResult,
    WatchBatch,
)
from dlmfs.store.etcd import etcd_pb2 as pb


def after(prefix: bytes) -> bytes:
    """The first key behind all that start with `prefix`."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1])


def common(prefixes: Sequence[bytes]) -> bytes:
    """The longest beginning that all have."""
    low, high = min(prefixes), max(prefixes)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:same]


def only_reads(request: pb.TxnRequest) -> bool:
    """Whether a server runs this transaction as a mere reading, in the client's own context. Before
    3.5.5 it panics when that client is gone in the middle of it (etcd issue 14110): never sent."""
    ops = (*request.success, *request.failure)
    return all(op.HasField("request_range") for op in ops)


def puts(request: pb.TxnRequest) -> bool:
    """Whether this transaction itself may put something: what a server that takes no writes refuses. What
    one inside of it puts some servers do not count."""
    return any(op.HasField("request_put") for op in (*request.success, *request.failure))


def never(root: bytes) -> pb.TxnRequest:
    """Puts of a lock space's two kinds (`root`, and the sessions beside it) that are never applied. They
    need the same rights and the same room as any, so a store that takes no writes refuses them."""
    keys = (root + b"probe", root[:-1] + b"!/probe")
    compare = pb.Compare(
        key=keys[0], target=pb.Compare.CREATE, result=pb.Compare.LESS, create_revision=0
    )
    ops = [pb.RequestOp(request_put=pb.PutRequest(key=key, value=b"{}")) for key in keys]
    return pb.TxnRequest(compare=[compare], success=ops)


class Codec:
    """`root` stands before every key of ours in etcd."""

    def __init__(self, root: bytes) -> None:
        assert root.endswith(b"/")
        self.root = root

    # -- there --------------------------------------------------------------------------------

    def txn(self, txn: Txn) -> pb.TxnRequest:
        return pb.TxnRequest(
            compare=[self._compare(c) for c in txn.compares],
            success=[self._op(op) for op in txn.then],
            failure=[self._op(op) for op in txn.otherwise],
        )

    def _compare(self, compare: Compare) -> pb.Compare:
        key = self.root + compare.key
        message = pb.Compare(
            key=key,
            result=pb.Compare.EQUAL if compare.op == "=" else pb.Compare.LESS,
            range_end=after(key) if compare.prefix else b"",
        )
        if compare.field == "create":
            message.target = pb.Compare.CREATE
            message.create_revision = compare.value
        else:
            message.target = pb.Compare.MOD
            message.mod_revision = compare.value
        return message

    def _op(self, op: Op) -> pb.RequestOp:
        match op:
            case Put(key, value, lease):
                put = pb.PutRequest(key=self.root + key, value=value, lease=lease)
                return pb.RequestOp(request_put=put)
            case Delete(key):
                delete = pb.DeleteRangeRequest(key=self.root + key)
                return pb.RequestOp(request_delete_range=delete)
            case Get() | Range():
                return pb.RequestOp(request_range=self.read(op))
            case Txn():
                return pb.RequestOp(request_txn=self.txn(op))

    def read(self, op: Get | Range) -> pb.RangeRequest:
        if isinstance(op, Get):
            return pb.RangeRequest(key=self.root + op.key)
        assert not op.behind or op.behind.startswith(op.prefix), op
        end = after(self.root + op.prefix)
        first = op.behind + b"\0" if op.behind else op.prefix
        return pb.RangeRequest(key=self.root + first, range_end=end, limit=op.limit)

    def watch(self, prefixes: Sequence[bytes], from_revision: int) -> pb.WatchCreateRequest:
        """One range for all: two watches of one stream may be at different revisions, and a
        transaction's events would come apart. What is in between is sorted out by `batches`."""
        key = self.root + common(prefixes)
        return pb.WatchCreateRequest(
            key=key, range_end=after(key), start_revision=from_revision, fragment=True
        )

    # -- and back -----------------------------------------------------------------------------

    def result(self, txn: Txn, answer: pb.TxnResponse, revision: int) -> TxnResult:
        ops = txn.then if answer.succeeded else txn.otherwise
        responses = tuple(
            self._response(op, r, revision) for op, r in zip(ops, answer.responses, strict=True)
        )
        return TxnResult(answer.succeeded, revision, responses)

    def _response(self, op: Op, response: pb.ResponseOp, revision: int) -> Response:
        match op:
            case Get() | Range():
                return self.found(op, response.response_range.kvs)
            case Txn():
                return self.result(op, response.response_txn, revision)
            case _:
                return None

    def found(self, op: Get | Range, kvs: Sequence[pb.KeyValue]) -> Response:
        if isinstance(op, Get):
            return self.key_value(kvs[0]) if kvs else None
        return tuple(self.key_value(kv) for kv in kvs)

    def key_value(self, kv: pb.KeyValue) -> KeyValue:
        key = kv.key[len(self.root) :]
        return KeyValue(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)

    def batches(self, events: Sequence[pb.Event], prefixes: tuple[bytes, ...]) -> list[WatchBatch]:
        """The events by revision, without those that no prefix asks for."""
        found: dict[int, list[Event]] = {}
        for event in events:
            kv = self.key_value(event.kv)
            if kv.key.startswith(prefixes):
                kind = "delete" if event.type == pb.Event.DELETE else "put"
                found.setdefault(kv.mod_revision, []).append(Event(kind, kv))  # type: ignore[arg-type]
        return [WatchBatch(revision, tuple(found[revision])) for revision in sorted(found)]
