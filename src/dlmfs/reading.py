"""Records of the store read in pages: a whole range at once would stop the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from dlmfs.engine.records import DOMAINS
from dlmfs.pace import ROW, Pace
from dlmfs.store.base import KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.node import Node

PAGE: Final = 200


async def records(
    node: Node, prefix: bytes, pace: Pace, behind: bytes = b""
) -> AsyncIterator[KeyValue]:
    """All below a prefix, by key, each page as of its own time. Raises Unavailable."""
    while page := await _page(node, prefix, behind):
        for kv in page:
            yield kv
            await pace.did(ROW)
        behind = page[-1].key


async def members(node: Node, pace: Pace) -> AsyncIterator[KeyValue]:
    """The membership records of all domains. Of the wishes beside them no more is read than what a page
    brings: there may be one for each lock and node. Raises Unavailable."""
    behind = b""
    while page := await _page(node, DOMAINS, behind):
        for kv in page:
            if kv.key.split(b"/")[2:3] == [b"m"]:
                yield kv
            await pace.did(ROW)
        behind = page[-1].key
        domain, kind = (*behind.split(b"/"), b"", b"")[1:3]
        if kind == b"w":  # members come before wishes: on to the next domain
            behind = DOMAINS + domain + b"/w0"  # "0" comes after "/"


async def _page(node: Node, prefix: bytes, behind: bytes) -> list[KeyValue]:
    (page,) = (await node.transact(Txn((), (Range(prefix, behind, PAGE),)))).responses
    assert isinstance(page, tuple)
    return [kv for kv in page if isinstance(kv, KeyValue)]
