"""What a broken invariant in one lock's state costs: that lock, and nothing else (engine rule 16).

Rules of this file
------------------
* Nothing of the broken state is believed or served: its claims end at once, and a new lock resource
  takes its place, which reads everything anew under a new epoch, so that what the old one may have
  sent can no longer apply (engine rule 4).
* To the cluster it is a death: the new resource first takes our place out of the head, with the mark if
  it was exclusive, after the lock-delay. Nobody here is granted the lock before that.
* Who held the lost lock has its time first, as at every end that is no death of the processes: until
  they have closed, at most the grace.
* If the new resource breaks, too, before it has done that, the domain's membership ends as a death.
* A head that cannot be read costs the same, for as long as it is so: whoever asks for the lock has it
  read again. To leave the domain meanwhile is to die in that head.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.core.events import Stage
from dlmfs.core.lockres import Lockres
from dlmfs.engine import changes
from dlmfs.engine.changes import Change
from dlmfs.engine.view import NO_HEAD
from dlmfs.errors import BadState, LockLost
from dlmfs.model import Mode
from dlmfs.store.base import Delete, Txn, TxnResult, created_at

if TYPE_CHECKING:
    from dlmfs.core.events import Claim
    from dlmfs.engine.lock import ClusterLock, Done

log = logging.getLogger("dlmfs.node")

AGAIN_S: Final = 1.0
AGAIN_MAX_S: Final = 30.0
"""A head that cannot be read is read again when somebody asks for the lock, and after as long again as
it has been so, within these bounds: nobody else may be here to take our place out of it."""


class Wreck:
    """What a wreck leaves to be done. `since`: when it happened; `holders`: those of the lost lock that
    have not closed; `unread`: it was the head, which could not be read."""

    __slots__ = ("holders", "since", "unread")

    def __init__(self, since: float, holders: set[int], *, unread: bool) -> None:
        self.unread = unread
        self.since = since
        self.holders = holders

    @property
    def phase(self) -> str:
        """For people."""
        return "unread" if self.unread else "recovering"


def wreck(lock: ClusterLock, error: Exception) -> None:
    """End all that `lock` is to anybody here, and put a new resource in its place."""
    space, former = lock.space, lock.wreck_left
    if lock.heir is not None:
        return  # the outer frames of what broke it
    if not isinstance(error, BadState):  # else no fault of ours, and named among the bad records
        where = f"{space.domain.decode(errors='replace')}/{lock.name.decode(errors='replace')}"
        space.host.broken(f"lock {where}", error)
    unread = isinstance(error, BadState)
    holders = _end(lock)
    forgets, lock.forgets = lock.forgets, []
    if not space.live:
        for done in forgets:
            done(None)
        return
    left = Wreck(space.loop.time(), {claim.fh for claim in holders}, unread=unread)
    if former is not None:
        if not unread:
            space.lose(f"one of its locks cannot be recovered: {type(error).__name__}")
            for done in forgets:
                done(None)
            return
        left.since, left.holders = former.since, former.holders
    lock.heir = heir = space.put_anew(lock.name)
    heir.wreck_left = left
    heir.reread()
    if isinstance(error, BadState):
        _leave_unread(lock, heir, error, forgets)
    else:
        heir.forgets = forgets
    if former is None:
        space.revive()


def _leave_unread(
    lock: ClusterLock, heir: ClusterLock, error: BadState, forgets: list[Done]
) -> None:
    """The head cannot be read: nobody here waits for it, but for another look."""
    _wish_no_more(lock)
    for done in forgets:
        done(error)
    assert heir.wreck_left is not None
    loop = lock.space.loop
    unread_s = loop.time() - heir.wreck_left.since
    loop.call_later(min(max(unread_s, AGAIN_S), AGAIN_MAX_S), heir.resume)


def _wish_no_more(lock: ClusterLock) -> None:
    """Take our wish away: while the head cannot be read nobody here waits, and whoever can read it again
    first would grant it to us. Applied late it may take a later wish, which is then put again."""
    space = lock.space
    wish = space.keys.wish(lock.name, space.node)
    mine = created_at(space.keys.mine, space.incarnation)
    space.commit(Txn((mine,), (Delete(wish),)), lambda _result: None)


def _end(lock: ClusterLock) -> list[Claim]:
    """Take the broken state away, and tell everybody that had to do with it. Who held it is returned."""
    space, res = lock.space, lock.res
    holders, waiters = list(res.holders.values()), list(res.waiters.values())
    lock.res = Lockres(space.rule, space.tokens)
    lock.res.lose(0)
    for claim in (*holders, *waiters):  # before anybody is told: that may break, too
        claim.stage = Stage.ENDED
    space.sender.drop(lock)
    lock.local.abandon()
    lost = LockLost("the lock was lost: its state here was broken")
    for tell in (
        partial(space.host.lock_lost, lock, holders, waiters),
        partial(lock.value.lose, lost),
    ):
        try:
            tell()
        except Exception as error:
            space.host.broken("the end of a lost lock", error)
    return holders


def closed(lock: ClusterLock, claim: Claim) -> None:
    """A holder of the lost `lock` is gone."""
    heir = lock.heir
    if heir is None or heir.wreck_left is None:
        return
    left = heir.wreck_left.holders
    left.discard(claim.fh)
    if not left:
        heir.resume()


def clear(lock: ClusterLock) -> Change | None:
    """The change that takes our place out of the head, as our death would; None if nothing is to be
    done, or not yet (then `lock.resume` is called in time)."""
    view, space, left = lock.view, lock.space, lock.wreck_left
    assert left is not None
    mine = view.mine()
    if mine is not None and mine.level is not Mode.NL:
        wait = max(space.lock_delay_s, space.grace_s if left.holders else 0.0)
        until = left.since + wait
        now = space.loop.time()
        if now < until:
            space.loop.call_later(until - now, lock.resume)
            return None
    view.mailed = True  # what lies in our slot is the former resource's
    return changes.clear(view)


def cleared(lock: ClusterLock, result: TxnResult, change: Change) -> None:
    """The answer to `clear`'s change, when it was applied."""
    view = lock.view
    there_is_one = bool(view.head_revision or change.granted)
    view.committed(change.head, change.granted, result.revision)
    if not there_is_one:
        view.set_head(NO_HEAD, 0, result.revision)
    view.wishes.pop(lock.space.node, None)
    view.wish = view.vanished = None
    lock.wreck_left = None
    lock.cut = change.cut
    log.info("lock %r of domain %r can be had again", lock.name, lock.space.domain)
