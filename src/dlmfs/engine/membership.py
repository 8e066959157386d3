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
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from dlmfs.core.lease import LeaseState, lease_state
from dlmfs.engine.domains import Domains
from dlmfs.engine.eviction import Mark, decode_mark, mark_key
from dlmfs.engine.lock import Done
from dlmfs.engine.lockspace import Host as LockHost
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.naming import Named, Naming
from dlmfs.engine.questions import Questions
from dlmfs.engine.records import NODES
from dlmfs.errors import BadState, DlmfsError, LockLost, Unavailable
from dlmfs.model import Owner
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
)
from dlmfs.timing import Clock, Scheduler, Timer, Timing

log = logging.getLogger("dlmfs.node")

RETRY_S: Final = 0.5
END_S: Final = 1.0
"""How long the end of a session is waited for."""

REMOVED: Final = "the node's record was removed from the store"


class Host(LockHost, Protocol):
    """What a node's programs see of it: the file system, or a simulated one."""

    def fenced(self, reason: str) -> None:
        """Nothing is served any more; the domains have been told one by one."""

    def rejoined(self, space: Lockspace) -> None:
        """The domain's new membership takes the place of the lost one."""


@dataclass(frozen=True, slots=True)
class Config:
    """`names`: those that the node may have, the first free one is taken; `facts`: what its record
    says of it; `is_over`: whether the process that such facts name provably exists no more."""

    names: Sequence[str]
    facts: Mapping[str, object]
    is_over: Callable[[Mapping[str, object]], bool]
    owner: Owner = Owner.NODE
    ttl_s: float = Timing().ttl_s
    lock_delay_s: float = 0.0


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
        self._domains = Domains(self)
        self.questions = Questions(self)
        self._names = config.names
        self._former: set[int] = set()
        self._tick: Timer | None = None
        self._watch: Watch | None = None
        self._closed = False

    # -- beginning ------------------------------------------------------------------------------

    def start(self, done: Done) -> None:
        """Begin a session and take a name. Raises through `done`: Unavailable, NodeNameInUse,
        and what the store says of access."""

        def opened(session: Session | DlmfsError) -> None:
            if isinstance(session, DlmfsError):
                done(session)
                return
            if self._closed:
                session.close(done)
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
                done=partial(self._named, done),
            )
            naming.take()

        self.store.open_session(self.name, self.config.ttl_s, self._session_lost, opened)

    def _may_go_on(self) -> bool:
        """Whether the session that is being set up is still good."""
        assert self.session is not None
        now = lease_state(self.timing, self.session.renewed_at, self.clock())
        return now is not LeaseState.FENCED and not self._closed

    def _named(self, done: Done, named: Named | DlmfsError) -> None:
        if isinstance(named, DlmfsError):
            done(named)
            return
        self.name, self.record = named
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
        return self.state in (LeaseState.HEALTHY, LeaseState.SUSPECT)

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
            self._fence(LockLost(f"the store confirmed no renewal for {silent:.1f} s"))
            return False
        if state is not self.state:
            self._change(state)
        return True

    def _change(self, state: LeaseState) -> None:
        log.warning("node %s is %s", self.name, state.value)
        self.state = state
        for space in list(self.spaces.values()):
            space.suspend(state is LeaseState.SUSPECT)

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
        """The store says that the session is over."""
        self._fence(error)

    def lose(self, reason: str) -> None:
        """Something is wrong with this node itself: serve nothing any more, and do not return."""
        self._fence(BadState(reason))

    def _fence(self, error: DlmfsError) -> None:
        """This incarnation is over (promise 3)."""
        self.final |= not isinstance(error, LockLost)
        if not self.up:
            return
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
        for space in list(self.spaces.values()):
            space.lose(str(error))
        self.host.fenced(str(error))
        self.loop.call_later(0.0 if self.final else RETRY_S, self._after_fence)

    # -- coming back ----------------------------------------------------------------------------

    def _after_fence(self) -> None:
        """End the old session if the store can be reached: the others need not wait for it. It can
        hurt nobody, since nothing of it is served any more."""
        assert self.session is not None
        if self._closed:
            return
        self.store.end_session(self.session.lease, lambda _error: self._rejoin())

    def _rejoin(self) -> None:
        if self.final or self._closed:
            return
        self.state = LeaseState.REJOINING

        def looked(result: TxnResult | DlmfsError) -> None:
            if isinstance(result, DlmfsError):
                self.loop.call_later(RETRY_S, self._rejoin)
                return
            found = result.responses[0]
            by = self._evicted_by(found) if isinstance(found, KeyValue) else None
            if by is not None:  # while we could not hear of it
                self.final, self.state, self.reason = True, LeaseState.FENCED, f"evicted by {by}"
            else:
                self.start(self._restarted)

        self.store.txn(Txn((), (Get(mark_key(self.name)),)), looked)

    def _restarted(self, error: DlmfsError | None) -> None:
        if self._closed:
            return
        if error is not None:
            self.reason = str(error)
            if self.session is not None and self.session.lease not in self._former:
                self._former.add(self.session.lease)
                self.session.abandon()
            self.loop.call_later(RETRY_S, self._rejoin)
            return
        log.warning("node %s is back", self.name)
        for domain in list(self.spaces):
            self._domains.join_again(domain)

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
        """For people and scripts: the state, and why if it is not good."""
        self.serving()
        return self.state.value if self.reason is None else f"{self.state.value}: {self.reason}"

    # -- the end --------------------------------------------------------------------------------

    def close(self, done: Done) -> None:
        """A clean end: leave every domain, then end the session. The caller bounds the time."""
        waiting = len(self.spaces)

        def leave(space: Lockspace) -> None:
            def left(error: DlmfsError | None) -> None:
                nonlocal waiting
                if isinstance(error, Unavailable) and not self._closed:
                    # To leave with a lock at EX would look like a death (protocol-traps 12).
                    self.loop.call_later(RETRY_S, leave, space)
                    return
                waiting -= 1
                if waiting == 0:
                    self.end(done)

            self.leave(space, left)

        if not waiting:
            self.end(done)
        for space in list(self.spaces.values()):
            leave(space)

    def depart(self, patience_s: float, done: Done) -> None:
        """A clean end that goes on for as long as the store answers something within `patience_s`; after
        that it is as if the node had died. `done` is called once, at most END_S after the last of it."""
        told = False

        def over(error: DlmfsError | None = None) -> None:
            nonlocal told
            if not told:
                told = True
                done(error)

        def look(seen: int) -> None:
            if told:
                return
            if self.answers != seen:
                self.loop.call_later(patience_s, look, self.answers)
            else:
                self.loop.call_later(END_S, over)
                self.end(over)

        self.loop.call_later(patience_s, look, self.answers)
        self.close(over)

    def end(self, done: Done) -> None:
        """End the session now, whether or not anything was left cleanly."""
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
        own = NODES + self.name.encode()
        for event in batch.events:
            if event.kv.key == mark_key(self.name) and event.kind == "put":
                self._marked(event.kv)
            elif (
                event.kv.key == own
                and event.kind == "delete"
                and event.kv.mod_revision > self.record
            ):
                self._fence(LockLost(REMOVED))
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
            ours, below = result.responses
            if not isinstance(ours, KeyValue) or ours.create_revision != record:
                self._fence(LockLost(REMOVED))
                return
            self._watch = self.store.watch((own,), result.revision + 1, self._told)
            assert isinstance(below, tuple)
            puts = tuple(Event("put", kv) for kv in below if isinstance(kv, KeyValue))
            self._told(WatchBatch(result.revision, puts))

        self.store.txn(Txn((), (Get(own), Range(own + b"/"))), read)

    def _marked(self, mark: KeyValue) -> None:
        """Go, if it is this very life of the node that is meant; and say that we heard."""
        by = self._evicted_by(mark)
        if by is None:
            return
        heard = Put(mark.key, Mark(self.record, by, heard=True).encode())
        self.store.txn(Txn((), (heard,)), lambda _result: None)
        self._fence(BadState(f"evicted by {by}"))

    def _evicted_by(self, kv: KeyValue) -> str | None:
        """Who wants this life of the node out; None if the mark is about another."""
        mark = decode_mark(kv)
        return mark.by if mark is not None and mark.record == self.record else None
