"""One node's life in the store: its session and lease; fencing and coming back; its end.

    n/<node>         the node's record, on its session's lease: who it is, for `dlmfs nodes` (`naming`)
    n/<node>/evict   an operator's mark: the node with this record must go (`eviction`)
    n/<node>/ask/    other nodes' questions, and n/<node>/answer/ what they answer (`questions`)

Rules of this file
------------------
* FENCED is final for an incarnation. What comes back is another one, with a new session, and
  nothing of the old one is served again (promise 3).
* `serving` is asked in every operation, not only by a timer: a process that was stopped may run on
  long after its lease did.
* UNPROVED, from the loss of a connection until the store has been shown to be the one that it was
  (`timeline`), nothing is served of what is cached. If it is not, the node is fenced, and comes back
  when all nodes have heard of it (`restored`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from dlmfs.core.lease import LeaseState, lease_state
from dlmfs.core.tokens import PLAIN, Tokens
from dlmfs.engine.badrecords import BadRecords
from dlmfs.engine.contained import contained
from dlmfs.engine.domains import Domains
from dlmfs.engine.ending import END_S, PATIENCE_S, Ending
from dlmfs.engine.eviction import Mark, decode_mark, mark_key
from dlmfs.engine.lock import Done
from dlmfs.engine.lockspace import Host as LockHost
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.naming import Named, Naming, is_ours, record_of
from dlmfs.engine.questions import Questions
from dlmfs.engine.records import NODES
from dlmfs.engine.restored import Recovery
from dlmfs.engine.timeline import Timeline
from dlmfs.errors import BadState, DlmfsError, LockLost, OutcomeUnknown, StoreRestored, Unavailable
from dlmfs.model import DeadValue, HolderRule
from dlmfs.store.base import (
    Event,
    Get,
    KeyValue,
    Put,
    Range,
    Session,
    Store,
    Txn,
    TxnResult,
    Watch,
    WatchBatch,
    WatchGap,
    created_at,
)
from dlmfs.timing import GRACE_S, Clock, Scheduler, Timer, Timing

log = logging.getLogger("dlmfs.node")

RETRY_S: Final = 0.5
LETTERS_MAX: Final = 200

REMOVED: Final = "the node's record was removed from the store"
OVERWRITTEN: Final = "the node's record was overwritten in the store"


class Host(LockHost, Protocol):
    """What a node's programs see of it: the file system, or a simulated one."""

    def fenced(self, reason: str) -> None:
        """Nothing is served any more; the domains have been told one by one."""

    def rejoined(self, space: Lockspace) -> None:
        """The domain's new membership takes the place of the lost one."""

    def holding(self) -> bool:
        """Whether any program holds a lock here."""

    def ends(self, reason: str) -> None:
        """The node's life ends: wait for nothing any more, grant nothing, and tell the holders. What
        they have open stays theirs until they close it."""


@dataclass(frozen=True, slots=True)
class Config:
    """`names`: those that the node may have, the first free one is taken; `facts`: what its record
    says of it; `is_over`: whether the process that such facts name provably exists no more."""

    names: Sequence[str]
    facts: Mapping[str, object]
    is_over: Callable[[Mapping[str, object]], bool]
    rule: HolderRule = HolderRule.NODE
    ttl_s: float = Timing().ttl_s
    lock_delay_s: float = 0.0
    grace_s: float = GRACE_S
    dead_value: DeadValue = DeadValue.KEEP


class Membership:
    """See the rules at the head of the file. `clock` counts suspended time, `loop` need not; `host`
    is to be set before `start`."""

    host: Host

    def __init__(self, store: Store, loop: Scheduler, clock: Clock, config: Config) -> None:
        self.store = store
        self.loop = loop
        self.clock = clock
        self.config = config
        self.timing = Timing(config.ttl_s)
        self.name = config.names[0]
        self.record = 0
        """The create revision of our record n/<name>."""
        self.session: Session | None = None
        self.state = LeaseState.REJOINING
        self.reason: str | None = None
        """Why the node was fenced last."""
        self.final = False
        """It was fenced for good: the store is another one, or an operator wants it out."""
        self.fences = 0
        self.held_until = 0.0
        """On the loop's clock: this session must not be ended by us before."""
        self.ending = Ending(self)
        self.bad = BadRecords()
        """Below our own record."""
        self.timeline = Timeline(self)
        self._begun: Timeline | None = None
        """That of the last session that got its name."""
        self._restored: StoreRestored | None = None
        """The store went back, and not everybody knows yet."""
        self._domains = Domains(self)
        self.questions = Questions(self)
        self._names = config.names
        self._former: set[int] = set()
        self._tick: Timer | None = None
        self._coming: Timer | None = None
        """When coming back goes on; None while the store is asked for something."""
        self._asker: Done | None = None
        """Who waits for the beginning that is under way."""
        self._watch: Watch | None = None
        self._closed = False
        self._lost_early: DlmfsError | None = None
        """The session that is being set up has ended."""

    # -- beginning ------------------------------------------------------------------------------

    def start(self, done: Done) -> None:
        """Begin a session and take a name. Raises through `done`: Unavailable, NodeNameInUse,
        and what the store says of access."""

        def told(error: DlmfsError | None) -> None:
            if self._asker is told:  # else `wreck` has told it
                self._asker = None
                done(error)

        def opened(session: Session | DlmfsError) -> None:
            if isinstance(session, DlmfsError):
                told(session)
                return
            if self._closed:
                session.close(told)
                return
            self.session = session
            if session.renewed_at is not None:
                self.timing = Timing(session.ttl_s)
            naming = Naming(
                self,
                session,
                self._names,
                former=self._former,
                going_on=self._may_go_on,
                done=partial(self._named, told),
            )
            naming.take()

        self._asker = told
        self._lost_early = None
        self.timeline = timeline = Timeline(self)
        begun = partial(self.enter, opened)
        self.store.open_session(self.name, self.config.ttl_s, self._session_lost, begun, timeline)

    def _may_go_on(self) -> bool:
        """Whether the session that is being set up is still good."""
        assert self.session is not None
        now = lease_state(self.timing, self.session.renewed_at, self.clock())
        return now is not LeaseState.FENCED and not self._closed and self._lost_early is None

    def _named(self, done: Done, named: Named | DlmfsError) -> None:
        if isinstance(named, DlmfsError):
            done(named)
            return
        self.name, self.record = named.name, named.record
        try:
            if self._lost_early is not None:
                raise self._lost_early
            self.timeline.begin(named.timeline, named.revision, self._begun)
        except DlmfsError as error:
            assert self.session is not None
            why = error
            self.session.close(lambda _error: done(why))
            return
        self._begun = self.timeline
        self._names = (self.name,)
        self.state, self.reason = LeaseState.HEALTHY, None
        own = NODES + self.name.encode()
        self._watch = self.store.watch((own,), self.record + 1, self._told)
        self._look_at_lease()
        done(None)

    # -- the lease ------------------------------------------------------------------------------

    @property
    def fence_at(self) -> float | None:
        """The instant from which nothing may be served, on `clock`; None: there is none."""
        if self.session is None or self.session.renewed_at is None or not self.up:
            return None
        return self.session.renewed_at + self.timing.fence_after_s

    @property
    def up(self) -> bool:
        """Whether this incarnation is not known to be over: see `serving`."""
        return self.state in (LeaseState.HEALTHY, LeaseState.SUSPECT, LeaseState.UNPROVED)

    @property
    def closed(self) -> bool:
        """Whether it has come to its end, and begins nothing any more."""
        return self._closed

    @property
    def stamped(self) -> int:
        """The revision of the last stamp that this node, or its session before, has seen; 0: none."""
        return self._begun.stamped if self._begun is not None else 0

    @property
    def tokens(self) -> Tokens:
        """What makes tokens of revisions."""
        return self._begun.tokens if self._begun is not None else PLAIN

    def serving(self) -> bool:
        """Whether this incarnation may serve now. Fences it if its time is over."""
        if not self.up:
            return False
        session = self.session
        assert session is not None
        if session.renewed_at is None:
            return True
        state = lease_state(self.timing, session.renewed_at, self.clock())
        if state is LeaseState.FENCED:
            silent = self.clock() - session.renewed_at
            trouble = self.store.describe().get("trouble")
            why = f": {trouble}" if trouble else ""
            self._fence(LockLost(f"the store confirmed no renewal for {silent:.1f} s{why}"))
            return False
        if state is not self.state:
            self._change(state)
        return True

    def wreck(self, error: Exception) -> None:
        """What broke was to be done for the node as a whole: it is begun again, and nobody is fenced."""
        self.host.broken("the node's membership", error)
        if self._asker is not None:
            self._asker(Unavailable(f"a fault of this daemon: {type(error).__name__}"))
        elif self.up and self._tick is None:
            self._tick = self.loop.call_later(RETRY_S, self._look_at_lease)
        elif not self.up and self._coming is None:
            self._come_back(RETRY_S, self._rejoin)

    @contained
    def enter(self, act: Callable[..., None], *args: Any) -> None:
        """Do a part of this membership's own work: with an answer, or from a timer."""
        act(*args)

    def _change(self, state: LeaseState) -> None:
        if self.timeline.doubted:
            state = LeaseState.UNPROVED
        if state is self.state:
            return
        # A lost connection is told where it is lost, and is nobody's worry if it comes back.
        quiet = LeaseState.UNPROVED in (state, self.state)
        log.log(logging.INFO if quiet else logging.WARNING, "node %s is %s", self.name, state.value)
        self.state = state
        for space in list(self.spaces.values()):
            space.suspend(state)

    def doubted(self) -> None:
        """A connection to the store was lost: see `timeline`."""
        if self.up:
            self._change(LeaseState.UNPROVED)

    def trusted(self) -> None:
        """The store is the one that it was."""
        self.serving()

    @contained
    def _look_at_lease(self) -> None:
        """The timer: nobody may be there to ask for `serving`."""
        self._cancel_tick()
        if self.serving() and self.fence_at is not None:
            left = self.fence_at - self.clock()
            delay = min(max(left, 0.001), self.timing.renew_every_s / 2)
            self._tick = self.loop.call_later(delay, self._look_at_lease)

    def _cancel_tick(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None

    def _session_lost(self, error: DlmfsError) -> None:
        """The store says that the session is over, or that it is another one itself."""
        if not self.up:
            self._lost_early = error  # while it takes its name; nobody renews it any more
        self._fence(error)

    def lose(self, reason: str) -> None:
        """Something is wrong with this node itself: serve nothing any more, and do not return."""
        self._fence(BadState(reason))

    def _fence(self, error: DlmfsError) -> None:
        """This incarnation is over (promise 3)."""
        self.final |= not isinstance(error, LockLost)
        if not self.up:
            return
        if not self.ending.begun and self.host.holding():
            self.hold()
        self._restored = error if isinstance(error, StoreRestored) else None
        self.state, self.reason = LeaseState.FENCED, str(error)
        self.fences += 1
        log.error("node %s is fenced: %s", self.name, error)
        self._cancel_tick()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        assert self.session is not None
        self._former.add(self.session.lease)
        self.session.abandon()
        left_s = self.held_until - self.loop.time()
        self._come_back(max(left_s, 0.0 if self.final else RETRY_S), self._after_fence)
        for space in list(self.spaces.values()):
            space.enter(space.lose, str(error))
        self.host.fenced(str(error))

    # -- coming back ----------------------------------------------------------------------------

    def _come_back(self, seconds: float, act: Callable[[], None]) -> None:
        self._coming = self.loop.call_later(seconds, act)

    @contained
    def _after_fence(self) -> None:
        """End the old session if the store can be reached: the others need not wait for it. Nothing of
        it is served any more, and its holders have had their time."""
        self._coming = None
        assert self.session is not None
        if self._closed or self.ending.begun:
            return
        if self._restored is not None:
            self._recover(self._restored)
        else:
            self._end_former(self.session.lease, self._rejoin)

    def _recover(self, error: StoreRestored) -> None:
        """Tell everybody, and wait until all of before are over. The old session may stand in the store
        as it is now, and keeps its locks until then."""
        session = self.session
        assert session is not None

        def recovered() -> None:
            self._restored = None
            if self._begun is not None:
                self._begun.forget()
            self._end_former(session.lease, self._rejoin)

        Recovery(self, str(error), self.tokens, session.seen, recovered).start()

    def waits(self, why: str) -> None:
        """What the way back waits for."""
        if self.reason != why:
            self.reason = why
            log.warning("node %s stays fenced: %s", self.name, why)

    def _end_former(self, lease: int, then: Callable[[], None] | None = None) -> None:
        """End a session that is over, until it is known to have ended: what it still puts, late, would
        keep this node out of its own domains. `then` is called after the first attempt."""

        def ended(error: DlmfsError | None) -> None:
            if isinstance(error, OutcomeUnknown) and not self._closed:
                self.loop.call_later(RETRY_S, self._end_former, lease)
            if then is not None:
                then()

        self.store.end_session(lease, ended)

    @contained
    def _rejoin(self) -> None:
        self._coming = None
        if self.final or self._closed or self.ending.begun:
            return
        if self._restored is not None:
            self._recover(self._restored)
            return
        self.state = LeaseState.REJOINING

        def looked(result: TxnResult | DlmfsError) -> None:
            if isinstance(result, DlmfsError):
                self.reason = str(result)
                self._come_back(RETRY_S, self._rejoin)
                return
            found = result.responses[0]
            by = self._evicted_by(found) if isinstance(found, KeyValue) else None
            if by is not None:  # while we could not hear of it
                self.final, self.state, self.reason = True, LeaseState.FENCED, f"evicted by {by}"
            else:
                self.start(self._restarted)

        self.store.txn(Txn((), (Get(mark_key(self.name)),)), partial(self.enter, looked))

    def _restarted(self, error: DlmfsError | None) -> None:
        if self._closed:
            return
        if error is not None:
            self.reason = str(error)
            self.drop_attempt()
            if isinstance(error, StoreRestored):
                self._restored = error
            self._come_back(RETRY_S, self._rejoin)
            return
        log.warning("node %s is back", self.name)
        for domain in list(self.spaces):
            self._domains.join_again(domain)

    def drop_attempt(self) -> None:
        """A beginning came to nothing: its session, if there is one, ends."""
        if self.session is not None and self.session.lease not in self._former:
            self._former.add(self.session.lease)
            self.session.abandon()
            self._end_former(self.session.lease)

    def begin_later(self, error: DlmfsError) -> None:
        """The first session could not begin: it is tried as after a fence, until it does."""
        self._restarted(error)

    # -- domains --------------------------------------------------------------------------------

    @property
    def spaces(self) -> Mapping[bytes, Lockspace]:
        """The node's domains."""
        return self._domains.spaces

    def join(self, domain: bytes, done: Callable[[Lockspace | DlmfsError], None]) -> None:
        """Become a member of a domain. Unavailable while fenced."""
        self._domains.join(domain, done)

    def leave(self, space: Lockspace, done: Done) -> None:
        """Give back every lock of a domain, then the membership."""
        self._domains.leave(space, done)

    @property
    def answers(self) -> int:
        """Answers of the store so far: whether a long leave makes progress."""
        return sum(space.answers for space in self.spaces.values())

    def state_mb(self) -> float:
        """Size of the store, in megabytes."""
        return self.store.size_mb()

    def lease_state(self) -> str:
        """For people and scripts: the state, whether it is for good, and why if it is not HEALTHY."""
        self.serving()
        state = f"{self.state.value}{' for good' if self.final and not self.up else ''}"
        return state if self.reason is None else f"{state}: {self.reason}"

    # -- the end --------------------------------------------------------------------------------

    def hold(self) -> None:
        """What programs hold by now is nobody else's for the grace that they are given, as far as that
        lies with us: this session is not ended before."""
        left_s = self.config.grace_s
        assert self.session is not None
        if self.session.renewed_at is not None:  # no later than it may run out by itself
            left_s = min(left_s, self.session.renewed_at + self.timing.ttl_s - self.clock())
        self.held_until = self.loop.time() + left_s

    def announce_end(self) -> None:
        """Whoever takes our place waits for our name instead of being refused it (`naming`)."""
        assert self.session is not None
        key = NODES + self.name.encode()
        put = Put(key, record_of(self, ending=True), self.session.lease)
        self.store.txn(Txn((created_at(key, self.record),), (put,)), lambda _result: None)

    def end(self, done: Done) -> None:
        """End the session now, whether or not anything was left cleanly (`ending`)."""
        if self._closed:
            done(None)
            return
        self._closed = True
        self._cancel_tick()
        if self._watch is not None:
            self._watch.cancel()
        if self.session is None:
            done(None)
        else:
            self.session.close(done)

    # -- eviction -------------------------------------------------------------------------------

    def _told(self, batch: WatchBatch | WatchGap) -> None:
        if not self.up:
            return
        if isinstance(batch, WatchGap):
            self._look_anew(self.record)
            return
        for event in batch.events:
            self.enter(self._heard, event)  # one by one: what one costs, it costs alone

    def _heard(self, event: Event) -> None:
        own = NODES + self.name.encode()
        if event.kv.key == own and event.kv.mod_revision > self.record:
            # To overwrite it ends this life as to delete it does.
            if event.kind == "delete":
                self._fence(LockLost(REMOVED))
            elif not is_ours(self, event.kv):
                self._fence(LockLost(OVERWRITTEN))
        elif event.kind == "delete":
            self.bad.good(event.kv.key)
        elif event.kv.key == mark_key(self.name):
            self._marked(event.kv)
        else:
            self.questions.told(event)

    def _look_anew(self, record: int) -> None:
        """What became of our record, and was put below it, while the watch had a gap."""
        own = NODES + self.name.encode()

        def read(result: TxnResult | DlmfsError) -> None:
            if not self.up or self.record != record:  # another life of ours has a watch of its own
                return
            if isinstance(result, DlmfsError):
                self.loop.call_later(RETRY_S, self._look_anew, record)
                return
            ours, mark, below = result.responses
            if not isinstance(ours, KeyValue) or ours.create_revision != record:
                self._fence(LockLost(REMOVED))
                return
            if not is_ours(self, ours):
                self._fence(LockLost(OVERWRITTEN))
                return
            self._watch = self.store.watch((own,), result.revision + 1, self._told)
            assert isinstance(below, tuple)
            puts = tuple(Event("put", kv) for kv in (mark, *below) if isinstance(kv, KeyValue))
            self._told(WatchBatch(result.revision, puts))

        # The first letters: who put more than that can be answered by nobody.
        letters = Range(own + b"/", b"", LETTERS_MAX)
        looks = (Get(own), Get(mark_key(self.name)), letters)
        self.store.txn(Txn((), looks), partial(self.enter, read))

    def _marked(self, mark: KeyValue) -> None:
        """Go, if it is this very life of the node that is meant; and say that we heard."""
        by = self._evicted_by(mark)
        if by is None or self.final:
            return
        wait_s = self.config.grace_s + PATIENCE_S + END_S
        heard = Put(mark.key, Mark(self.record, by, heard=True, wait_s=wait_s).encode())
        self.store.txn(Txn((), (heard,)), lambda _result: None)
        self.final, self.reason = True, f"evicted by {by}"
        self.ending.begin(self.reason, partial(self._evicted, self.reason))

    def _evicted(self, reason: str, _error: DlmfsError | None) -> None:
        """Our session is ended: whatever was still open is lost."""
        self._fence(BadState(reason))
        self.reason = reason

    def _evicted_by(self, kv: KeyValue) -> str | None:
        """Who wants this life of the node out; None if the mark is about another, or no mark."""
        try:
            mark = decode_mark(kv)
        except BadState as error:
            self.bad.note(kv.key, error)
            return None
        self.bad.good(kv.key)
        return mark.by if mark.record == self.record else None
