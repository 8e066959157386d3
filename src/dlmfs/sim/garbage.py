"""What stands in a record that no node has put: drawn from every kind of wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from dlmfs.engine.inspection import inspect
from dlmfs.errors import BadState
from dlmfs.store.base import KeyValue

LARGE: Final = 2 << 20
"""More than a store takes in one request by default, and than any record of ours."""
DEEP: Final = 100_000

ODD: Final[tuple[object, ...]] = (
    *(None, True, False, 0, -1, 1, 2, 3, 99, 1.5, 1e308, 1 << 62, 1 << 64, 10**400),
    *("", "x", "zz", "aabbcc", "\ud800", "\x1b[31m", "n\n1", "n1", "n9", "0" * 128, "f" * 129),
    *(
        [],
        {},
        [1],
        [[]],
        {"v": 1},
        [1, 2],
        [1, 2, 3],
        ["n1", 2],
        {"n1": [1, 2, 3]},
        {"\x1b": [1, 2, 0]},
    ),
)


def noise(rng: Random, _real: bytes) -> bytes:
    """Random bytes."""
    return rng.randbytes(rng.choice([0, 1, 7, 60, 400]))


def strange(rng: Random, _real: bytes) -> bytes:
    """JSON, of anything."""
    return json.dumps(_anything(rng, 3)).encode()


def _anything(rng: Random, depth: int) -> object:
    draw = rng.random()
    if depth == 0 or draw < 0.4:
        return rng.choice(ODD)
    if draw < 0.6:
        return [_anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    names = [
        "v",
        "m",
        "lvb",
        "ab",
        "inc",
        "mode",
        "flags",
        "wish",
        "head",
        "lease",
        "record",
        "by",
        "x",
    ]
    return {rng.choice(names): _anything(rng, depth - 1) for _ in range(rng.randrange(5))}


def deep(rng: Random, _real: bytes) -> bytes:
    """What a parser would recurse into."""
    opening, closing = rng.choice([(b"[", b"]"), (b'{"m":', b"}")])
    times = rng.choice([20, 900, DEEP])
    return opening * times + rng.choice([b"", b"1" + closing * times])


def large(rng: Random, real: bytes) -> bytes:
    """More than any of ours, and perhaps a real one in all but its size."""
    if real.startswith(b"{") and rng.random() < 0.5:
        return real[:-1] + b',"x":"' + b"x" * LARGE + b'"}'
    return rng.choice([b"x" * LARGE, b" " * LARGE, b'"' * LARGE])


def mutated(rng: Random, real: bytes) -> bytes:
    """A real record with one thing wrong."""
    try:
        record: Any = json.loads(real)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or rng.random() < 0.2:
        place = rng.randrange(len(real) + 1)
        return real[:place] + rng.randbytes(1) + real[place + rng.choice([0, 1]) :]
    where: Any = record
    while True:
        names = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not names:
            return b"[]"
        name = rng.choice(names)
        inner = where[name]
        if not (isinstance(inner, dict | list) and inner and rng.random() < 0.6):
            break
        where = inner
    draw = rng.random()
    if draw < 0.15:
        del where[name]
    elif draw < 0.3 and isinstance(where, dict):
        where[str(rng.choice(ODD))] = where.pop(name)
    else:
        where[name] = rng.choice(ODD)
    return json.dumps(record).encode()


KINDS: Final[dict[str, Callable[[Random, bytes], bytes]]] = {
    "noise": noise,
    "strange": strange,
    "deep": deep,
    "large": large,
    "mutated": mutated,
}


ODD_KEYS: Final = (
    *(b"d/dom0/w/a/b/c", b"d/dom0/w/lock0", b"d/dom0/w/lock0/\xff", b"d/dom0/m/\xff\xfe"),
    *(
        b"d/dom0/m/n\x1b[32m8",
        b"d/dom0/g/n0",
        b"d/dom0/g/n0/a/b",
        b"d/dom0/x",
        b"h/dom0",
        b"h/dom0/a/b",
    ),
    *(b"n/\xff", b"n/n0/x", b"n/n0/ask/\xff/1.1", b"n/n0/answer/x", b"n/n0/evict/x"),
)
"""Keys that no node makes, where nodes look or watch."""


def spoilt(rng: Random, kv: KeyValue, kinds: Sequence[str] = tuple(KINDS)) -> bytes:
    """A value for the record that nobody can read."""
    for _ in range(1000):
        value = KINDS[rng.choice(kinds)](rng, kv.value)
        try:
            inspect(kv._replace(value=value, lease=0))
        except BadState:
            return value
    raise AssertionError(f"whatever stands at {kv.key!r} can be read")
