"""The mark that a node must go: put by an operator (`admin`), obeyed by the node (`membership`).

    n/<node>/evict   which life of the node is meant, who wants it, and whether it has heard

It is on nobody's lease: a node that could not hear must not come back, whenever it is.
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

from dlmfs.engine.records import NODES
from dlmfs.store.base import KeyValue

EVICT: Final = b"/evict"


def mark_key(node: str) -> bytes:
    return NODES + node.encode() + EVICT


class Mark(NamedTuple):
    """`record` is the create revision of the record n/<node> that is meant: a life under that name."""

    record: int
    by: str
    heard: bool = False

    def encode(self) -> bytes:
        facts = {"record": self.record, "by": self.by}
        return json.dumps(facts | {"heard": True} if self.heard else facts).encode()


def decode_mark(kv: KeyValue) -> Mark | None:
    """None for what is no mark: it was put by hand."""
    try:
        facts = json.loads(kv.value)
    except ValueError:
        return None
    if not isinstance(facts, dict) or not isinstance(facts.get("record"), int):
        return None
    return Mark(facts["record"], str(facts.get("by")), bool(facts.get("heard")))
