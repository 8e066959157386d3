"""The transactions of one lock: from what is known and wanted to compares and operations. Pure.

Rule 5 governs each: it compares the head's revision, the creation of every wish it grants, and
that nothing in the queue is newer than what we know. Every `otherwise` ends with a reading of head
and queue, so a refusal brings its own cure.

Each is small enough for a commit of its own, however many nodes wait or are in the head (rule 17):
what does not fit is left for the next one, in the same order.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from dlmfs.engine.queue import bury, fits
from dlmfs.engine.records import Abandoned, Head, Member, Wish, encode_mail
from dlmfs.engine.view import View
from dlmfs.model import Mode
from dlmfs.store.base import (
    Bounds,
    Compare,
    Delete,
    Get,
    Op,
    Put,
    Range,
    Txn,
    created_at,
    none_newer,
    unchanged,
)

AROUND: Final = 1
"""Operations that a commit takes for itself when it carries one lock's transaction (`sender`)."""
BESIDE_GRANTS: Final = 3
"""Operations of a change beside its grants: the head, our emptied mail slot, our next wish."""
PER_GRANT: Final = 2
"""The wish deleted, the mail put."""


class Change(NamedTuple):
    """A transaction that puts `head` and grants `granted`; `cut`: others must wait for the next."""

    txn: Txn
    head: Head
    granted: list[Wish]
    cut: bool


def grants_max(bounds: Bounds) -> int:
    """How many wishes one commit may grant."""
    most = (bounds.operations - AROUND - BESIDE_GRANTS) // PER_GRANT
    assert most > 0, bounds
    return most


def mail_max(bounds: Bounds) -> int:
    """The longest head, in bytes, that goes along in every mail of a commit: there may be half as many of
    these as it may have operations. The readers of a longer one fetch it, each for itself."""
    return bounds.size // bounds.operations


def refusals_max(bounds: Bounds) -> int:
    """How many trylock wishes one commit may refuse."""
    return bounds.operations - AROUND


def reading(view: View) -> tuple[Op, ...]:
    keys = view.space.keys
    return (Get(keys.head(view.name)), Range(keys.queue(view.name)))


def own_wish(view: View, mode: Mode, *, trying: bool, convert: bool, revision: int) -> Wish:
    space = view.space
    return Wish(space.node, space.incarnation, mode, trying, convert, revision, space.lease)


def _filing(view: View, mode: Mode, *, trying: bool, convert: bool) -> Put:
    wish = own_wish(view, mode, trying=trying, convert=convert, revision=0)
    return Put(view.space.keys.wish(view.name, wish.node), wish.encode(), wish.lease)


def _guards(view: View, granted: list[Wish]) -> tuple[Compare, ...]:
    keys = view.space.keys
    return (
        unchanged(keys.head(view.name), view.head_revision),
        none_newer(keys.queue(view.name), max(view.wishes_at, view.space.revision)),
        *(created_at(keys.wish(view.name, w.node), w.revision) for w in granted),
    )


def _empty_slot(view: View) -> list[Op]:
    """Take our own mail away with a change that shows we have read it."""
    keys = view.space.keys
    return [Delete(keys.mail(view.space.node, view.name))] if view.mailed else []


def _delivery(view: View, granted: list[Wish], record: bytes) -> list[Op]:
    """Remove the granted wishes and fill their nodes' mail slots; our own needs none."""
    keys = view.space.keys
    ops: list[Op] = []
    told = record if len(record) <= mail_max(view.space.store.bounds) else None
    for wish in granted:
        ops.append(Delete(keys.wish(view.name, wish.node)))
        if wish.node != view.space.node:
            mail = keys.mail(wish.node, view.name)
            ops.append(Put(mail, encode_mail(wish, told), wish.lease))
    return ops + _empty_slot(view)


def change(view: View, *, level: Mode, then: Mode = Mode.NL, lvb: bytes | None = None) -> Change:
    """Ourselves at `level`, perhaps a new value, then the grant pass (rule 6); with `then`, our
    next wish in the same commit (rule 8)."""
    head = view.at_level(level)
    if lvb is not None:
        head = head._replace(lvb=lvb, abandoned=None)
    if then is Mode.NL:
        return _granting(view, head)
    return _granting(view, head, _filing(view, then, trying=False, convert=False))


def join(view: View) -> Change:
    """A place at NL for a node that has the lock's file and no place yet: it keeps the value alive."""
    space = view.space
    head = bury(view.head, view.is_dead)
    members = {**head.members, space.node: Member(space.incarnation, Mode.NL, 0)}
    return _granting(view, head._replace(members=members))


def _granting(view: View, head: Head, *more: Op) -> Change:
    """Put the head that a grant pass makes of `head`."""
    head, granted, cut = view.grant_pass(head)
    record = head.encode()
    put = Put(view.space.keys.head(view.name), record)
    ops = (put, *_delivery(view, granted, record), *more)
    return Change(Txn(_guards(view, granted), ops, reading(view)), head, granted, cut)


def take(view: View, mode: Mode, *, trying: bool, convert: bool) -> tuple[Txn, Head | None]:
    """Rule 7: one commit if the head is free or as guessed and nobody waits, else a wish. The head
    is what the first would put; None: only the wish is filed."""
    space = view.space
    filing = (_filing(view, mode, trying=trying, convert=convert), *reading(view))
    head = bury(view.head, view.is_dead)
    direct = not any(w.node != space.node for w in view.wishes.values())
    if not (direct and fits(head.members, space.node, space.incarnation, mode)):
        return Txn((), filing), None
    members = dict(head.members)
    members[space.node] = Member(space.incarnation, mode, 0)
    head = head._replace(members=members)
    ops = (Put(space.keys.head(view.name), head.encode()), *_empty_slot(view))
    return Txn(_guards(view, []), ops, filing), head


def renew(view: View) -> tuple[Txn, Head]:
    """A larger token at the level we have: holder=file has used up this one's counter."""
    mine = view.mine()
    assert mine is not None
    members = dict(view.head.members)
    members[view.space.node] = mine._replace(revision=0)
    head = view.head._replace(members=members)
    key = view.space.keys.head(view.name)
    return Txn(_guards(view, []), (Put(key, head.encode()),), reading(view)), head


def withdraw(view: View, wish: Wish) -> Txn:
    """Take our wish back; if it is no longer there, it was granted (rule 8)."""
    key = view.space.keys.wish(view.name, wish.node)
    return Txn((created_at(key, wish.revision),), (Delete(key),), reading(view))


def refuse(view: View, victims: list[Wish]) -> Txn:
    """Delete the trylock wishes that our users stand in the way of (rule 10)."""
    keys = view.space.keys
    guards = tuple(created_at(keys.wish(view.name, w.node), w.revision) for w in victims)
    deletes = tuple(Delete(keys.wish(view.name, w.node)) for w in victims)
    return Txn(guards, deletes, reading(view))


def clear(view: View) -> Change:
    """What our death would do to the head: ours is no level any more, with the mark if it was EX; our
    wish and mail go. We stay in it at NL, since we have the lock's file and keep its value alive."""
    space = view.space
    mine = view.mine()
    head = bury(view.head, view.is_dead)
    if mine is not None:
        abandoned = head.abandoned
        if mine.level is Mode.EX:
            abandoned = Abandoned(space.node, mine.revision)
        members = {**head.members, space.node: mine._replace(level=Mode.NL)}
        head = head._replace(members=members, abandoned=abandoned)
    head, granted, cut = view.grant_pass(head, view.others())
    record = head.encode()
    keys = space.keys
    ops: list[Op] = [Delete(keys.wish(view.name, space.node)), *_delivery(view, granted, record)]
    if view.head_revision or granted:
        ops.append(Put(keys.head(view.name), record))
    return Change(Txn(_guards(view, granted), tuple(ops), reading(view)), head, granted, cut)


def leave(view: View) -> Change:
    """Leave the head, or remove it with the last member (rule 15)."""
    space, keys = view.space, view.space.keys
    head = view.marked(bury(view.head, view.is_dead))
    members = {n: m for n, m in head.members.items() if n != space.node}
    head = head._replace(members=members)
    head, granted, cut = view.grant_pass(head)
    record = head.encode()
    key = keys.head(view.name)
    # Somebody left behind must be alive, or nobody ever looks at this head again (trap 9): one is enough,
    # since whoever leaves after us compares the same. A wish that is granted stands for its node.
    living = (n for n, m in head.members.items() if not space.is_gone(n, m.incarnation))
    left = None if granted else next(living, None)
    alive = () if left is None else (created_at(keys.member(left), head.members[left].incarnation),)
    keep = head.members or not head.forgettable()
    ops = (Put(key, record) if keep else Delete(key), *_delivery(view, granted, record))
    return Change(Txn((*_guards(view, granted), *alive), ops, reading(view)), head, granted, cut)
