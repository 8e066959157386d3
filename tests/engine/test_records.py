"""A record of the store that no node has put: what is wrong with it is said, and by its key."""

from __future__ import annotations

import json
from random import Random
from typing import Final

import pytest

from dlmfs.engine.eviction import Mark, decode_mark, mark_key
from dlmfs.engine.fields import DEPTH_MAX, SIZE_MAX, too_deep
from dlmfs.engine.inspection import inspect
from dlmfs.engine.records import (
    Abandoned,
    Head,
    Keys,
    Member,
    Wish,
    decode_head,
    decode_mail,
    decode_news,
    decode_node,
    decode_wish,
    encode_mail,
    encode_member,
    encode_news,
)
from dlmfs.errors import BadState
from dlmfs.model import LVB_SIZE, NODE_NAME, Mode
from dlmfs.sim import garbage
from dlmfs.store.base import KeyValue

KEYS: Final = Keys(b"dom", "n1")
HEAD: Final = Head(
    {"n1": Member(5, Mode.EX, 9), "n2": Member(6, Mode.NL, 0)}, b"v" * LVB_SIZE, Abandoned("n3", 7)
)
WISH: Final = Wish("n2", 6, Mode.PR, trying=True, convert=False, revision=20, lease=77)
LETTER: Final = b'{"v":1,"question":{"locks":[],"threads":[]}}'
REAL: Final = [
    (KEYS.head(b"lk"), HEAD.encode()),
    (KEYS.mine, encode_member(77)),
    (KEYS.wish(b"lk", "n2"), WISH.encode()),
    (KEYS.mail("n1", b"lk"), encode_mail(WISH, HEAD.encode())),
    (b"n/n1", b'{"v":1,"ttl":15.0,"host":"h","pid":7,"boot":"b","mount":"/m"}'),
    (mark_key("n1"), Mark(5, "n2", heard=True).encode()),
    (b"n/n1/ask/n2/4d.1", LETTER),
    (b"n/n1/answer/4d.1/n2", b'{"node":"n2","place":"x/1"}'),
    (KEYS.my_news, encode_news([b"lk", b"l\xff"])),
    (KEYS.my_files, b""),
]
ODD_KEYS: Final = [
    *(b"d/dom/v/n1/x", b"d/dom/f/n1/", b"d/dom/v/\xff", b"d/dom/f"),
    *(b"d/dom/w/a/b/c", b"d/dom/w/lk", b"d/dom/w//n1", b"d/dom/w/lk/", b"d/dom/w/lk/n\xff"),
    *(b"d/dom/m/\xff\xfe", b"d/dom/m/", b"d/dom/m/n\x1b[32m8", b"d/dom/m/a/b", b"d/dom/x/lk"),
    *(
        b"d/dom/g/n1",
        b"d/dom/g/n1/",
        b"d/dom/g/n1/a/b",
        b"d/dom/g/\xff/lk",
        b"d/",
        b"d/dom",
        b"d//m/n1",
    ),
    *(b"h/dom", b"h/dom/", b"h//lk", b"h/dom/a/b", b"h/dom/" + b"x" * 256, b"h/dom/a\0b", b"h/"),
    *(
        b"n/",
        b"n/\xff",
        b"n/a b",
        b"n/n1/x",
        b"n/n1/ask/n2",
        b"n/n1/ask/n2/1.1/x",
        b"n/n1/answer/x/n2",
    ),
    *(b"n/n1/evict/x", b"n//evict", b"x", b""),
]


def record(key: bytes, value: bytes) -> KeyValue:
    return KeyValue(key, value, 20, 30, 77)


@pytest.mark.parametrize(("key", "value"), REAL)
def test_a_real_record_is_read(key: bytes, value: bytes) -> None:
    inspect(record(key, value))


def test_what_was_put_is_what_is_read() -> None:
    settled = HEAD._replace(members=HEAD.members | {"n2": Member(6, Mode.NL, 30)})
    assert decode_head(record(*REAL[0])) == settled
    assert decode_wish(record(*REAL[2]), "n2") == WISH
    assert decode_mail(record(*REAL[3])) == (20, settled)
    assert decode_node(record(*REAL[4]))["pid"] == 7
    assert decode_mark(record(*REAL[5])) == Mark(5, "n2", heard=True)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_of_no_shape_is_named(key: bytes) -> None:
    for _, value in REAL:
        with pytest.raises(BadState, match="is not of dlmfs"):
            inspect(record(key, value))


@pytest.mark.parametrize("kind", garbage.KINDS)
@pytest.mark.parametrize(("key", "real"), REAL)
def test_whatever_is_wrong_is_bad_state_that_names_the_key(
    kind: str, key: bytes, real: bytes
) -> None:
    rng = Random(f"{kind} {key!r}")
    refused = 0
    for _ in range(20 if kind in ("deep", "large") else 400):
        kv = record(key, garbage.KINDS[kind](rng, real))
        told = _wrong_with(kv)
        if told is not None:
            refused += 1
            assert repr(key) in told
            assert told.isprintable()
            assert len(told) < 400
        elif key == REAL[0][0]:  # what is believed is of the right kind all the same
            _check(decode_head(kv))
    assert refused


def _wrong_with(kv: KeyValue) -> str | None:
    try:
        inspect(kv)
    except BadState as error:
        return str(error)
    return None


def _check(head: Head) -> None:
    assert len(head.lvb) == LVB_SIZE
    for node, member in head.members.items():
        assert NODE_NAME.fullmatch(node)
        assert type(member.incarnation) is type(member.revision) is int
        assert 0 < member.incarnation <= 30 >= member.revision > 0
    if head.abandoned is not None:
        assert NODE_NAME.fullmatch(head.abandoned.node)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("v", True), ("v", 2), ("v", "1"), ("v", None), ("v", 1.0)),
        *(("lvb", "aabbcc"), ("lvb", "zz"), ("lvb", 7), ("lvb", "ab " * 64), ("lvb", None)),
        *(("ab", [1]), ("ab", ["n1", True]), ("ab", ["n\n1", 3]), ("ab", ["n1", 31]), ("ab", {})),
        *(
            ("m", [1]),
            ("m", {"n1": [5, 9, 0]}),
            ("m", {"n1": [5, True, 0]}),
            ("m", {"n1": ["5", 1, 0]}),
        ),
        *(
            ("m", {"n1": [0, 1, 0]}),
            ("m", {"n1": [5, 1, -1]}),
            ("m", {"n1": [5, 1]}),
            ("m", {"n1": 5}),
        ),
        *(("m", {"n1": [31, 1, 0]}), ("m", {"n1": [5, 1, 31]}), ("m", {"n\x1b": [5, 1, 0]})),
    ],
)
def test_each_field_of_a_head_is_looked_at(field: str, value: object) -> None:
    key, real = REAL[0]
    changed = json.dumps(json.loads(real) | {field: value}).encode()
    with pytest.raises(BadState, match="h/dom/lk"):
        decode_head(record(key, changed))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("mode", 0), ("mode", 3), ("mode", True), ("inc", 0), ("inc", 31), ("inc", "6")),
        *(("flags", ["x"]), ("flags", "try"), ("flags", [["try"]]), ("flags", None)),
    ],
)
def test_each_field_of_a_wish_is_looked_at(field: str, value: object) -> None:
    key, real = REAL[2]
    changed = json.dumps(json.loads(real) | {field: value}).encode()
    with pytest.raises(BadState, match="w/lk/n2"):
        decode_wish(record(key, changed), "n2")


def test_half_of_a_pair_is_no_name() -> None:
    """JSON may say so by an escape; no bytes of a file's name are it."""
    with pytest.raises(BadState, match="v/n1"):
        decode_news(record(b"d/dom/v/n1", b'{"v":1,"locks":["a\\ud800"]}'))


def test_a_wish_on_no_lease_would_stand_for_ever() -> None:
    key, real = REAL[2]
    with pytest.raises(BadState, match="lease"):
        decode_wish(KeyValue(key, real, 20, 30, 0), "n2")


def test_another_version_is_said_to_be_one() -> None:
    key, real = REAL[0]
    with pytest.raises(BadState, match=r"has format 2.*run the same version"):
        decode_head(record(key, real.replace(b'"v":1', b'"v":2')))
    mail = encode_mail(WISH, real.replace(b'"v":1', b'"v":2'))
    with pytest.raises(BadState, match="has format 2"):
        decode_mail(record(REAL[3][0], mail))


def test_size_and_depth_are_looked_at_before_a_parser_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, real = REAL[0]
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(BadState, match="bytes"):
        decode_head(record(key, real + b" " * SIZE_MAX))
    with pytest.raises(BadState, match="deeply"):
        decode_head(record(key, real[:-1] + b',"x":' + b"[" * 100 + b"]" * 100 + b"}"))


def test_depth_is_that_of_brackets_outside_of_strings() -> None:
    assert not too_deep(b'["' + b"[" * 100 + b'"]')
    assert not too_deep(b'["\\"' + b"[" * 100 + b'", "\\\\"]')
    assert not too_deep(b"[" + b"[]," * 100 + b"1]")
    assert not too_deep(b"[" * DEPTH_MAX + b"]" * DEPTH_MAX)
    assert too_deep(b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1))
    assert too_deep(b'["\\"", ' + b'{"a":' * 100)
    many = {f"n{number}": [1, 2, 3] for number in range(500)}
    assert not too_deep(json.dumps({"m": many}).encode())
