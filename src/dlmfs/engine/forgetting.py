"""Leaving one lock: its file is unlinked, its domain left, or nobody uses it (design, engine rule 15)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.core.events import Phase
from dlmfs.core.lockres import Lockres
from dlmfs.engine import changes, granting
from dlmfs.engine.contained import contained
from dlmfs.engine.view import NO_HEAD, NOTHING
from dlmfs.errors import NotGranted
from dlmfs.model import EMPTY_LVB

if TYPE_CHECKING:
    from dlmfs.engine.changes import Change
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.errors import DlmfsError
    from dlmfs.store.base import TxnResult

RETRY_S: Final = 0.2
"""Wait before a leave is tried again that the store refused for a reason not known here."""


def step(lock: ClusterLock) -> None:
    """Leave the head, when nothing else is under way."""
    if lock.res.phase is not Phase.IDLE:
        return  # a withdrawal or a hand-over is under way; its end brings us back
    lock.res.surrender()
    mine = lock.view.mine()
    if lock.res.holders:  # left when they have closed; what none of them needs is given up now
        if mine is not None and mine.level > lock.res.level:
            granting.put(lock, level=lock.res.level)
        return
    if mine is None:
        finish(lock, None)
        return
    if lock.forget_waits:
        return
    change = changes.leave(lock.view)
    if change.cut:  # nobody would be left whose part the rest is
        granting.put(lock, level=lock.res.level)
        return
    lock.send(change.txn, partial(_left, lock, change=change, seen=lock.view.head_revision))


def _left(lock: ClusterLock, result: TxnResult, change: Change, seen: int) -> None:
    view = lock.view
    if not result.succeeded:
        lock.adopt(result)
        if view.head_revision == seen:
            # Somebody whom we would leave behind is dead, and our watch has not told us yet.
            # Asked again at once, the store would say the same until it does.
            lock.forget_waits = True
            lock.later(RETRY_S, _again, lock)
        lock.learned()
        return
    _is_out(lock, change, result.revision)
    finish(lock, None)


def _is_out(lock: ClusterLock, change: Change, revision: int) -> None:
    """The head without us is in the store, or it is removed."""
    lock.view.committed(change.head, change.granted, revision)
    lock.space.took_away(lock.space.keys.head(lock.name), revision)
    if not change.head.members and change.head.forgettable():
        lock.view.set_head(NO_HEAD, 0, revision)


def _again(lock: ClusterLock) -> None:
    lock.forget_waits = False
    lock.resume()


@contained
def keep(lock: ClusterLock) -> None:
    """What programs still hold is not left: whoever comes next must see that its holder did not give it
    back (`ending`)."""
    if lock.forgets and lock.res.holders:
        finish(lock, NotGranted("programs of this node have it open still"))


def finish(lock: ClusterLock, error: DlmfsError | None) -> None:
    """Tell who waits for it; with an error the lock is as it was."""
    forgets, lock.forgets = lock.forgets, []
    if error is None:
        # The core's cached level went with the place in the head.
        lock.res = Lockres(lock.space.rule, lock.space.tokens)
        lock.local.wanted = NOTHING
    for done in forgets:
        done(error)


def leave_unused(lock: ClusterLock, done: Callable[[], None]) -> None:
    """Leave the head of a lock that nobody uses, if nothing is lost by it. One attempt, by one commit at
    most. `done` is called if we are out of it and nobody here wants the lock: who opens it while the
    commit is under way waits for that, and asks for the lock as if nothing had been."""
    if not _is_unused(lock):
        return
    mine = lock.view.mine()
    if mine is None:
        done()
        return
    change = changes.leave(lock.view)
    if not _loses_nothing(lock, change):
        return
    lock.res.surrender()
    lock.view.given_up = max(lock.view.given_up, mine.revision)  # rule 5
    lock.view.leaving = True
    lock.send(change.txn, partial(_left_unused, lock, change=change, done=done))


def _is_unused(lock: ClusterLock) -> bool:
    """Nobody here or elsewhere wants the lock, and nothing is left to be done for it."""
    view = lock.view
    if not lock.idle or lock.res.phase is not Phase.IDLE or lock.local.running:
        return False
    if lock.wreck_left is not None or lock.cut or lock.keeps:
        return False
    return not (view.wishes or view.must_look)


def _loses_nothing(lock: ClusterLock, change: Change) -> bool:
    """There is no value, no dead holder is marked, and none is about to be: the head says so as it is
    when the commit is applied, which compares that it is still the one that we know."""
    head, space = change.head, lock.space
    if head.lvb != EMPTY_LVB or lock.view.head.abandoned is not None or head.abandoned is not None:
        return False
    return not any(space.is_gone(node, member.incarnation) for node, member in head.members.items())


def _left_unused(
    lock: ClusterLock, result: TxnResult, change: Change, done: Callable[[], None]
) -> None:
    if lock.refused(result):
        return
    _is_out(lock, change, result.revision)
    if lock.res.in_use or lock.forgets:
        lock.learned()
    else:
        done()
