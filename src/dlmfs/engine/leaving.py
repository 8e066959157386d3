"""The clean end of a domain at one node (design, engine rule 15).

First every lock is brought to rest and left, then what only this node would have needed is removed, and
the membership with it. The last node out takes the heads along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dlmfs.engine.lock import Done
from dlmfs.engine.records import decode_head
from dlmfs.errors import BadState, DlmfsError, LockLost, OutcomeUnknown, Unavailable
from dlmfs.model import Mode
from dlmfs.store.base import Delete, KeyValue, Op, Range, Txn, TxnResult, created_at, unchanged

if TYPE_CHECKING:
    from dlmfs.engine.lockspace import Lockspace

BATCH_MAX = 32
"""Records removed per commit, beside our own."""
OWN = 3
"""Records of our own that go last: the membership, and the two of `keeping`."""
RETRY_S = 0.1
PAGE: Final = 200
"""Heads looked at at once: a domain may have a million."""
OTHERS: Final = 2
"""Membership records that are enough to know that one is not the last."""


def leave(space: Lockspace, done: Done) -> None:
    """Leave all locks, then the domain. `done` gets a refusal, and the space is joined then: one that
    may pass, if there is any."""
    waiting = len(space.locks)
    if not waiting:
        _look(space, done)
        return
    failures: list[DlmfsError] = []

    def one_left(error: DlmfsError | None) -> None:
        nonlocal waiting
        waiting -= 1
        if error is not None and not isinstance(error, BadState):
            failures.append(error)  # else nobody can tell who is in that head: we die in it
        if waiting:
            return
        if not space.live:
            # Fenced meanwhile: the locks were lost, not left, and to go on would look like a clean end.
            done(LockLost(f"the membership ended: {space.reason}"))
        elif failures:
            # Some head still has us; without the membership that would look like a death.
            space.stay()
            again = [error for error in failures if isinstance(error, Unavailable)]
            done((again or failures)[0])
        else:
            _look(space, done)

    for lock in list(space.locks.values()):
        lock.forget(one_left)


def _look(space: Lockspace, done: Done, behind: bytes = b"") -> None:
    """Look at what may have to be removed; of the heads, which may be many, at those behind one."""
    keys = space.keys
    mine = created_at(keys.mine, space.incarnation)
    heads, mails = Range(keys.heads, behind, PAGE), Range(keys.mails, b"", PAGE)
    look = Txn((mine,), (Range(keys.members, b"", OTHERS), heads, mails))
    space.commit(look, lambda result: _looked(space, result, done, behind))


def _looked(space: Lockspace, result: TxnResult | DlmfsError, done: Done, behind: bytes) -> None:
    if isinstance(result, DlmfsError):
        _refused(space, result, done)
        return
    if not result.succeeded:  # we are out: by our own commit of unknown outcome, or by another's
        space.left()
        done(None)
        return
    members, heads, mails = result.responses
    assert isinstance(members, tuple)
    assert isinstance(heads, tuple)
    assert isinstance(mails, tuple)
    useless = [kv for kv in heads if len(members) == 1 and _forgettable(space, kv)]
    litter = [*useless, *(kv for kv in mails if isinstance(kv, KeyValue))]
    guards = [created_at(space.keys.mine, space.incarnation)]
    ops: list[Op] = []
    batch = min(BATCH_MAX, space.store.bounds.operations - OWN)
    for kv in litter[:batch]:
        assert isinstance(kv, KeyValue)
        guards.append(unchanged(kv.key, kv.mod_revision))
        ops.append(Delete(kv.key))
    all_of_it = len(litter) <= batch
    last = all_of_it and len(heads) < PAGE > len(mails)
    if last:
        ops += map(Delete, (space.keys.mine, space.keys.my_files, space.keys.my_news))
    if all_of_it and len(heads) == PAGE:
        following = heads[-1]
        assert isinstance(following, KeyValue)
        behind = following.key
    if not ops:
        _look(space, done, behind)
        return
    txn = Txn(tuple(guards), tuple(ops))
    space.commit(txn, lambda result: _removed(space, result, done, behind, last=last))


def _forgettable(space: Lockspace, kv: object) -> bool:
    """Nor one of a member that died just now: its programs may be at work, and have the lock-delay."""
    assert isinstance(kv, KeyValue)
    try:
        head = decode_head(kv)
    except BadState:
        return False  # nobody knows what would be forgotten
    late = (
        member.level is not Mode.NL and not space.is_dead(node, member.incarnation)
        for node, member in head.members.items()
    )
    return head.forgettable() and not any(late)


def _removed(
    space: Lockspace, result: TxnResult | DlmfsError, done: Done, behind: bytes, *, last: bool
) -> None:
    if isinstance(result, DlmfsError):
        _refused(space, result, done)
    elif last and result.succeeded:
        space.took_away(space.keys.mine, result.revision)
        space.left()
        done(None)
    else:  # there is more; or a head changed under us; or we are out, which it will see
        _look(space, done, behind if result.succeeded else b"")


def _refused(space: Lockspace, error: DlmfsError, done: Done) -> None:
    if isinstance(error, OutcomeUnknown) and space.live:
        # If it was applied, our membership is gone, and the next look sees that.
        space.loop.call_later(RETRY_S, space.enter, _look, space, done)
    elif isinstance(error, LockLost):
        space.left()
        done(error)
    else:
        space.stay()
        done(error)
