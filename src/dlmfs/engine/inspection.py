"""Any record of the store looked at by itself: whether this program can read it."""

from __future__ import annotations

from dlmfs.engine.eviction import EVICT, decode_mark
from dlmfs.engine.fields import node_name, parse, shown
from dlmfs.engine.questions import LETTER_MAX, is_letter
from dlmfs.engine.records import (
    DOMAINS,
    HEADS,
    NODES,
    Keys,
    check_member,
    decode_head,
    decode_mail,
    decode_news,
    decode_node,
    decode_wish,
    lock_of,
    member_of,
    node_of,
)
from dlmfs.engine.timeline import (
    OFFSET,
    QUARANTINE,
    STAMP,
    decode_offset,
    decode_quarantine,
    decode_stamp,
)
from dlmfs.errors import BadState
from dlmfs.store.base import KeyValue


def inspect(kv: KeyValue) -> None:
    """Raises BadState, naming the key, for a record that no node can read, or of no shape of ours."""
    known = kv.key in (STAMP, OFFSET, QUARANTINE)
    if known:
        _of_timeline(kv)
    elif kv.key.startswith(HEADS):
        known = lock_of(kv.key) is not None
        if known:
            decode_head(kv)
    elif kv.key.startswith(DOMAINS):
        known = _in_domain(kv)
    elif kv.key.startswith(NODES):
        known = _of_node(kv)
    if not known:
        raise BadState(f"the key {shown(kv.key)} in the store is not of dlmfs")


def _in_domain(kv: KeyValue) -> bool:
    if member_of(kv.key) is not None:
        check_member(kv)
        return True
    domain, _, rest = kv.key[len(DOMAINS) :].partition(b"/")
    wish = Keys(domain, "").split_wish(kv.key)
    if wish is not None:
        decode_wish(kv, wish[1])
        return True
    kind, _, rest = rest.partition(b"/")
    name = node_name(rest.partition(b"/")[0])
    if name is None:
        return False
    keys = Keys(domain, name)
    if kind == b"g" and keys.split_mail(kv.key) is not None:
        decode_mail(kv)
    elif kv.key == keys.my_news:
        decode_news(kv)
    else:
        return kv.key == keys.my_files and not kv.value  # it says all by being there
    return True


def marked(kv: KeyValue) -> str | None:
    """The node of an eviction's mark; None for another key."""
    if not (kv.key.startswith(NODES) and kv.key.endswith(EVICT)):
        return None
    return node_name(kv.key[len(NODES) : -len(EVICT)])


def _of_timeline(kv: KeyValue) -> None:
    if kv.key == STAMP:
        decode_stamp(kv)
    elif kv.key == OFFSET:
        decode_offset(kv)
    else:
        decode_quarantine(kv)


def _of_node(kv: KeyValue) -> bool:
    if node_of(kv.key) is not None:
        decode_node(kv)
    elif marked(kv) is not None:
        decode_mark(kv)
    elif is_letter(kv.key):
        parse(kv, LETTER_MAX)
    else:
        return False
    return True
