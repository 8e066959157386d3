"""Putting a new head: giving up, granting those who wait, writing the value (engine rules 5, 6, 17).

Rules of this file
------------------
* Whoever puts a head grants by it what can be granted, in the queue's order, as far as a commit goes.
* What is left of a pass is the part of whoever made it, and of the first of those who still wait: the
  one may be gone by then, and the other stopped.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dlmfs.engine import changes
from dlmfs.model import EMPTY_LVB, Mode

if TYPE_CHECKING:
    from dlmfs.engine.changes import Change
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.store.base import TxnResult


def put(lock: ClusterLock, *, level: Mode, then: Mode = Mode.NL, lvb: bytes | None = None) -> None:
    """Commit a new head: ourselves at `level`, perhaps a new value, then the grant pass; with `then`, our
    next wish goes along."""
    mine = lock.view.mine()
    if mine is not None and mine.level > level:
        # From the sending on, what this grant gave us is no longer ours (rule 5).
        lock.view.given_up = mine.revision
    send(lock, changes.change(lock.view, level=level, then=then, lvb=lvb), then, lvb)


def send(lock: ClusterLock, change: Change, then: Mode = Mode.NL, lvb: bytes | None = None) -> None:
    """Commit `change`, which files our next wish `then`, and writes `lvb`."""
    lock.cut |= change.cut  # already: if its outcome is never known, a reading tells what is left
    first = lvb is not None and lvb != EMPTY_LVB and lock.view.head.lvb == EMPTY_LVB
    done = partial(_put, lock, change=change, then=then, writing=lvb is not None)
    lock.send(change.txn, done, first_value=first)


def _put(
    lock: ClusterLock, result: TxnResult, change: Change, then: Mode, *, writing: bool
) -> None:
    if lock.refused(result):
        return
    view = lock.view
    lock.cut = change.cut
    view.committed(change.head, change.granted, result.revision)
    if then is not Mode.NL and result.revision > lock.space.revision:
        # Otherwise the watch has told us already of this wish, and perhaps of its end.
        view.wishes[lock.space.node] = changes.own_wish(
            view, then, trying=False, convert=False, revision=result.revision
        )
    if writing:
        lock.value.written(None)
    lock.learned()


def rest(lock: ClusterLock) -> None:
    """Go on with a pass that was cut short, unless another has done so meanwhile."""
    if lock.view.grant_pass(lock.view.at_level(lock.res.level)).granted:
        put(lock, level=lock.res.level)
    else:
        lock.cut = False
        lock.resume()
