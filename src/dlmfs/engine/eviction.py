"""The mark that a node must go: put by an operator (`admin`), obeyed by the node (`membership`).

    n/<node>/evict   which life of the node is meant, who wants it, and whether it has heard

It is on nobody's lease: a node that could not hear must not come back, whenever it is.
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

from dlmfs.engine.fields import Fields, parse
from dlmfs.engine.records import NODES
from dlmfs.store.base import KeyValue

EVICT: Final = b"/evict"
SIZE_MAX: Final = 4096
WAIT_MAX_S: Final = 10_000.0


def mark_key(node: str) -> bytes:
    return NODES + node.encode() + EVICT


class Mark(NamedTuple):
    """`record` is the create revision of the record n/<node> that is meant: a life under that name.
    `wait_s`: how long the end of one that has heard may take, if the store answers."""

    record: int
    by: str
    heard: bool = False
    wait_s: float = 0.0

    def encode(self) -> bytes:
        facts = {"record": self.record, "by": self.by}
        said = {"heard": True, "wait": self.wait_s}
        return json.dumps(facts | said if self.heard else facts).encode()


def decode_mark(kv: KeyValue) -> Mark:
    """Raises BadState for what is no mark: it was put by hand."""
    fields = Fields(kv.key, parse(kv, SIZE_MAX))
    by = fields.as_node("by", fields.record.get("by"))
    wait_s = fields.seconds("wait", WAIT_MAX_S) if "wait" in fields.record else 0.0
    return Mark(fields.whole("record", 1), by, fields.flag("heard"), wait_s)
