"""Leaving one lock: its file is unlinked, or the domain is left (design, engine rule 15)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.core.events import Phase
from dlmfs.core.lockres import Lockres
from dlmfs.engine import changes, granting
from dlmfs.engine.contained import contained
from dlmfs.engine.view import NO_HEAD, NOTHING
from dlmfs.errors import NotGranted

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
    view.committed(change.head, change.granted, result.revision)
    lock.space.left_keys[lock.space.keys.head(lock.name)] = result.revision
    if not change.head.members and change.head.forgettable():
        view.set_head(NO_HEAD, 0, result.revision)
    finish(lock, None)


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
