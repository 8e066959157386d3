"""What every store may be asked: the rules of one transaction, and how large it is. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from dlmfs.errors import Bug
from dlmfs.store.base import Bounds, Delete, Op, Put, Range, Txn


def writes(txn: Txn) -> bool:
    """Whether any branch of the transaction changes anything."""
    return any(
        isinstance(op, (Put, Delete)) or (isinstance(op, Txn) and writes(op))
        for op in (*txn.then, *txn.otherwise)
    )


def operations(txn: Txn) -> int:
    """How many operations etcd counts: the longest of the three lists, and on top of it the most that any
    transaction inside counts, in whichever branch (checkTxnRequest in etcd's api/v3rpc/key.go)."""
    inside = (operations(op) for op in (*txn.then, *txn.otherwise) if isinstance(op, Txn))
    longest = max(len(txn.compares), len(txn.then), len(txn.otherwise))
    return longest + max(inside, default=0)


def size(txn: Txn) -> int:
    """Bytes of keys and values in all branches: all of them are sent."""
    total = sum(len(compare.key) for compare in txn.compares)
    for op in (*txn.then, *txn.otherwise):
        if isinstance(op, Put):
            total += len(op.key) + len(op.value)
        elif isinstance(op, Txn):
            total += size(op)
        else:
            total += len(op.prefix) if isinstance(op, Range) else len(op.key)
    return total


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


def check(txn: Txn, bounds: Bounds) -> None:
    """Raises Bug for a transaction that no store may accept."""
    _targets(txn.then)
    _targets(txn.otherwise)
    if operations(txn) > bounds.operations:
        raise Bug(f"a transaction has {operations(txn)} operations, more than {bounds.operations}")
    if size(txn) > bounds.size:
        raise Bug(f"a transaction has {size(txn)} bytes, more than {bounds.size}")
