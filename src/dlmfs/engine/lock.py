"""The protocol of one lock resource: from what the core wants to transactions, and back.

Rules of this file
------------------
* Level-triggered: every event changes what we know (`View`, the core) and then calls `_step`,
  which looks at all of it and starts the one transaction that is due (`changes`). Nothing depends
  on the path by which we came to know.
* One transaction at a time per lock (engine rule 3).
* An unknown outcome is never guessed: the domain gets a new epoch, then the lock is read anew.
* Whoever calls from outside calls a `contained` method: an exception costs this lock (`wreck`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.core.events import Claim, Phase, Stage
from dlmfs.core.lockres import Lockres
from dlmfs.engine import changes, forgetting, granting, keeping
from dlmfs.engine import value as values
from dlmfs.engine import wreck as wrecks
from dlmfs.engine.changes import Change
from dlmfs.engine.contained import contained
from dlmfs.engine.local import Local
from dlmfs.engine.records import Head, Mail, Wish
from dlmfs.engine.sender import Part
from dlmfs.engine.value import Value
from dlmfs.engine.view import View
from dlmfs.errors import DlmfsError, LockLost, Unavailable
from dlmfs.model import Mode, compatible
from dlmfs.store.base import Txn, TxnResult
from dlmfs.timing import Timer

if TYPE_CHECKING:
    from dlmfs.engine.lockspace import Lockspace
    from dlmfs.engine.wreck import Wreck

Done = Callable[[DlmfsError | None], None]

RETRY_S: Final = 0.2
"""Wait before a give-up is tried again on a store that is full."""


class ClusterLock:
    """One lock resource of one domain at this node: the core's state and the store's.

    `busy`: a transaction is under way. `cut`: our last grant pass was longer than a commit may be, and
    the rest of it is ours to do: the first of those who still wait does it too, when it hears, but
    may be stopped."""

    __slots__ = (
        "_looking",
        "_patient",
        "busy",
        "cut",
        "forget_waits",
        "forgets",
        "heir",
        "keeps",
        "local",
        "name",
        "res",
        "space",
        "unresolved",
        "value",
        "view",
        "wreck_left",
    )

    def __init__(self, space: Lockspace, name: bytes) -> None:
        self.space = space
        self.name = name
        self.res = Lockres(space.rule, space.tokens)
        self.res.frozen = space.frozen
        self.view = View(space, name)
        self.value = Value(self.view)
        self.local = Local(self)
        self.busy = False
        self.unresolved = False
        self._patient = False
        self.cut = False
        self.keeps = False
        """The node is to have a place in the head for its file's sake (`keeping`)."""
        self.forgets: list[Done] = []
        """Who waits for us to leave the lock."""
        self.wreck_left: Wreck | None = None
        """Of a former resource of this name, which broke; it comes before all else."""
        self.heir: ClusterLock | None = None
        """This one broke, and that took its place."""
        self.forget_waits = False
        self._looking = False
        """The transaction under way is a reading."""

    # -- what the node asks -------------------------------------------------------------------

    def open(self, claim: Claim) -> bool:
        """A program opens the lock. True: it has it, at once; else the host is told, by `granted`
        or `failed`, perhaps before this returns."""
        # Not `contained`, nor is `close`: one more call would be felt by every open.
        try:
            if not self.forgets and self.res.hold_cached(claim):
                return True
        except Exception as error:
            self.wreck(error)
            return False
        self._wait(claim)
        return False

    @contained
    def _wait(self, claim: Claim) -> None:
        if self.forgets:
            # The kernel's answer to an open that races with unlink (kernel-behaviour, "unlink").
            self.space.host.failed(claim, errno.ETXTBSY if claim.trying else errno.EAGAIN)
            return
        claim.since = self.space.loop.time()
        self.local.run(self.res.wait(claim))
        self._step()
        if claim.trying and claim.stage is Stage.WAITING:
            self.local.time_try()

    def close(self, claim: Claim) -> None:
        try:
            actions = self.res.close(claim)
            if actions:
                self.local.run(actions)
            if not self._at_rest():
                self._step()
            elif self.heir is not None:
                wrecks.closed(self, claim)
        except Exception as error:
            self.wreck(error)

    @contained
    def interrupt(self, claim: Claim) -> None:
        """A waiter got a signal; the caller has answered EINTR already (engine rule 8)."""
        self.local.run(self.res.interrupt(claim))
        self._step()

    @contained
    def read_lvb(self, done: Callable[[bytes], None]) -> None:
        """The value, for a holder. Waits while it is not known for sure (rule 13, `Lockres.frozen`)."""
        self.value.read(done, unsure=self.unresolved, frozen=self.res.frozen)

    @contained
    def write_lvb(self, offset: int, data: bytes, done: Done) -> None:
        """Put `data` at `offset`; done when durable. For an EX holder only (promise 4)."""
        self.value.write(offset, data, done)
        self._step()

    @contained
    def freeze(self, frozen: bool) -> None:
        self.local.freeze(frozen)

    @contained
    def forget(self, done: Done) -> None:
        """Leave the lock (rule 15), when nobody holds it: its file is unlinked, or the domain left."""
        self.forgets.append(done)
        if self.res.phase is Phase.IDLE:
            self.res.surrender()
        self._step()

    @contained
    def lose(self, reason: int) -> None:
        """The node's incarnation is over (promise 3)."""
        self.local.cancel_try()
        if self.res.phase is not Phase.LOST:
            self.local.run(self.res.lose(reason))
        self.value.lose(LockLost("the lock was lost: this node's membership in the domain ended"))
        forgets, self.forgets = self.forgets, []
        for done in forgets:
            done(None)

    def wreck(self, error: Exception) -> None:
        """An invariant is broken: this lock is lost, and nothing of its state is served."""
        wrecks.wreck(self, error)

    # -- what the store tells -------------------------------------------------------------------

    # These only note what happened. The domain calls `learned` when all events of a revision
    # are noted: a transaction built in between would vouch for a queue half seen.

    @contained
    def wish_put(self, wish: Wish, revision: int) -> None:
        """A put below w/<lock>/."""
        self.view.wish_put(wish, revision, asking=self.res.phase is Phase.ASKING)

    @contained
    def wish_gone(self, node: str, revision: int) -> None:
        """A deletion below w/<lock>/."""
        self.view.wish_gone(node, revision, busy=self.busy)

    @contained
    def mail(self, mail: Mail, revision: int) -> None:
        """Somebody's commit granted our wish, or one that we had before."""
        expecting = self.res.phase in (Phase.ASKING, Phase.DROPPING)
        self.view.mail(mail, revision, expecting=expecting)

    def mail_unread(self) -> None:
        """Somebody has put mail that cannot be read: the head tells what it may have meant."""
        self.view.mailed = self.view.must_look = True

    @contained
    def learned(self) -> None:
        """Knowledge changed: tell the core, then act on it."""
        res, view = self.res, self.view
        if res.phase is Phase.LOST:
            return
        if self.wreck_left is not None:  # what the head has of us is not ours to use
            self.local.tell_wanted(view)
            self._step()
            return
        mine = view.mine()
        if res.phase is Phase.DROPPING and (
            mine is None or mine.level <= res.level or mine.revision > res.revision
        ):
            if res.asked is not Mode.NL:
                view.wish = view.wishes.get(self.space.node)
            self.local.run(res.dropped())
        if res.phase is Phase.ASKING and self._got_it():
            assert mine is not None
            view.wish = None
            view.vanished = None  # it did not vanish, it was granted; the core may ask anew now
            self.local.tell_wanted(view)
            self.local.run(res.granted(mine.level, mine.revision))
        vanished, view.vanished = view.vanished, None
        if vanished is not None:
            self.local.told = False
            if vanished.trying and res.phase is Phase.ASKING and not res.withdrawing:
                self.local.run(res.refused(errno.ETXTBSY))
            # A plain wish that was removed by hand: `_step` asks again.
        self.local.tell_wanted(view)
        self._step()

    @contained
    def member_gone(self) -> None:
        """A node died or left: its place in the head may have been in our way (rule 6)."""
        if self.view.wish is not None or self.res.phase is Phase.ASKING or self.keeps:
            self.view.must_look = True
            self._step()

    @contained
    def reread(self) -> None:
        """Events were missed, or an outcome is unknown: read everything before doing more."""
        self.unresolved = True
        self._looking = False
        # A reading that is under way was sent before this, and must not pass for the one asked for.
        self.view.must_look = True
        if self.res.phase is not Phase.LOST:
            # A gap may have hidden wishes that are known now: who comes here before that reading is
            # answered must not pass them.
            self.local.tell_wanted(self.view)

    @contained
    def resume(self) -> None:
        self._step()

    # -- status -----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is under way and nobody waits here: only the cached level is left."""
        return not (
            self.res.in_use or self.busy or self.value.writes or self.forgets or self.unresolved
        )

    @property
    def phase(self) -> str:
        """For people: what is under way between this node and the cluster."""
        left = self.wreck_left
        return left.phase if left is not None else self.res.phase.name.lower()

    @property
    def undecided(self) -> bool:
        """Whether those who wait here wait for the store's answer: it is not known yet that anybody is
        in their way."""
        return self.res.phase is Phase.ASKING and not self.local.told

    @property
    def forgetting(self) -> bool:
        """An unlink, or a leave of the domain, is under way."""
        return bool(self.forgets)

    # -- inner workings: deciding -----------------------------------------------------------

    def _step(self) -> None:
        """Start the transaction that is due, if any. See the rules at the head of the file."""
        res, view = self.res, self.view
        if self._at_rest() or not self.space.running:
            return
        if self.wreck_left is not None and not (self.unresolved or view.must_look):
            self._clear()
        elif self.unresolved or view.must_look:
            view.must_look = False  # now: what is heard from here on asks for another look
            self._looking = True
            self.send(Txn((), changes.reading(view)), self._looked)
        elif res.phase is Phase.DROPPING:
            self._hand_over()
        elif view.wish is not None and self._should_withdraw(view.wish):
            self.send(changes.withdraw(view, view.wish), partial(self._withdrawn, wish=view.wish))
        elif res.phase is Phase.ASKING and res.withdrawing and view.wish is None:
            self.local.run(res.refused(0))
            self._step()
        else:
            self._act()

    def _act(self) -> None:
        """The rest of `_step`, for a lock about which nothing is unknown or under way."""
        res, view = self.res, self.view
        if self.local.refuse_try:
            self._refuse_trylocks()
        elif view.surplus_wanted(res.level):
            granting.put(self, level=res.level)
        elif self.cut:
            granting.rest(self)
        elif self.keeps and keeping.join(self):
            pass
        elif self.value.writes:
            values.step(self)
        elif self.forgets:
            forgetting.step(self)
        elif res.phase is Phase.ASKING:
            self._ask()

    def _at_rest(self) -> bool:
        """Whether nothing can be due: first of all on the way of every open of a cached lock."""
        if self.busy or self.local.running or self.res.phase is Phase.LOST:
            return True
        if self.res.phase is not Phase.IDLE or self.value.writes or self.forgets:
            return False
        if self.unresolved or self.wreck_left is not None:
            return False
        return not (self.view.must_look or self.view.wishes or self.keeps)

    def _got_it(self) -> bool:
        """Whether the head shows a grant that the core has not been told of."""
        mine = self.view.mine()
        known = max(self.res.revision, self.view.given_up)
        return mine is not None and mine.revision > known and mine.level >= self.res.asked

    def _hand_over(self) -> None:
        """Give the level up, one turn of the loop from now: a program that closes and opens again is
        back by then, and its wish goes into the same commit (rule 8)."""
        self._patient = not self._patient
        if self._patient:
            self.space.loop.call_soon(self.resume)
        else:
            granting.put(self, level=self.res.level, then=self.res.next_wish())

    def _ask(self) -> None:
        res, view = self.res, self.view
        if res.asked <= res.level:
            txn, head = changes.renew(view)
            self.send(txn, partial(self._taken, head=head))
        elif view.wish is None:
            if res.asked_trying and view.conflict_ahead(res.asked):
                self.local.run(res.refused(errno.ETXTBSY))
                self._step()
                return
            txn, direct = changes.take(
                view, res.asked, trying=res.asked_trying, convert=res.converting
            )
            self.send(txn, partial(self._taken, head=direct))
        elif view.grantable(res.level) or view.front_of_dead():
            granting.put(self, level=res.level)
        elif not self.local.told:
            self.local.told = True
            self.local.run(res.queued())
            self._step()

    def _should_withdraw(self, wish: Wish) -> bool:
        if self.res.withdrawing:
            return True
        if wish.trying:
            return self.view.conflict_ahead(wish.mode)
        return self.view.later_conversion()

    def _clear(self) -> None:
        """What a broken resource of this name left goes first; see `wreck`."""
        change = wrecks.clear(self)
        if change is not None:
            self.send(change.txn, partial(self._cleared, change=change))

    def _cleared(self, result: TxnResult, change: Change) -> None:
        if not self.refused(result):
            wrecks.cleared(self, result, change)
            self.learned()

    # -- inner workings: transactions ---------------------------------------------------------

    def send(
        self, txn: Txn, done: Callable[[TxnResult], None], *, first_value: bool = False
    ) -> None:
        """The one transaction of this lock that is under way; `done` gets its answer, by `enter`."""
        assert self.heir is None
        self.busy = True
        self.space.sender.submit(Part(self, txn, done, first_value))

    def answered(self) -> None:
        """The transaction's answer is here (or will never be): the next may go."""
        self.busy = False

    @contained
    def enter(self, act: Callable[..., None], *args: object) -> None:
        """Do a part of this lock's own work: with an answer that came, or from a timer."""
        act(*args)

    def later(self, seconds: float, act: Callable[..., None], *args: object) -> Timer:
        """`enter` after a while."""
        return self.space.loop.call_later(seconds, self.enter, act, *args)

    def adopt(self, result: TxnResult) -> None:
        """Take over what an answer says of head and queue."""
        self.view.adopt(result, asking=self.res.phase is Phase.ASKING)

    def refused(self, result: TxnResult) -> bool:
        """Whether a compare failed; then what the store says instead is adopted and acted on."""
        if result.succeeded:
            return False
        self.adopt(result)
        self.learned()
        return True

    def _looked(self, result: TxnResult) -> None:
        self._looking = False
        if self.unresolved:
            # A refusal of trylocks may be what got lost: have the core decide anew.
            self.local.wanted = None
        self.unresolved = False
        self.adopt(result)
        if self.view.wishes_at < 0:
            self.view.must_look = (
                True  # the queue is not known yet: the watch was ahead of the answer
            )
        self.learned()
        if not self.unresolved:
            self.value.answer_reads()

    def _taken(self, result: TxnResult, head: Head | None) -> None:
        """A take or a renewal was tried; without `head` only a wish was filed."""
        if result.succeeded and head is not None:
            self.view.committed(head, [], result.revision)
        else:
            self.adopt(result)
        self.learned()

    def _withdrawn(self, result: TxnResult, wish: Wish) -> None:
        if self.refused(result):
            return
        self.view.withdrawn(wish)
        self.space.took_away(self.space.keys.wish(self.name, wish.node), result.revision)
        self.local.told = False
        if self.res.phase is Phase.ASKING and not wish.trying:
            self.busy = True  # nothing else is begun until it is known who is told EDEADLK
            self.local.look_at_converters(partial(self._refuse, errno.EDEADLK))
        else:
            self._refuse(errno.ETXTBSY)

    def _refuse(self, reason: int) -> None:
        """The request came to nothing."""
        self.busy = False
        if self.res.phase is Phase.ASKING:
            self.local.run(self.res.refused(0 if self.res.withdrawing else reason))
        self.learned()

    def _refuse_trylocks(self) -> None:
        """Delete the trylock wishes that our users stand in the way of (rule 10)."""
        self.local.refuse_try = False
        mine = self.view.mine()
        level = mine.level if mine is not None else Mode.NL
        victims = [w for w in self.view.others() if w.trying and not compatible(w.mode, level)]
        if victims:
            # The others' wishes will be told of when these are gone, and be refused then.
            now = victims[: changes.refusals_max(self.space.store.bounds)]
            self.send(changes.refuse(self.view, now), self._refused_trylocks)
        else:
            self._step()

    def _refused_trylocks(self, result: TxnResult) -> None:
        if not result.succeeded:
            self.adopt(result)
            self.local.wanted = None  # ask the core again about who is left
        self.learned()

    @contained
    def failed(self, error: DlmfsError) -> None:
        """A definite refusal by the store: nothing of the transaction was applied."""
        if not isinstance(error, Unavailable):
            self.wreck(error)
        elif self._looking:  # refused for the sake of others' writes in its commit
            self._looking = False
            self.view.must_look = True
            self.space.loop.call_later(RETRY_S, self.resume)
        elif self.wreck_left is not None:
            self.space.loop.call_later(RETRY_S, self.resume)
        elif self.value.writes and self.res.phase is not Phase.DROPPING:
            values.finish(self, error)
        elif self.forgets and self.res.phase is Phase.IDLE:
            forgetting.finish(self, error)
        elif self.res.phase is Phase.ASKING and self.view.wish is None:
            self.local.run(self.res.refused(error.errno))
            self._step()
        else:
            self.space.loop.call_later(RETRY_S, self.resume)
