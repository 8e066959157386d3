"""The protocol of one lock resource: from what the core wants to transactions, and back.

Rules of this file
------------------
* Level-triggered: every event changes what we know (`_head`, the queue, the core) and then calls
  `_step`, which looks at all of it and starts the one transaction that is due. Nothing depends on
  the path by which we came to know.
* One transaction at a time per lock (engine rule 3).
* What we know carries the revision at which it was true; older answers never replace newer
  knowledge (engine rule 4, protocol-traps 8).
* An unknown outcome is never guessed: the domain gets a new epoch, then the lock is read anew.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.core.lockres import (
    Action,
    Ask,
    Claim,
    Drop,
    Fail,
    Grant,
    Identify,
    Lockres,
    Notify,
    Phase,
    RefuseTry,
    Stage,
    Withdraw,
)
from dlmfs.engine.queue import bury, fits, grant_pass, ordered
from dlmfs.engine.records import Head, Mail, Member, Wish, decode_head, encode_mail, settled
from dlmfs.errors import DlmfsError, LockLost, StoreFull
from dlmfs.model import LVB_SIZE, Mode, compatible
from dlmfs.store.base import (
    Compare,
    Delete,
    Get,
    KeyValue,
    Op,
    Put,
    Range,
    Txn,
    TxnResult,
    created_at,
    none_newer,
    unchanged,
)
from dlmfs.timing import Timer

if TYPE_CHECKING:
    from dlmfs.engine.lockspace import Lockspace

Done = Callable[[DlmfsError | None], None]

_EMPTY: Final = Head({})
NOTHING: Final[tuple[tuple[Mode, Mode, Mode], list[int]]] = ((Mode.NL, Mode.NL, Mode.NL), [])
"""What a core that was just made has been told of the others' wishes."""
RETRY_S: Final = 0.2
"""Wait before a give-up is tried again on a store that is full."""


class Write(NamedTuple):
    offset: int
    data: bytes
    done: Done


class ClusterLock:
    """One lock resource of one domain at this node: the core's state and the store's."""

    __slots__ = (
        "_asked_since",
        "_busy",
        "_draining",
        "_forgets",
        "_given_up",
        "_head",
        "_head_at",
        "_head_revision",
        "_lvb_reads",
        "_mailed",
        "_must_look",
        "_refuse_try",
        "_todo",
        "_told",
        "_try_timer",
        "_unresolved",
        "_vanished",
        "_wanted",
        "_wish",
        "_writes",
        "name",
        "res",
        "space",
        "wishes",
        "wishes_at",
    )

    def __init__(self, space: Lockspace, name: bytes) -> None:
        self.space = space
        self.name = name
        self.res = Lockres(space.owner)
        self.wishes: dict[str, Wish] = space.wishes.setdefault(name, {})
        self.wishes_at = space.revision
        self._head = _EMPTY
        self._head_revision = 0  # 0: none, or not known: the first take guesses "none"
        self._given_up = 0
        self._head_at = -1  # the store revision at which `_head` was true
        self._wish: Wish | None = None
        self._vanished: Wish | None = None
        self._mailed = False
        self._busy = False
        self._unresolved = False
        self._must_look = False
        self._refuse_try = False
        self._told = False
        self._wanted = NOTHING
        self._writes: list[Write] = []
        self._lvb_reads: list[Callable[[bytes], None]] = []
        self._forgets: list[Done] = []
        self._todo: list[Action] = []
        self._draining = False
        self._asked_since = 0.0
        self._try_timer: Timer | None = None

    # -- what the node asks -------------------------------------------------------------------

    def open(self, claim: Claim) -> None:
        """A program opens the lock: answered by the host's `granted` or `failed`."""
        if self._forgets:
            # The kernel's answer to an open that races with unlink (kernel-behaviour, "unlink").
            self.space.host.failed(claim, errno.ETXTBSY if claim.trying else errno.EAGAIN)
            return
        self._run(self.res.open(claim))
        self._step()
        if claim.trying and claim.stage is Stage.WAITING and self._try_timer is None:
            delay = self.space.timing.try_timeout_s
            self._try_timer = self.space.loop.call_later(delay, self._try_is_over)

    def close(self, claim: Claim) -> None:
        self._run(self.res.close(claim))
        self._step()

    def interrupt(self, claim: Claim) -> None:
        """A waiter got a signal; the caller has answered EINTR already (engine rule 8)."""
        self._run(self.res.interrupt(claim))
        self._step()

    def read_lvb(self, done: Callable[[bytes], None]) -> None:
        """The value, for a holder. Waits while a write's outcome is unknown (rule 13)."""
        if self._unresolved and self._writes:
            self._lvb_reads.append(done)
        else:
            done(self._head.lvb)

    def write_lvb(self, offset: int, data: bytes, done: Done) -> None:
        """Put `data` at `offset`; done when durable. For an EX holder only (promise 4)."""
        assert 0 <= offset < LVB_SIZE
        assert len(data) <= LVB_SIZE - offset
        self._writes.append(Write(offset, data, done))
        self._step()

    def forget(self, done: Done) -> None:
        """Leave the lock: this node's file is unlinked, or the domain is left (rule 15)."""
        self._forgets.append(done)
        if self.res.phase is Phase.IDLE:
            self.res.surrender()
        self._step()

    def lose(self, reason: int) -> None:
        """The node's incarnation is over (promise 3)."""
        lost = LockLost("the lock was lost: this node's membership in the domain ended")
        self._cancel_try()
        if self.res.phase is not Phase.LOST:
            self._run(self.res.lose(reason))
        writes, self._writes = self._writes, []
        for write in writes:
            write.done(lost)
        self._answer_reads()
        forgets, self._forgets = self._forgets, []
        for done in forgets:
            done(None)

    # -- what the store tells -------------------------------------------------------------------

    # These only note what happened. The domain calls `learned` when all events of a revision
    # are noted: a transaction built in between would vouch for a queue half seen.

    def wish_put(self, wish: Wish, revision: int) -> None:
        """A put below w/<lock>/. Ones from before our last reading of the queue are known."""
        if revision <= self.wishes_at:
            return
        self.wishes[wish.node] = wish
        if wish.node == self.space.node and self.res.phase is Phase.ASKING and self._wish is None:
            self._wish = wish

    def wish_gone(self, node: str, revision: int) -> None:
        """A deletion below w/<lock>/."""
        wish = self.wishes.get(node)
        if wish is None or wish.revision >= revision:
            return
        was_front = self._is_front()
        del self.wishes[node]
        if self._wish is None:
            return
        if node == self.space.node and self._wish.revision == wish.revision:
            if self._busy:
                # Our own commit may have granted or withdrawn it, with its answer still to come.
                self._must_look = True
            else:
                self._vanished, self._wish = self._wish, None
        elif not was_front and self._is_front():
            # The wish ahead of ours vanished. If it was withdrawn, no head changed and nobody
            # else will act (protocol-traps 2).
            self._must_look = True

    def mail(self, mail: Mail, revision: int) -> None:
        """Somebody's commit granted our wish. A mismatch is from an older wish (trap 10)."""
        self._mailed = True
        if self._wish is None or mail.wish_revision != self._wish.revision:
            # Either old mail, or the answer that tells us of our wish is later than this notice.
            self._must_look |= self.res.phase in (Phase.ASKING, Phase.DROPPING)
        elif revision > self._head_at:
            self._set_head(mail.head, revision, revision)

    def learned(self) -> None:
        """Knowledge changed: tell the core, then act on it."""
        res = self.res
        if res.phase is Phase.LOST:
            return
        mine = self._mine()
        if res.phase is Phase.DROPPING and (
            mine is None or mine.level <= res.level or mine.revision > res.revision
        ):
            if res.asked is not Mode.NL:
                self._wish = self.wishes.get(self.space.node)
            self._run(res.dropped())
        if res.phase is Phase.ASKING and self._got_it():
            assert mine is not None
            self._wish = None
            self._tell_wanted()
            self._run(res.granted(mine.level, mine.revision))
        vanished, self._vanished = self._vanished, None
        if vanished is not None:
            self._told = False
            if vanished.trying and res.phase is Phase.ASKING and not res.withdrawing:
                self._run(res.refused(errno.ETXTBSY))
            # A plain wish that was removed by hand: `_step` asks again.
        self._tell_wanted()
        self._step()

    def member_gone(self) -> None:
        """A node died or left: its place in the head may have been in our way (rule 6)."""
        if self._wish is not None or self.res.phase is Phase.ASKING:
            self._must_look = True
            self._step()

    def reread(self) -> None:
        """Events were missed, or an outcome is unknown: read everything before doing more."""
        self._unresolved = True

    def resume(self) -> None:
        self._step()

    # -- status -----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is under way and nobody waits here: only the cached level is left."""
        return not (
            self.res.in_use or self._busy or self._writes or self._forgets or self._unresolved
        )

    @property
    def known_head(self) -> Head:
        return self._head

    @property
    def queued_since(self) -> float | None:
        return self._asked_since if self._wish is not None else None

    @property
    def is_member(self) -> bool:
        return self._mine() is not None

    # -- inner workings: the core -----------------------------------------------------------

    def _run(self, actions: list[Action]) -> None:
        """Carry out the core's actions in order. A grant that cannot be delivered is closed from
        inside the loop; its actions queue up behind, or a Withdraw would pass its Ask."""
        if not actions:
            return
        self._todo.extend(actions)
        if self._draining:
            return
        self._draining = True
        host = self.space.host
        while self._todo:
            action = self._todo.pop(0)
            match action:
                case Grant(claim):
                    host.granted(claim)
                case Fail(claim, reason):
                    host.failed(claim, reason)
                case Notify(claim):
                    host.notify(claim)
                case Identify(claim):
                    kin = host.is_kin(claim, list(self.res.holders.values()))
                    self._todo.extend(self.res.identified(claim, kin=kin))
                case RefuseTry():
                    self._refuse_try = True
                case Ask():
                    self._asked_since = self.space.loop.time()
                    self._told = False
                case Drop():
                    self._told = False
                case Withdraw():
                    pass
        self._draining = False

    def _tell_wanted(self) -> None:
        """Tell the core what the others wish for, if that changed."""
        others = [w for w in ordered(self.wishes.values()) if w.node != self.space.node]
        waiting = [w.mode for w in others if not w.trying]
        trying = [w.mode for w in others if w.trying]
        wanted = (
            waiting[0] if waiting else Mode.NL,
            max(waiting, default=Mode.NL),
            max(trying, default=Mode.NL),
        )
        # Each trylock needs an answer of its own, also where the modes stay the same.
        told = (wanted, [w.revision for w in others if w.trying])
        if told != self._wanted:
            self._wanted = told
            self._refuse_try = False
            self._run(self.res.wanted(*wanted))

    # -- inner workings: knowledge ------------------------------------------------------------

    def _mine(self) -> Member | None:
        """Our place in the head. An older incarnation of ours is a dead stranger (rule 14)."""
        member = self._head.members.get(self.space.node)
        if member is None or member.incarnation != self.space.incarnation:
            return None
        return member

    def _set_head(self, head: Head, mod_revision: int, at: int) -> None:
        self._head, self._head_revision, self._head_at = head, mod_revision, at

    def _adopt(self, head: KeyValue | None, queue: tuple[KeyValue, ...], at: int) -> None:
        """Take over a reading of head and queue made at store revision `at`."""
        if at >= self._head_at:
            if head is None:
                self._set_head(_EMPTY, 0, at)
            else:
                self._set_head(decode_head(head), head.mod_revision, at)
        if at >= max(self.wishes_at, self.space.revision):
            self.wishes.clear()
            for kv in queue:
                wish = self.space.wish_of(kv)
                self.wishes[wish.node] = wish
            self.wishes_at = at
            mine = self.wishes.get(self.space.node)
            if mine is not None and self.res.phase is Phase.ASKING:
                self._wish = mine
            elif self._wish is not None:
                self._vanished, self._wish = self._wish, None

    def _got_it(self) -> bool:
        """Whether the head shows a grant that the core has not been told of."""
        mine = self._mine()
        known = max(self.res.revision, self._given_up)
        return mine is not None and mine.revision > known and mine.level >= self.res.asked

    # -- inner workings: deciding -----------------------------------------------------------

    def _step(self) -> None:
        """Start the transaction that is due, if any. See the rules at the head of the file."""
        res = self.res
        if self._at_rest() or not self.space.running:
            return
        if self._unresolved or self._must_look:
            self._send(self._look(), self._looked)
        elif res.phase is Phase.DROPPING:
            self._change(level=res.level, then=res.asked)
        elif self._wish is not None and self._should_withdraw():
            self._withdraw()
        elif res.phase is Phase.ASKING and res.withdrawing and self._wish is None:
            self._run(res.refused(0))
            self._step()
        elif self._refuse_try:
            self._refuse_trylocks()
        elif self._surplus_wanted():
            self._change(level=res.level)
        elif self._writes:
            self._write()
        elif self._forgets:
            self._forget()
        elif res.phase is Phase.ASKING:
            self._ask()

    def _at_rest(self) -> bool:
        """Whether nothing can be due: first of all on the way of every open of a cached lock."""
        if self._busy or self._draining or self.res.phase is Phase.LOST:
            return True
        if self.res.phase is not Phase.IDLE or self.wishes or self._writes or self._forgets:
            return False
        return not (self._unresolved or self._must_look)

    def _ask(self) -> None:
        res = self.res
        if res.asked <= res.level:
            self._renew()
        elif self._wish is None:
            if res.asked_trying and self._ahead_conflict(res.asked):
                self._run(res.refused(errno.ETXTBSY))
                self._step()
                return
            self._take()
        elif self._grantable():
            self._change(level=res.level)
        elif not self._told:
            self._told = True
            self._run(res.queued())
            self._step()

    def _foreign_ahead(self) -> list[Wish]:
        queue = ordered(self.wishes.values())
        if self._wish is not None:
            place = next((i for i, w in enumerate(queue) if w.node == self.space.node), len(queue))
            queue = queue[:place]
        return [w for w in queue if w.node != self.space.node]

    def _ahead_conflict(self, mode: Mode) -> bool:
        return any(not w.trying and not compatible(w.mode, mode) for w in self._foreign_ahead())

    def _is_front(self) -> bool:
        """Whether our wish is the first that could act: nobody ahead of it but trylocks."""
        return self._wish is not None and not any(not w.trying for w in self._foreign_ahead())

    def _grantable(self) -> bool:
        head = bury(self._head, self.space.is_dead)
        head = self._at_level(head, self.res.level)
        return any(
            w.node == self.space.node for w in grant_pass(head, self.wishes.values()).granted
        )

    def _should_withdraw(self) -> bool:
        wish = self._wish
        assert wish is not None
        if self.res.withdrawing:
            return True
        if wish.trying:
            return self._ahead_conflict(wish.mode)
        return wish.convert and any(
            w.convert and not w.trying and w.revision < wish.revision for w in self._foreign_ahead()
        )

    def _surplus_wanted(self) -> bool:
        """The head grants us more than the core believes in, and somebody wishes for it."""
        mine = self._mine()
        return (
            mine is not None
            and mine.level > self.res.level
            and any(
                w.node != self.space.node and not compatible(w.mode, mine.level)
                for w in self.wishes.values()
            )
        )

    # -- inner workings: transactions ---------------------------------------------------------

    def _look(self) -> Txn:
        keys = self.space.keys
        return Txn((), (Get(keys.head(self.name)), Range(keys.queue(self.name))))

    def _reading(self) -> tuple[Op, ...]:
        return self._look().then

    def _send(self, txn: Txn, done: Callable[[TxnResult], None]) -> None:
        self._busy = True
        self.space.submit(self, txn, done)

    def answered(self) -> None:
        """The transaction's answer is here (or will never be): the next may go."""
        self._busy = False

    def _adopt_answer(self, result: TxnResult) -> None:
        """Adopt the reading that stands at the end of a branch."""
        head, queue = result.responses[-2:]
        assert head is None or isinstance(head, KeyValue)
        assert isinstance(queue, tuple)
        self._adopt(head, queue, result.revision)  # type: ignore[arg-type]

    def _looked(self, result: TxnResult) -> None:
        if self._unresolved:
            # A refusal of trylocks may be what got lost: have the core decide anew.
            self._wanted = NOTHING
        self._unresolved = self._must_look = False
        self._adopt_answer(result)
        self.learned()
        if not self._unresolved:
            self._answer_reads()

    def _at_level(self, head: Head, level: Mode) -> Head:
        """The head with this node brought down to `level`."""
        mine = head.members.get(self.space.node)
        if mine is None or mine.level <= level:
            return head
        members = dict(head.members)
        members[self.space.node] = mine._replace(level=level)
        return head._replace(members=members)

    def _guards(self, granted: list[Wish]) -> tuple[Compare, ...]:
        """Rule 5: the head is as we know it, the wishes granted still stand, none is newer."""
        keys = self.space.keys
        return (
            unchanged(keys.head(self.name), self._head_revision),
            none_newer(keys.queue(self.name), max(self.wishes_at, self.space.revision)),
            *(created_at(keys.wish(self.name, w.node), w.revision) for w in granted),
        )

    def _deliver(self, granted: list[Wish], head: bytes) -> list[Op]:
        """Remove the granted wishes and fill their nodes' mail slots; our own needs none."""
        keys = self.space.keys
        ops: list[Op] = []
        for wish in granted:
            ops.append(Delete(keys.wish(self.name, wish.node)))
            if wish.node != self.space.node:
                mail = keys.mail(wish.node, self.name)
                ops.append(Put(mail, encode_mail(wish, head), wish.lease))
        if self._mailed:
            ops.append(Delete(keys.mail(self.space.node, self.name)))
        return ops

    def _change(
        self,
        *,
        level: Mode,
        then: Mode = Mode.NL,
        lvb: bytes | None = None,
    ) -> None:
        """Commit a new head: ourselves at `level`, perhaps a new value, then the grant pass."""
        mine = self._mine()
        if mine is not None and mine.level > level:
            # From the sending on, what this grant gave us is no longer ours (rule 5).
            self._given_up = mine.revision
        head = self._at_level(bury(self._head, self.space.is_dead), level)
        if lvb is not None:
            head = head._replace(lvb=lvb, abandoned=None)
        head, granted = grant_pass(head, self.wishes.values())
        record = head.encode()
        ops = [Put(self.space.keys.head(self.name), record), *self._deliver(granted, record)]
        if then is not Mode.NL:
            ops.append(self._wish_op(then, trying=False, convert=False))
        self._send(
            Txn(self._guards(granted), tuple(ops), self._reading()),
            lambda result: self._changed(result, head, granted, then, writing=lvb is not None),
        )

    def _changed(
        self,
        result: TxnResult,
        head: Head,
        granted: list[Wish],
        then: Mode,
        *,
        writing: bool,
    ) -> None:
        if not result.succeeded:
            self._adopt_answer(result)
            self.learned()
            return
        self._committed(head, granted, result.revision)
        if then is not Mode.NL and result.revision > self.space.revision:
            # Otherwise the watch has told us already of this wish, and perhaps of its end.
            wish = self._own_wish(then, trying=False, convert=False, revision=result.revision)
            self.wishes[wish.node] = wish
        if writing:
            self._writes.pop(0).done(None)
        self.learned()

    def _committed(self, head: Head, granted: list[Wish], revision: int) -> None:
        """Our head change was applied at `revision`; the compares say what else was true then."""
        if revision > self._head_at:
            self._set_head(settled(head, revision), revision, revision)
            self._mailed = False
        for wish in granted:
            known = self.wishes.get(wish.node)
            if known is not None and known.revision == wish.revision:
                del self.wishes[wish.node]
            if wish.node == self.space.node:
                self._wish = None
        self.wishes_at = max(self.wishes_at, revision)

    def _own_wish(self, mode: Mode, *, trying: bool, convert: bool, revision: int) -> Wish:
        space = self.space
        return Wish(space.node, space.incarnation, mode, trying, convert, revision, space.lease)

    def _wish_op(self, mode: Mode, *, trying: bool, convert: bool) -> Put:
        wish = self._own_wish(mode, trying=trying, convert=convert, revision=0)
        return Put(self.space.keys.wish(self.name, wish.node), wish.encode(), wish.lease)

    def _take(self) -> None:
        """Rule 7: one commit if the head is free or as guessed and nobody waits; else a wish."""
        res = self.res
        space = self.space
        mode, trying, convert = res.asked, res.asked_trying, res.converting
        wish = self._wish_op(mode, trying=trying, convert=convert)
        filing = (wish, *self._reading())
        head = bury(self._head, space.is_dead)
        direct = not any(w.node != space.node for w in self.wishes.values())
        if not (direct and fits(head.members, space.node, mode)):
            self._send(Txn((), filing), self._filed)
            return
        members = dict(head.members)
        members[space.node] = Member(space.incarnation, mode, 0)
        head = head._replace(members=members)
        ops: list[Op] = [Put(space.keys.head(self.name), head.encode())]
        if self._mailed:
            ops.append(Delete(space.keys.mail(space.node, self.name)))
        self._send(
            Txn(self._guards([]), tuple(ops), filing),
            lambda result: self._taken(result, head),
        )

    def _renew(self) -> None:
        """A larger token at the level we have: owner=file has used up this one's counter."""
        mine = self._mine()
        assert mine is not None
        members = dict(self._head.members)
        members[self.space.node] = mine._replace(revision=0)
        head = self._head._replace(members=members)
        self._send(
            Txn(
                (unchanged(self.space.keys.head(self.name), self._head_revision),),
                (Put(self.space.keys.head(self.name), head.encode()),),
                self._reading(),
            ),
            lambda result: self._taken(result, head),
        )

    def _taken(self, result: TxnResult, head: Head) -> None:
        if result.succeeded:
            self._committed(head, [], result.revision)
        else:
            self._adopt_answer(result)
        self.learned()

    def _filed(self, result: TxnResult) -> None:
        self._adopt_answer(result)
        self.learned()

    def _withdraw(self) -> None:
        """Take our wish back; if it is no longer there, it was granted (rule 8)."""
        wish = self._wish
        assert wish is not None
        key = self.space.keys.wish(self.name, wish.node)
        self._send(
            Txn((created_at(key, wish.revision),), (Delete(key),), self._reading()),
            lambda result: self._withdrawn(result, wish),
        )

    def _withdrawn(self, result: TxnResult, wish: Wish) -> None:
        if not result.succeeded:
            self._adopt_answer(result)
            self.learned()
            return
        self._wish = None
        self._told = False
        if self.wishes.get(wish.node) == wish:
            del self.wishes[wish.node]
        if self.res.phase is Phase.ASKING:
            refusal = errno.ETXTBSY if wish.trying else errno.EDEADLK
            self._run(self.res.refused(0 if self.res.withdrawing else refusal))
        self.learned()

    def _try_is_over(self) -> None:
        """The holder of a lock we try, or the store, is silent: answer without it (trap 13).

        The core withdraws the request once nobody waits for it.
        """
        self._try_timer = None
        for claim in [c for c in self.res.waiters.values() if c.trying]:
            if claim.stage is Stage.WAITING:  # else the one before it made room
                self.space.host.failed(claim, errno.ETXTBSY)
                self._run(self.res.interrupt(claim))
        self._step()

    def _cancel_try(self) -> None:
        if self._try_timer is not None:
            self._try_timer.cancel()
            self._try_timer = None

    def _refuse_trylocks(self) -> None:
        """Delete the trylock wishes that our users stand in the way of (rule 10)."""
        self._refuse_try = False
        mine = self._mine()
        level = mine.level if mine is not None else Mode.NL
        victims = [
            w
            for w in self.wishes.values()
            if w.trying and w.node != self.space.node and not compatible(w.mode, level)
        ]
        if not victims:
            self._step()
            return
        keys = self.space.keys
        guards = tuple(created_at(keys.wish(self.name, w.node), w.revision) for w in victims)
        deletes = tuple(Delete(keys.wish(self.name, w.node)) for w in victims)
        self._send(Txn(guards, deletes, self._reading()), self._refused_trylocks)

    def _refused_trylocks(self, result: TxnResult) -> None:
        if not result.succeeded:
            self._adopt_answer(result)
            self._wanted = NOTHING  # ask the core again about who is left
        self.learned()

    def _write(self) -> None:
        write = self._writes[0]
        mine = self._mine()
        if mine is None or mine.level is not Mode.EX:
            self._finish_write(LockLost("the exclusive lock was lost before the write"))
            return
        old = self._head.lvb
        new = old[: write.offset] + write.data + old[write.offset + len(write.data) :]
        if new == old and self._head.abandoned is None and self._head_revision:
            self._finish_write(None)
        else:
            self._change(level=Mode.EX, lvb=new)

    def _finish_write(self, error: DlmfsError | None) -> None:
        self._writes.pop(0).done(error)
        self._answer_reads()
        self._step()

    def _answer_reads(self) -> None:
        reads, self._lvb_reads = self._lvb_reads, []
        for done in reads:
            done(self._head.lvb)

    def _forget(self) -> None:
        """Leave the head, or remove it with the last member (rule 15)."""
        if self.res.phase is not Phase.IDLE:
            return  # a withdrawal or a hand-over is under way; its end brings us back
        self.res.surrender()
        if self._mine() is None:
            self._forgotten(None)
            return
        space = self.space
        members = {n: m for n, m in self._head.members.items() if n != space.node}
        head = bury(self._head._replace(members=members), space.is_dead)
        head, granted = grant_pass(head, self.wishes.values())
        record = head.encode()
        key = space.keys.head(self.name)
        # Members left behind must be alive, or nobody ever looks at this head again (trap 9).
        alive = tuple(
            created_at(space.keys.member(node), m.incarnation)
            for node, m in head.members.items()
            if all(w.node != node for w in granted)
        )
        ops = [Put(key, record) if head.members else Delete(key), *self._deliver(granted, record)]
        self._send(
            Txn((*self._guards(granted), *alive), tuple(ops), self._reading()),
            lambda result: self._left(result, head, granted),
        )

    def _left(self, result: TxnResult, head: Head, granted: list[Wish]) -> None:
        if not result.succeeded:
            self._adopt_answer(result)
            self.learned()
            return
        self._committed(head, granted, result.revision)
        if not head.members:
            self._set_head(_EMPTY, 0, result.revision)
        self._forgotten(None)

    def _forgotten(self, error: DlmfsError | None) -> None:
        forgets, self._forgets = self._forgets, []
        if error is None:
            # The core's cached level went with the place in the head.
            self.res = Lockres(self.space.owner)
            self._wanted = NOTHING
        for done in forgets:
            done(error)

    def failed(self, error: DlmfsError) -> None:
        """A definite refusal by the store: nothing of the transaction was applied."""
        if not isinstance(error, StoreFull):
            return
        if self._writes and self.res.phase is not Phase.DROPPING:
            self._finish_write(error)
        elif self._forgets:
            self._forgotten(error)
        elif self.res.phase is Phase.ASKING and self._wish is None:
            self._run(self.res.refused(error.errno))
            self._step()
        else:
            self.space.loop.call_later(RETRY_S, self._step)
