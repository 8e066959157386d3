"""What an operator does to a lock space from any of its nodes.

Eviction: a mark asks a node to go; it gives its holders time and ends its session (`ending`). If the
mark has stood for the node's whole lease time unheard, it may be stuck, and its session is ended for it.
By then it has renewed its lease, and thus reached the store where the mark stands, or fenced itself. One
whose process is stopped on this host, where no lease runs out, is killed: so its programs are told at
once, and the others' lock-delay gives them their time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Final

from dlmfs.engine.eviction import Mark, decode_mark, mark_key
from dlmfs.engine.fields import Fields
from dlmfs.engine.records import NODES, TTL_MAX_S, Keys
from dlmfs.errors import BadState, DlmfsError, UsageError
from dlmfs.store.base import (
    Compare,
    Delete,
    Get,
    KeyValue,
    Put,
    Range,
    Response,
    Store,
    Txn,
    TxnResult,
    created_at,
)
from dlmfs.timing import TTL_DEFAULT_S

LOOK_S: Final = 0.2
MARGIN_S: Final = 1.0
BATCH: Final = 100
"""Below etcd's default bound of 128 operations in a transaction."""

Transact = Callable[[Txn], Awaitable[TxnResult]]


async def evict(transact: Transact, store: Store, node: str, by: str) -> dict[str, object]:
    """Put `node` out and wait until it is. Raises UsageError if there is none such, Unavailable.

    Returns how: "left" (by itself, on the mark), "expired" (it had stopped renewing), "killed" (it was
    stopped) or "ended" (its lease was ended for it), with the seconds.
    """
    key = NODES + node.encode()
    mark = mark_key(node)
    record = (await transact(Txn((), (Get(key),)))).responses[0]
    if not isinstance(record, KeyValue):
        raise UsageError(f"there is no node {node!r}: `dlmfs nodes` lists them")
    ttl_s = _ttl_s(record)
    put = Put(mark, Mark(record.create_revision, by).encode())
    same = created_at(key, record.create_revision)
    loop = asyncio.get_running_loop()
    start = loop.time()
    await transact(Txn((same,), (put,)))
    how = "expired"
    heard = False
    patience_s = ttl_s + MARGIN_S
    while (found := await transact(Txn((same,), (Get(mark),)))).succeeded:
        said = _said(found.responses[0])
        if said is not None and said.heard and not heard:
            heard, patience_s = True, loop.time() - start + max(ttl_s, said.wait_s) + MARGIN_S
        if not heard and store.kill_stopped(record.lease):
            how = "killed"
        elif loop.time() - start > patience_s:
            how = "ended"
            if record.lease:
                await _end(store, record.lease)
            else:  # put by hand, or overwritten so: no session's end takes it away
                await transact(Txn((same,), (Delete(key),)))
        await asyncio.sleep(LOOK_S)
    said = _said((await transact(Txn((), (Get(mark),)))).responses[0])
    if said is not None and said.heard:
        await transact(Txn((), (Delete(mark),)))
        how = "left" if how == "expired" else how
    # Else it stays until the name is taken anew: who could not hear must not come back.
    return {"node": node, "how": how, "after_s": round(loop.time() - start, 1)}


def _said(mark: Response) -> Mark | None:
    try:
        return decode_mark(mark) if isinstance(mark, KeyValue) else None
    except BadState:
        return None


def _ttl_s(record: KeyValue) -> float:
    """The lease time that a node says it has."""
    try:
        return Fields.of(record).seconds("ttl", TTL_MAX_S)
    except BadState:  # overwritten: it has noticed, or cannot
        return TTL_DEFAULT_S


async def _end(store: Store, lease: int) -> None:
    ended: asyncio.Future[DlmfsError | None] = asyncio.get_running_loop().create_future()
    store.end_session(lease, ended.set_result)
    error = await ended
    if error is not None:
        raise error


async def remove_domain(transact: Transact, domain: str) -> int:
    """Remove what a domain left behind when all its nodes had crashed: its values and marks.

    Returns the number of lock resources removed. Raises UsageError if a node is in it, or if there
    is nothing of it; Unavailable.
    """
    keys = Keys(os.fsencode(domain), "")
    rest, heads = keys.base, keys.heads
    empty = Compare(keys.members, "create", "=", 0, prefix=True)
    removed, first = 0, True
    while True:
        left = await transact(Txn((), (Range(heads, b"", BATCH), Range(rest, b"", BATCH))))
        found = [kv for part in left.responses if isinstance(part, tuple) for kv in part]
        if not found:
            if first:
                raise UsageError(f"there is nothing of a domain {domain!r}")
            return removed
        batch = [kv.key for kv in found[:BATCH] if isinstance(kv, KeyValue)]
        result = await transact(Txn((empty,), tuple(Delete(key) for key in batch)))
        if not result.succeeded:
            raise UsageError(f"a node is in the domain {domain!r}: rmdir it there first")
        removed += sum(key.startswith(heads) for key in batch)
        first = False
