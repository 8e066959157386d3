"""One lock resource as its node caches it: whom to serve here, what to ask the cluster for.

Rules of this file
------------------
* Pure: no clock, no I/O, no logging. Events come in as method calls, actions go out as a list.
* `level` is what the node may serve *now*. It falls when a give-up is sent, not when it is
  confirmed (design, engine rule 5), and rises only with `granted`.
* While it is `frozen` nobody is served from it: whether the store still knows of it is not proved.
* At most one cluster operation is under way: `phase` says which. Which event is possible in which
  phase is the table `POSSIBLE`; anything else is a bug, and costs this lock (`engine.wreck`).
* Every public event ends in `_settle`, so the outcome depends on the state, not on the path.

The state is that of the kernel's userdlm: level held, level asked for, level others are blocked
for, holders, waiters (`claims`; aesthetics, section 3), with an explicit phase in place of flag bits.
"""

from __future__ import annotations

import errno

from dlmfs.core.claims import COUNTER_MAX, Claims
from dlmfs.core.events import (
    POSSIBLE,
    Action,
    Ask,
    Claim,
    Drop,
    Event,
    Fail,
    Grant,
    Identify,
    Notify,
    Phase,
    RefuseTry,
    Stage,
    Withdraw,
)
from dlmfs.core.tokens import PLAIN, Tokens
from dlmfs.model import HolderRule, Mode, compatible, strongest_beside


class Lockres(Claims):
    """One lock resource at one node. See the rules at the head of the file."""

    __slots__ = (
        "_barrier",
        "_notified",
        "_out",
        "_queued",
        "_seq",
        "_try_refused",
        "asked",
        "asked_trying",
        "converting",
        "front",
        "level",
        "phase",
        "strongest",
        "try_mode",
        "withdrawing",
    )

    def __init__(self, rule: HolderRule, tokens: Tokens = PLAIN) -> None:
        super().__init__(rule, tokens)
        self.phase = Phase.IDLE
        self.level = Mode.NL
        self.asked = Mode.NL
        self.front = Mode.NL
        self.strongest = Mode.NL
        self.try_mode = Mode.NL
        self.asked_trying = self.converting = False
        self.withdrawing = False
        self._barrier: int | None = None
        self._try_refused = False
        self._notified = False
        self._queued = False
        self._seq = 0
        self._out: list[Action] = []

    # -- events from local programs ---------------------------------------------------------

    def open(self, claim: Claim) -> list[Action]:
        """A program opens the lock's file."""
        return [Grant(claim)] if self.hold_cached(claim) else self.wait(claim)

    def hold_cached(self, claim: Claim) -> bool:
        """The way of nearly every open: the level is here and nobody came before. True: the claim
        holds, and nothing else is to be done. False: it has its number and must `wait`."""
        claim.seq = self._seq = self._seq + 1
        if self.waiters or not self._servable(claim):
            return False
        self._hold(claim)
        return True

    def wait(self, claim: Claim) -> list[Action]:
        """The rest of `open`, for a claim that `hold_cached` did not serve."""
        self._enter(Event.OPEN)
        self._line_up(claim)
        if self.holders and claim.pid:
            # Whether the opener holds this very lock already decides over serving it at once,
            # or letting it wait for itself for ever (protocol-traps 5).
            self._out.append(Identify(claim))
            return self._leave()
        claim.kin = False
        return self._settle()

    def identified(self, claim: Claim, *, kin: bool) -> list[Action]:
        """The answer to Identify: the claim's process (or an ancestor) holds this lock."""
        self._enter(Event.IDENTIFIED)
        assert claim.stage is Stage.WAITING, claim
        self._is_kin(claim, kin=kin)
        return self._settle()

    def close(self, claim: Claim) -> list[Action]:
        """A program closed its last descriptor of an open file (RELEASE)."""
        self._enter(Event.CLOSE)
        if claim.stage is Stage.ENDED:  # lost earlier; its counts went with it
            return self._out
        assert claim.stage is Stage.HELD, claim
        self._let_go(claim)
        if self.waiters or self.phase is not Phase.IDLE or self.strongest or self.try_mode:
            return self._settle()
        # Nobody here or elsewhere waits: the way of nearly every close.
        assert self.ex >= 0 <= self.pr
        self._notified = False
        return self._out

    def interrupt(self, claim: Claim) -> list[Action]:
        """A waiting program got a signal. The caller answers EINTR; the claim is forgotten."""
        self._enter(Event.INTERRUPT)
        assert claim.stage is Stage.WAITING, claim
        self._forget(claim)
        return self._settle()

    # -- events from the cluster ------------------------------------------------------------

    def granted(self, level: Mode, revision: int) -> list[Action]:
        """The request was granted: the node is at `level` by the commit `revision`."""
        self._enter(Event.GRANTED)
        assert level >= self.asked, (level, self.asked)
        self._end_request()
        self.level = level
        self._begin_tokens(revision)
        if self.strongest is not Mode.NL and self._barrier is None:
            # Others wished before we were granted, and will not wish again: who comes from now on
            # comes after them (promise 5).
            self._barrier = self._seq + 1
        return self._settle()

    def queued(self) -> list[Action]:
        """The request is not granted at once: it waits in the cluster's queue."""
        self._enter(Event.QUEUED)
        self._queued = True
        return self._settle()

    def refused(self, reason: int) -> list[Action]:
        """The request came to nothing.

        ETXTBSY: a trylock met somebody. EDEADLK: two nodes convert at once and ours is the later
        one. 0: withdrawn. Anything else is the store's error, and every waiter gets it.
        """
        self._enter(Event.REFUSED)
        asked = self.asked
        self._end_request()
        for claim in list(self.waiters.values()) if reason else ():
            if reason == errno.ETXTBSY:
                hit = claim.trying and claim.mode >= asked
            elif reason == errno.EDEADLK:
                # Who holds no PR itself can wait on: it gets its turn when the holders close.
                hit = claim.kin is True and claim.mode is Mode.EX and self.pr > 0
            else:
                hit = True
            if hit:
                self._fail(claim, reason)
        return self._settle()

    def wanted(
        self, front: Mode, strongest: Mode, try_mode: Mode, since: int | None = None
    ) -> list[Action]:
        """What the other nodes' wishes ask for: the first one, the strongest, the trylocks'. `since`:
        the number of the last claim here that came before the oldest of them; None: of the last one
        of all, when others begin to wish."""
        self._enter(Event.WANTED)
        self.front, self.strongest, self.try_mode = front, strongest, try_mode
        self._try_refused = False
        if strongest is Mode.NL:
            self._barrier = None
        elif since is not None:
            self._barrier = since + 1
        elif self._barrier is None:
            self._barrier = self._seq + 1
        return self._settle()

    def next_wish(self) -> Mode:
        """The give-up is about to be sent: the mode of the wish that goes along with it, NL for none.
        Who came since Drop was said is served by it, too."""
        assert self.phase is Phase.DROPPING
        if self.asked is Mode.NL and self.level is Mode.NL:
            first = next(iter(self.waiters.values()), None)
            if first is not None and not first.trying:
                self.asked = first.mode
        return self.asked

    def dropped(self) -> list[Action]:
        """The give-up is committed, and with it the wish that Drop named."""
        self._enter(Event.DROPPED)
        self.phase = Phase.IDLE if self.asked is Mode.NL else Phase.ASKING
        return self._settle()

    def lose(self, reason: int) -> list[Action]:
        """This incarnation is over: waiters fail with `reason`, holders are marked lost."""
        self._enter(Event.LOSE)
        for claim in list(self.waiters.values()):
            self._fail(claim, reason)
        for claim in self.holders.values():
            claim.stage = Stage.ENDED
            self._out.append(Notify(claim))
        self.holders.clear()
        self.ex = self.pr = 0
        self.level = Mode.NL
        self.phase = Phase.LOST
        return self._leave()

    def thaw(self) -> list[Action]:
        """The store has been shown to know of the level: those are served who waited for that."""
        self.frozen = False
        return self._settle() if self.waiters and self.phase is not Phase.LOST else self._out

    def surrender(self) -> None:
        """The lock is being left: what no holder needs is believed in no longer (rule 5)."""
        self._enter(Event.SURRENDER)
        assert not self.waiters
        self.level = Mode.EX if self.ex else Mode.PR if self.pr else Mode.NL

    # -- questions --------------------------------------------------------------------------

    @property
    def last_seq(self) -> int:
        """The number of the last claim that came."""
        return self._seq

    def before_others(self, claim: Claim) -> bool:
        """Whether the claim came before the oldest of the other nodes' wishes."""
        return self._barrier is None or claim.seq < self._barrier

    @property
    def contended(self) -> bool:
        """Whether poll(2) on a held descriptor says POLLIN."""
        if not compatible(self.level, self.strongest):
            return True
        # Under holder=file the neighbours on this node are other owners too.
        return self.rule is HolderRule.FILE and bool(self.holders) and bool(self.waiters)

    # -- inner workings ---------------------------------------------------------------------

    def _enter(self, event: Event) -> None:
        assert self.phase in POSSIBLE[event], f"{event.name} in {self.phase.name} is impossible"

    def _leave(self) -> list[Action]:
        out = self._out
        if out:
            self._out = []
        return out

    def _end_request(self) -> None:
        self.phase = Phase.IDLE
        self.asked = Mode.NL
        self.asked_trying = self.converting = False
        self._queued = False
        self.withdrawing = False

    def _forget(self, claim: Claim) -> None:
        self._step_out(claim)
        claim.stage = Stage.ENDED

    def _fail(self, claim: Claim, reason: int) -> None:
        self._forget(claim)
        self._out.append(Fail(claim, reason))

    def _blocked(self, claim: Claim) -> bool:
        """First come, first served: whoever came after a remote wish waits behind it."""
        return (
            self._barrier is not None
            and claim.seq >= self._barrier
            and not compatible(claim.mode, self.strongest)
        )

    def _fail_trying(self) -> None:
        if self._trying_waiting:
            for claim in [c for c in self.waiters.values() if c.trying and c.kin is not None]:
                self._fail(claim, errno.ETXTBSY)

    def _servable(self, claim: Claim) -> bool:
        if claim.mode > self.level or self.frozen:
            return False
        if self.rule is HolderRule.FILE:
            if self._counter >= COUNTER_MAX:
                return False
            if self.ex or (claim.mode is Mode.EX and self.pr):
                return False
            if claim.kin and claim.mode is Mode.PR:
                return True
        elif claim.kin:
            return True
        return not self._blocked(claim)

    def _settle(self) -> list[Action]:
        """Serve who can be served, then start the one cluster operation that is due."""
        if self.waiters:
            self._serve()
        if self.phase is Phase.IDLE:
            if not self._give_up():
                self._ask()
        elif self.phase is Phase.ASKING and not self.withdrawing:
            # A trylock's request has no place in the queue: who waits behind it asks anew.
            useless = self.asked_trying and not self._trying_waiting
            if useless or not self.waiters:
                self.withdrawing = True
                self._out.append(Withdraw())
        if self.try_mode is not Mode.NL and not self._try_refused:
            self._answer_try()
        self._notify()
        assert self.ex + self.pr == len(self.holders)
        assert self.level is Mode.EX or self.ex == 0
        assert self.level is not Mode.NL or self.pr == 0
        assert self.rule is HolderRule.NODE or self.ex + (self.pr > 0) <= 1
        return self._leave()

    def _serve(self) -> None:
        """Grant in order of arrival up to the first that must wait; kin and trylocks beyond it.

        Where there is neither, the scan stops there: 5,000 waiters would make it quadratic.
        """
        blocked = False
        for claim in list(self.waiters.values()):
            if claim.kin is None:
                blocked = True
            elif (claim.kin or not blocked) and self._servable(claim):
                self._step_out(claim)
                self._hold(claim)
                self._out.append(Grant(claim))
            elif claim.trying and self._hopeless(claim):
                self._fail(claim, errno.ETXTBSY)
            else:
                blocked = True
            if blocked and not self._kin_waiting and not self._trying_waiting:
                return

    def _hopeless(self, claim: Claim) -> bool:
        """A trylock that could only be served by waiting for a *user* of the lock (promise 6)."""
        if self._blocked(claim):
            return True
        if self.frozen and claim.mode <= self.level:
            return not claim.kin and self.in_conflict(claim)
        if self.phase is Phase.ASKING:
            return self._queued and not self.asked_trying
        if self.phase is Phase.DROPPING:
            return False
        if claim.mode <= self.level:
            return self._counter < COUNTER_MAX or self.in_conflict(claim)
        for other in self.waiters.values():
            if other is claim:
                return False
            if not other.trying and not compatible(other.mode, claim.mode):
                return True
        return False

    def _need(self) -> Mode:
        """The level that the holders, and those who came before the remote wish, still need."""
        need = Mode.EX if self.ex else Mode.PR if self.pr else Mode.NL
        barrier = self._barrier
        if barrier is not None and self._counter < COUNTER_MAX:
            for claim in self.waiters.values():
                # Behind one that needs more than we have nobody is served before the hand-over.
                if claim.seq >= barrier or claim.mode > self.level or need is self.level:
                    break
                need = max(need, claim.mode)
        return need

    def _give_up(self) -> bool:
        """Start a hand-over if others want what nobody here needs. True: nothing else to do now."""
        if compatible(self.level, self.strongest):
            return False
        if self._kin_waiting and any(c.kin and c.mode > self.level for c in self.waiters.values()):
            return False
        need = self._need()
        if need <= strongest_beside(self.strongest):
            to = strongest_beside(self.strongest)
        elif need <= strongest_beside(self.front) < self.level:
            to = strongest_beside(self.front)
        else:
            self._fail_trying()  # it would have to wait for the users here
            return True
        self._start_drop(to)
        return True

    def _start_drop(self, to: Mode) -> None:
        then = Mode.NL
        if to is Mode.NL and self.waiters:
            self._fail_trying()
            first = next(iter(self.waiters.values()), None)
            then = first.mode if first is not None else Mode.NL
        self.level = to
        self.phase = Phase.DROPPING
        self.asked = then
        if to is Mode.NL:
            self._barrier = None  # the wish that goes along has its place among the others
        self._out.append(Drop(to, then))

    def _ask(self) -> None:
        waiting = self.waiters.values()
        first = next((c for c in waiting if c.kin), None) if self._kin_waiting else None
        if first is None or first.mode <= self.level:
            first = next(iter(waiting), None)
        if first is None or first.kin is None:
            return
        worn_out = self.rule is HolderRule.FILE and self._counter >= COUNTER_MAX
        if first.mode <= self.level and not (worn_out and not self.in_conflict(first)):
            return
        self.phase = Phase.ASKING
        self.asked = max(first.mode, self.level)
        self.asked_trying = first.trying
        convert = self.pr > 0
        self.converting = convert and self.asked > self.level
        if not convert and self.asked > self.level:
            # An idle PR is given up rather than converted: two nodes doing this would refuse
            # each other for nothing (protocol-traps 6).
            self.level = Mode.NL
        self._out.append(Ask(self.asked, first.trying, self.converting))

    def _answer_try(self) -> None:
        """Another node's trylock: never kept waiting for a user here."""
        if compatible(self.level, self.try_mode):
            return
        if self.phase is Phase.IDLE and not self.waiters:
            if self._need() <= strongest_beside(self.try_mode):
                self._start_drop(strongest_beside(self.try_mode))
                return
        self._try_refused = True
        self._out.append(RefuseTry())

    def _notify(self) -> None:
        contended = bool(self.holders) and self.contended
        if contended and not self._notified:
            for claim in self.holders.values():
                self._out.append(Notify(claim))
        self._notified = contended
