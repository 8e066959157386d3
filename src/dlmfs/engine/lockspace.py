"""One domain at one node: membership and its epoch, and what the watch tells.

Rules of this file
------------------
* When an outcome is unknown, or the watch has a gap, m/<me> is put again first: a late transaction can
  then no longer apply, since each carries the guard of its epoch (`sender`; engine rules 2, 4).
* `revision` is how far the watch has told us; all of `members` and `wishes` is true as of then.
* Peers ignore a put of m/<node> that keeps the create revision: it is only a new epoch.
* Whoever calls from outside calls a `contained` method: an exception that is no lock's own costs this
  membership, which is joined again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from dlmfs.core.events import Claim
from dlmfs.core.lease import LeaseState
from dlmfs.core.tokens import PLAIN, Tokens
from dlmfs.engine import forgetting, hearing, leaving
from dlmfs.engine.badrecords import BadRecords
from dlmfs.engine.changes import grants_max
from dlmfs.engine.contained import contained
from dlmfs.engine.deaths import Deaths
from dlmfs.engine.keeping import Files
from dlmfs.engine.lock import ClusterLock, Done
from dlmfs.engine.records import Keys, Wish, encode_member
from dlmfs.engine.sender import Sender
from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown, Unavailable
from dlmfs.model import DeadValue, HolderRule
from dlmfs.store.base import (
    Compare,
    Delete,
    Get,
    KeyValue,
    Put,
    Range,
    Store,
    Txn,
    TxnResult,
    Watch,
    WatchBatch,
    WatchGap,
    created_at,
    unchanged,
)
from dlmfs.timing import GRACE_S, Scheduler, Timing

if TYPE_CHECKING:
    from collections.abc import Sequence

RETRY_S: Final = 0.1
NO_LEASE: Final = 0
"""A key that stands on it was put by hand, or its node's record was overwritten so."""


class Host(Protocol):
    """What the node does for its locks."""

    def granted(self, claim: Claim) -> None: ...

    def failed(self, claim: Claim, reason: int) -> None: ...

    def notify(self, claim: Claim) -> None: ...

    def identify(
        self, claim: Claim, holders: Sequence[Claim], done: Callable[[bool], None]
    ) -> None:
        """Whether the claim's process, or an ancestor of it, is one of the holders' (rule 11): `done`
        gets the answer, now or later, and surely."""

    def domain_lost(self, domain: bytes, reason: str) -> None: ...

    def lock_lost(
        self, lock: ClusterLock, holders: Sequence[Claim], waiters: Sequence[Claim], /
    ) -> None:
        """The state of one lock was broken: these claims on it have ended, and what else is on it."""

    def broken(self, where: str, error: Exception) -> None:
        """An exception that nobody expected, and what it costs: to be logged, counted and named."""


def _always() -> bool:
    return True


class Life(enum.Enum):
    """The life of a domain at this node."""

    JOINING = "joining"
    JOINED = "joined"
    LEAVING = "leaving"
    LEFT = "left"
    LOST = "lost"


class Lockspace:
    """See the rules at the head of the file. `lease` is the session's, which has to be renewed where it
    is `leased`; `ended` is called when the membership was lost."""

    def __init__(
        self,
        store: Store,
        loop: Scheduler,
        host: Host,
        *,
        domain: bytes,
        node: str,
        lease: int,
        rule: HolderRule = HolderRule.NODE,
        timing: Timing | None = None,
        lock_delay_s: float = 0.0,
        grace_s: float = GRACE_S,
        dead_value: DeadValue = DeadValue.KEEP,
        tokens: Tokens = PLAIN,
        serving: Callable[[], bool] | None = None,
        ended: Callable[[Lockspace], None] | None = None,
        leased: bool = True,
    ) -> None:
        self.store = store
        self.loop = loop
        self.host = host
        self.domain = domain
        self.node = node
        self.lease = lease
        self.rule = rule
        self.timing = timing or Timing()
        self.lock_delay_s = lock_delay_s
        self.grace_s = grace_s
        self.dead_value = dead_value
        self.tokens = tokens
        self.serving = serving or _always
        self._ended = ended
        self._leased = leased
        self.keys = Keys(domain, node)
        self.grants_max = grants_max(store.bounds)
        self.life = Life.JOINING
        self.reason: str | None = None
        """Why it was lost."""
        self.revision = 0
        self.incarnation = 0
        self.epoch = 0
        self.members: dict[str, int] = {}
        self.wishes: dict[bytes, dict[str, Wish]] = {}
        self.locks: dict[bytes, ClusterLock] = {}
        self.newest = 0
        """The revision of the last thing that we made or learned there."""
        self.left_keys: dict[bytes, int] = {}
        """Where nothing of ours may stand that is older than that revision: we took it away. Kept until a
        renewal has proved it (`timeline`)."""
        self.frozen = False
        self.commits = 0
        self.answers = 0
        self.sender = Sender(self)
        self.files = Files(self)
        self._watch: Watch | None = None
        self._relisting = False
        self._unsure = False  # from an unknown outcome until the new epoch is in force
        self._suspended = False
        self.deaths = Deaths(loop, lock_delay_s, self._look_again)
        self._askers: list[Done] = []
        """Who waits for the join, or the leave, that is under way."""
        self.bad = BadRecords()
        """What stands below the domain's keys and cannot be read."""

    @property
    def running(self) -> bool:
        """Transactions of locks may go out."""
        return self.live and not self._unsure and not self._suspended

    @property
    def live(self) -> bool:
        return self.life in (Life.JOINED, Life.LEAVING)

    @property
    def leaving(self) -> bool:
        """Its own hand may take the membership away."""
        return self.life is Life.LEAVING

    def is_gone(self, node: str, incarnation: int) -> bool:
        """Whether that member of a head has ended. Never said of one younger than our view."""
        return incarnation <= self.revision and self.members.get(node) != incarnation

    def is_dead(self, node: str, incarnation: int, *, surely: bool = False) -> bool:
        """Whether it has ended (`surely`: it has), and its locks may be granted: with `lock_delay_s`,
        only so long after we noticed, so that what it had under way elsewhere can end, too."""
        gone = self.is_gone(node, incarnation)
        return (gone or surely) and self.deaths.counts(node, incarnation, noticed=gone)

    @contained
    def _look_again(self) -> None:
        if self.live:
            for lock in list(self.locks.values()):
                lock.member_gone()

    def lock(self, name: bytes) -> ClusterLock:
        """The lock resource `name`, made when first asked for."""
        lock = self.locks.get(name)
        if lock is None:
            lock = self.locks[name] = ClusterLock(self, name)
        return lock

    def put_anew(self, name: bytes) -> ClusterLock:
        """A new resource takes the place of one that broke. It knows nothing: no wish, no head."""
        self.wishes[name] = {}
        lock = self.locks[name] = ClusterLock(self, name)
        lock.view.wishes_at = -1
        return lock

    def drop(self, name: bytes) -> None:
        """Forget a lock that this node has left: its file is unlinked."""
        self.locks.pop(name, None)
        self.files.gone(name)
        if not self.wishes.get(name, True):
            del self.wishes[name]

    def took_away(self, key: bytes, revision: int) -> None:
        """A commit of ours has removed that key. Where there is no lease nothing looks for it again."""
        if self._leased:
            self.left_keys[key] = revision

    # -- joining and leaving -----------------------------------------------------------------

    def join(self, done: Done) -> None:
        """Become a member. Unavailable if the store is out of reach or our old self still
        stands there; the caller may try again."""
        self._ask_to_join(self._once(done))

    def _ask_to_join(self, done: Done) -> None:
        if self.life is Life.JOINING:
            txn = self._putting(created_at(self.keys.mine, 0))
            self.commit(txn, lambda result: self._joined(result, done))
        else:
            done(Unavailable("another join of this domain took the place of this one"))

    def _once(self, done: Done) -> Done:
        """`done`, which `wreck` calls if nobody else has."""

        def told(error: DlmfsError | None) -> None:
            if told in self._askers:
                self._askers.remove(told)
                done(error)

        self._askers.append(told)
        return told

    def _putting(self, compare: Compare) -> Txn:
        """Put the membership record, and read who is here and what they wish for."""
        keys = self.keys
        record = Put(keys.mine, encode_member(self.lease), self.lease)
        puts = (record, Range(keys.members), Range(keys.wishes))
        return Txn((compare,), puts, (Get(keys.mine),))

    def give_up_joining(self) -> None:
        """Another join of this domain begins in this session, and will take away whatever this one may
        have put. Going on, each would take the other's record for an attempt of its own."""
        if self.life is Life.JOINING:
            self.life = Life.LEFT

    def _joined(self, result: TxnResult | DlmfsError, done: Done) -> None:
        if self.life is not Life.JOINING:
            self._ask_to_join(done)
            return
        if isinstance(result, OutcomeUnknown):
            # Put with a compare, on our own lease: asking again is safe, and if the first one
            # was applied after all, the record that stands in the way carries our lease.
            self.loop.call_later(RETRY_S, self.enter, self._ask_to_join, done)
            return
        if isinstance(result, DlmfsError):
            done(result)
            return
        if not result.succeeded:
            old = result.responses[0]
            assert isinstance(old, KeyValue)
            if old.lease in (self.lease, NO_LEASE):
                self._rejoin_own(old, done)
            else:
                done(Unavailable(f"node {self.node} is still a member of this domain: try again"))
            return
        self.incarnation = self.epoch = self.newest = result.revision
        _, members, wishes = result.responses
        self._start(members, wishes, result.revision)
        self.life = Life.JOINED
        self._withdraw_former()
        done(None)

    def _withdraw_former(self) -> None:
        """What a former membership in this session wished for stands on our lease still, though nobody
        here waits for it: all behind it would wait for ever."""
        for lock, queue in self.wishes.items():
            wish = queue.get(self.node)
            if wish is not None and wish.incarnation != self.incarnation:
                key = self.keys.wish(lock, self.node)
                self._take_away(Txn((created_at(key, wish.revision),), (Delete(key),)))

    def _take_away(self, txn: Txn) -> None:
        def done(result: TxnResult | DlmfsError) -> None:
            if isinstance(result, Unavailable) and self.live:
                self.loop.call_later(RETRY_S, self.enter, self._take_away, txn)

        self.commit(txn, done)

    def _rejoin_own(self, old: KeyValue, done: Done) -> None:
        txn = Txn(
            (created_at(self.keys.mine, old.create_revision),),
            (Delete(self.keys.mine),),
        )
        self.commit(txn, lambda _result: self._ask_to_join(done))

    def _start(self, members: Any, wishes: Any, revision: int) -> None:
        hearing.begin(self, members, wishes, revision)
        keys = self.keys
        prefixes = (keys.members, keys.wishes, keys.mails, keys.news)
        self._watch = self.store.watch(prefixes, revision + 1, self._told)
        self.files.look_again()

    def leave(self, done: Done) -> None:
        """Give everything back, then the membership (rule 15); what programs hold when they have
        closed it. With an error the domain stays joined.
        """
        self.life = Life.LEAVING
        self.files.stop()
        self.enter(leaving.leave, self, self._once(done))

    def keep(self) -> None:
        """The leave waits no longer for what programs hold: that stays in its head."""
        for lock in list(self.locks.values()):
            forgetting.keep(lock)

    def stay(self) -> None:
        """The leave came to nothing."""
        if self.life is Life.LEAVING:
            self.life = Life.JOINED

    def left(self) -> None:
        """The membership is given back."""
        self._stop()
        self.life = Life.LEFT
        for lock in list(self.locks.values()):
            lock.lose(Unavailable.errno)  # nobody should wait there any more

    def lose(self, reason: str) -> None:
        """This incarnation is over (promise 3): nothing is served any more."""
        if not self.live and self.life is not Life.JOINING:
            return
        self._stop()
        self.life, self.reason = Life.LOST, reason
        for lock in list(self.locks.values()):
            lock.lose(Unavailable.errno)
        self.host.domain_lost(self.domain, reason)
        if self._ended is not None:
            self._ended(self)

    def wreck(self, error: Exception) -> None:
        """An invariant of the domain is broken: its membership here is over."""
        self.host.broken(f"domain {self.domain.decode(errors='replace')}", error)
        self.lose(f"a fault of this daemon: {type(error).__name__}")
        for asker in list(self._askers):
            asker(LockLost(f"the membership ended: {self.reason}"))

    @contained
    def enter(self, act: Callable[..., None], *args: Any) -> None:
        """Do a part of this domain's own work: from a timer."""
        act(*args)

    @contained
    def suspend(self, state: LeaseState) -> None:
        """SUSPECT: serve what is here, and ask the store for nothing until the lease is good. UNPROVED:
        serve nothing of it either."""
        before, self._suspended = self._suspended, state is not LeaseState.HEALTHY
        frozen = state is LeaseState.UNPROVED
        if frozen != self.frozen:
            self.frozen = frozen
            for lock in list(self.locks.values()):
                lock.freeze(frozen)
        if before and not self._suspended:
            self.sender.flush()
            for lock in list(self.locks.values()):
                lock.resume()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self.sender.clear()
        self.files.stop()

    # -- the watch ---------------------------------------------------------------------------

    @contained
    def _told(self, batch: WatchBatch | WatchGap) -> None:
        if not self.serving() or not self.live:
            return
        if isinstance(batch, WatchGap):
            self._watch, self._relisting = None, False
            self.revive()
            return
        hearing.note(self, batch)

    # -- transactions of the domain's own ----------------------------------------------------

    def commit(self, txn: Txn, done: Callable[[TxnResult | DlmfsError], None]) -> None:
        """A transaction of the domain's own, at once."""
        self.commits += 1
        self.store.txn(txn, partial(self._count, done))

    @contained
    def _count(
        self, done: Callable[[TxnResult | DlmfsError], None], result: TxnResult | DlmfsError
    ) -> None:
        self.answers += isinstance(result, TxnResult)
        done(result)

    # -- after an unknown outcome or a gap ----------------------------------------------------

    def revive(self) -> None:
        """Rule 4: a new epoch first, then everything that is uncertain is read anew."""
        if self._unsure or not self.live:
            return
        self._unsure = True
        self._renew_epoch()

    def _quiet(self) -> set[bytes]:
        """The locks that nobody wishes for, here or elsewhere."""
        return {name for name, lock in self.locks.items() if lock.idle and not lock.view.wishes}

    def relist(self) -> None:
        """The store may not know what the watch has told last: who is here and who waits is read anew,
        and the locks that had to do with it."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch, self._relisting = None, True
        self.revive()

    def _renew_epoch(self) -> None:
        # Compared with the old epoch, or an earlier attempt of unknown outcome, applied late,
        # would change the epoch behind our back.
        self.commit(self._putting(unchanged(self.keys.mine, self.epoch)), self._revived)

    def _revived(self, result: TxnResult | DlmfsError) -> None:
        if not self.live:
            return
        if isinstance(result, LockLost):
            self.lose(str(result))
            return
        if isinstance(result, DlmfsError):
            self.loop.call_later(RETRY_S, self.enter, self._renew_epoch)
            return
        if not result.succeeded:
            mine = result.responses[0]
            if isinstance(mine, KeyValue) and mine.create_revision == self.incarnation:
                self.epoch = mine.mod_revision
                self._renew_epoch()
            else:
                self.lose("the membership record was removed from the store")
            return
        self.epoch = result.revision
        if self._watch is None:  # after a gap
            _, members, wishes = result.responses
            quiet = self._quiet() if self._relisting else set()
            self._start(members, wishes, result.revision)
            quiet &= self._quiet()
            for name, lock in self.locks.items():
                if name not in quiet:
                    lock.reread()
        self._unsure = False
        self.sender.flush()
        for lock in list(self.locks.values()):
            lock.resume()
