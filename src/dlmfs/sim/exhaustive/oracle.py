"""What must be true of a lock service, said without the engine's own words.

Commits are judged by the store's records before and after them, read here by code of its own: an
order or a comparison that is wrong in the engine must not be wrong here in the same way.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import combinations
from typing import Final, NamedTuple

from dlmfs.model import EMPTY_LVB, Mode
from dlmfs.sim.exhaustive.actors import DOMAIN, Seen
from dlmfs.store.base import KeyValue

HEADS: Final = b"h/" + DOMAIN + b"/"
MEMBERS: Final = b"d/" + DOMAIN + b"/m/"
WISHES: Final = b"d/" + DOMAIN + b"/w/"

Data = Mapping[bytes, KeyValue]


def clash(a: int, b: int) -> bool:
    """Whether two nodes must not have these modes at once (the table of dlmfs.txt)."""
    return Mode.EX in (a, b) and Mode.NL not in (a, b)


class Place(NamedTuple):
    incarnation: int
    level: int


class Record(NamedTuple):
    """A head as it stands in the store."""

    places: dict[str, Place]
    value: bytes
    mark: str
    seen: bool
    """A later exclusive holder knows of the death."""


NO_RECORD: Final = Record({}, EMPTY_LVB, "", False)


class Asked(NamedTuple):
    node: str
    mode: int
    trying: bool
    order: tuple[bool, int]


@lru_cache(maxsize=100_000)
def _head(value: bytes) -> Record:
    record = json.loads(value)
    places = {node: Place(inc, level) for node, (inc, level, _) in record["m"].items()}
    lvb = bytes.fromhex(record["lvb"]) if record["lvb"] else EMPTY_LVB
    mark = record["ab"] or []
    return Record(places, lvb, json.dumps(mark[:2]) if mark else "", any(mark[2:]))


def heads(data: Data) -> dict[bytes, Record]:
    return {k[len(HEADS) :]: _head(kv.value) for k, kv in data.items() if k.startswith(HEADS)}


def members(data: Data) -> dict[str, int]:
    """The incarnations of those whose lease stands."""
    return {
        key[len(MEMBERS) :].decode(): kv.create_revision
        for key, kv in data.items()
        if key.startswith(MEMBERS)
    }


def queue(data: Data, lock: bytes) -> dict[str, Asked]:
    """Who asked, by node. Conversions come first (engine rule 6), then who came first."""
    out = {}
    prefix = WISHES + lock + b"/"
    for key, kv in data.items():
        if key.startswith(prefix):
            record, node = json.loads(kv.value), key[len(prefix) :].decode()
            order = ("convert" not in record["flags"], kv.create_revision)
            out[node] = Asked(node, record["mode"], "try" in record["flags"], order)
    return out


def judge(before: Data, after: Data, actor: str) -> str:
    """What is wrong with a commit of the node `actor` (empty: a lease's end); empty: nothing."""
    for problem in _problems(before, after, actor):
        return problem
    return ""


def _problems(before: Data, after: Data, actor: str) -> Iterator[str]:
    old, new, alive = heads(before), heads(after), members(before)
    for lock in sorted({*old, *new}):
        was, now = old.get(lock, NO_RECORD), new.get(lock, NO_RECORD)
        if was is now:
            continue
        name = lock.decode()
        living = {n: p for n, p in now.places.items() if alive.get(n) == p.incarnation}
        for (a, one), (b, other) in combinations(living.items(), 2):
            if clash(one.level, other.level):
                yield f"the head of {name} has {a} and {b} at levels that exclude each other"
        yield from _order(was, now, queue(before, lock), actor, name)
        yield from _deaths(was, now, alive, name, gone=lock not in new)
        yield from _value(was, now, alive, actor, name, gone=lock not in new)
        if actor in was.places and actor not in now.places and now.places and not living:
            yield f"{actor} leaves {name} to the dead alone: nobody looks at it again"
    if actor in alive and actor not in members(after):
        for lock, head in new.items():
            place = head.places.get(actor, Place(0, 0))
            if place.incarnation == alive[actor] and place.level > Mode.NL:
                yield f"{actor} leaves the domain with {lock.decode()}: it looks like a death"


def _order(
    was: Record, now: Record, asked: dict[str, Asked], actor: str, name: str
) -> Iterator[str]:
    """First come, first served, conversions first (promise 5)."""
    for node, place in now.places.items():
        earlier = was.places.get(node, Place(0, 0))
        have = earlier.level if earlier.incarnation == place.incarnation else Mode.NL
        if place.level <= have:
            continue
        wish = asked.get(node)
        if wish is None and node != actor:
            yield f"{name} is granted to {node}, which does not wish for it"
        for other in asked.values():
            passed = wish is None or other.order < wish.order
            if (
                other.node != node
                and not other.trying
                and clash(other.mode, place.level)
                and passed
            ):
                yield f"{node} gets {name} before {other.node}, whose wish stands before it"


def _deaths(
    was: Record, now: Record, alive: dict[str, int], name: str, *, gone: bool
) -> Iterator[str]:
    """The mark of an exclusive holder's death (promise 4)."""
    dead = {n for n, p in was.places.items() if alive.get(n) != p.incarnation}
    at_ex = {n for n in dead if was.places[n].level == Mode.EX}
    buried = {n for n in at_ex if now.places.get(n) != was.places[n]}
    if buried and (gone or not now.mark):
        yield f"{min(buried)} died with {name} exclusively, and the head does not say so"
    if now.mark and now.mark != was.mark and not buried:
        yield f"{name} is marked as abandoned, and nobody died with it exclusively"


def _value(
    was: Record, now: Record, alive: dict[str, int], actor: str, name: str, *, gone: bool
) -> Iterator[str]:
    """Who may change the value, or take the mark away (promise 4)."""
    place = was.places.get(actor, Place(0, 0))
    may = place.level == Mode.EX and alive.get(actor) == place.incarnation
    if gone:
        unseen = was.mark and not was.seen and not may
        if unseen or any(
            alive.get(n) == p.incarnation for n, p in was.places.items() if n != actor
        ):
            yield f"{actor} removes the head of {name}, which somebody still needs"
        return
    if was.value != now.value and not may:
        yield f"{actor} changes the value of {name} and does not have it exclusively"
    if now.seen and not may and not (was.seen and was.mark == now.mark):
        yield f"{actor} calls the mark of {name} seen and does not have it exclusively"
    if was.mark and not now.mark and not may:
        yield f"{actor} takes the mark of {name} away and does not have it exclusively"


def new_values(before: Data, after: Data) -> tuple[tuple[bytes, bytes], ...]:
    """Values that a commit changed."""
    old, new = heads(before), heads(after)
    return tuple(
        (lock, new.get(lock, NO_RECORD).value)
        for lock in sorted({*old, *new})
        if old.get(lock, NO_RECORD).value != new.get(lock, NO_RECORD).value
    )


# -- what programs see --------------------------------------------------------------------------------


class Ledger(NamedTuple):
    """What is remembered of one lock: the largest tokens with their nodes; the values in the order of
    their commits, and which of them is the oldest that may still be read."""

    token: tuple[int, int] = (0, -1)
    token_ex: tuple[int, int] = (0, -1)
    values: tuple[bytes, ...] = (EMPTY_LVB,)
    floor: int = 0


def committed(ledger: Ledger, value: bytes) -> Ledger:
    if value == ledger.values[-1]:
        return ledger
    return ledger._replace(values=(*ledger.values, value))


def _index(ledger: Ledger, value: bytes) -> int:
    """The latest place of the value among the committed; -1: none."""
    return max((i for i, v in enumerate(ledger.values) if v == value), default=-1)


def saw(ledger: Ledger, seen: Seen, node: int, *, shared: bool) -> tuple[Ledger, str]:
    """What a program of `node` saw; `shared`: local opens of one node may have one token."""
    lock = seen.lock.decode()
    if seen.what == "granted":
        top, top_node = ledger.token if seen.mode is Mode.EX else ledger.token_ex
        problem = ""
        if seen.token < top or (seen.token == top and not (shared and node == top_node)):
            problem = f"a grant of {lock} has token {seen.token:#x}, an earlier one {top:#x}"
        mine = (seen.token, node)
        if mine > ledger.token:
            ledger = ledger._replace(token=mine)
        if seen.mode is Mode.EX and mine > ledger.token_ex:
            ledger = ledger._replace(token_ex=mine)
        return ledger, problem
    if seen.what == "failed":
        return ledger, _failure(seen)
    at = _index(ledger, seen.value)
    if at < 0:
        problem = f"{lock}: a value was {seen.what} that nobody committed"
    elif at < ledger.floor and seen.what == "read":
        problem = f"{lock}: an older value was read than one that was known before"
    else:
        return ledger._replace(floor=max(at, ledger.floor)), ""
    return ledger, problem


def _failure(seen: Seen) -> str:
    """Which open may fail, and how, while its node is in the domain."""
    allowed = (
        # ENOLCK: its time was over, and the store had not answered.
        (seen.trying and seen.reason in (errno.ETXTBSY, errno.ENOLCK))
        or (not seen.trying and seen.reason == errno.EAGAIN)  # it races with an unlink
        or (seen.reason == errno.EDEADLK and seen.holds)
    )
    if allowed:
        return ""
    return f"an open of {seen.lock.decode()} fails with {errno.errorcode[seen.reason]}"
