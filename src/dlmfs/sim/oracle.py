"""What every commit must keep, seen from the store: the heads' invariants, one commit at a time.

The checks of `checks` are a program's; these need nobody to look at the right moment. Each rule stands
in a method of its own and names the promise (design, section 2) or the engine rule (section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dlmfs.core.tokens import PLAIN, Tokens
from dlmfs.engine.records import (
    DOMAINS,
    HEADS,
    Abandoned,
    Head,
    Keys,
    Member,
    Wish,
    decode_head,
    decode_wish,
    lock_of,
    member_of,
)
from dlmfs.engine.timeline import OFFSET, decode_offset
from dlmfs.errors import BadState
from dlmfs.model import EMPTY_LVB, TOKEN_SHIFT, Mode, compatible
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Bounds, Event, KeyValue
from dlmfs.store.memory import MemoryServer

Lock = tuple[bytes, bytes]
"""Domain and name."""

OPERATOR: Final = "operator"
"""Who puts what no node has put."""
NONE: Final = Head({})
ROUNDING_S: Final = 0.002


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Write:
    """A write(2) that was begun; `revision` once it is in the store."""

    lock: Lock
    node: str
    offset: int
    data: bytes
    anew: bool
    """On a value that a dead holder left it begins with zeros (dead-value=invalid)."""
    revision: int = 0
    """Offset included, as of `Value`."""

    def onto(self, head: Head) -> bytes:
        lvb = EMPTY_LVB if self.anew and head.abandoned is not None else head.lvb
        return lvb[: self.offset] + self.data + lvb[self.offset + len(self.data) :]


class Value(NamedTuple):
    revision: int
    lvb: bytes


@dataclass
class LockRecord:
    """What stands in the store of one lock, and what stood there."""

    head: Head = NONE
    head_revision: int = 0
    wishes: dict[str, Wish] = field(default_factory=dict)
    values: list[Value] = field(default_factory=lambda: [Value(0, EMPTY_LVB)])
    granted: dict[int, set[str]] = field(default_factory=dict)
    """By revision and offset: the nodes that were granted something in that commit."""
    writes: list[Write] = field(default_factory=list)
    lost: set[bytes] = field(default_factory=set)
    """Values that it had before the store went back. Who was granted it then may read them until told."""
    seers: set[str] = field(default_factory=set)
    """The nodes on which a program has had the lock exclusively since the present mark was made."""
    spoilt: set[bytes] = field(default_factory=set)
    """The keys of its head and wishes that cannot be read now."""
    disordered: bool = False
    """A wish could not be read once: who saw it no more may have passed it before it was put again."""
    marks: set[tuple[str, int]] = field(default_factory=set)
    """All that ever stood in the head: the node, and the revision of its grant."""


class Memory(NamedTuple):
    """What stood in the store once."""

    locks: dict[Lock, LockRecord]
    members: dict[bytes, dict[str, int]]
    tokens: Tokens
    touched: int


class Oracle:
    """Follows all commits. `lock_delay`: nodes leave dead members in the heads for a while, at least
    `lock_delay_s` in true time; `clock`: that, in seconds."""

    def __init__(
        self, lock_delay_s: float, clock: Callable[[], float], *, lock_delay: bool
    ) -> None:
        self.lock_delay = lock_delay
        self.lock_delay_s = lock_delay_s
        self.clock = clock
        self.ended: dict[tuple[bytes, str, int], float] = {}
        """By domain, node and incarnation: when the membership ended."""
        self.locks: dict[Lock, LockRecord] = {}
        self.valued: Callable[[Lock], None] = lambda _lock: None
        """Told of each first value."""
        self.forgotten: Callable[[Lock, Head, str | None], None] = lambda *_: None
        """Told of each value that went with its head, and who removed it."""
        self.left: Callable[[Lock, Head, Head, str], None] = lambda *_: None
        """Told of each head that a node has taken itself out of: as it was, as it is, and who."""
        self.members: dict[bytes, dict[str, int]] = {}
        self.commits = 0
        self.touched = 0
        """The revision of the last commit that is about locks."""
        self.tokens = PLAIN
        self._all_tokens = [PLAIN]
        """All that were ever in force: who does not know of a raise yet grants under those of before."""
        self.raises = 0
        self.raised_at = float("inf")
        """When the offset of tokens was raised last."""
        self.closed_until = float("-inf")
        """Nobody may be granted anything before that: the store went back."""
        self.now: Callable[[], float] = lambda: 0.0
        self.lost: set[tuple[bytes, str, int]] = set()
        """Memberships that a node lost by a fault: what it does with their records is a death's doing."""
        self.broken: dict[Lock, set[str]] = {}
        """By lock: the nodes that have lost it by a fault, and stand in its head still."""

    def lock(self, lock: Lock) -> LockRecord:
        record = self.locks.get(lock)
        if record is None:
            record = self.locks[lock] = LockRecord()
        return record

    def had_ex(self, lock: Lock, node: str) -> None:
        """A program on `node` has the lock exclusively."""
        record = self.lock(lock)
        if record.head.abandoned is not None:
            record.seers.add(node)

    def wrecked(self, lock: Lock, node: str) -> None:
        """A node's state of a lock was broken; its next change of the head gives it up."""
        self.broken.setdefault(lock, set()).add(node)

    def alive(self, domain: bytes, node: str, incarnation: int) -> bool:
        return self.members.get(domain, {}).get(node) == incarnation

    # -- going back -----------------------------------------------------------------------------

    def remember(self) -> Memory:
        """What stands in the store now."""
        locks = {lock: _copied(record) for lock, record in self.locks.items()}
        members = {domain: dict(nodes) for domain, nodes in self.members.items()}
        return Memory(locks, members, self.tokens, self.touched)

    def put_back(self, memory: Memory) -> None:
        """The store is what it was once. Tokens that were given, and writes begun, are not forgotten."""
        for lock, record in self.locks.items():
            old = memory.locks.get(lock, LockRecord())
            record.head, record.head_revision = old.head, old.head_revision
            record.lost |= {value.lvb for value in record.values} - {v.lvb for v in old.values}
            record.wishes, record.values = dict(old.wishes), list(old.values)
        self.members = {domain: dict(nodes) for domain, nodes in memory.members.items()}
        self.tokens, self.touched = memory.tokens, memory.touched

    def base(self, revision: int) -> int:
        """Of the tokens granted by that commit: the same revision may come twice."""
        return self.tokens.of(revision) >> TOKEN_SHIFT

    def grant(self, record: LockRecord, revision: int, node: str) -> None:
        """That commit granted the node something: a token of it is a true one."""
        for tokens in self._all_tokens:
            record.granted.setdefault(tokens.of(revision) >> TOKEN_SHIFT, set()).add(node)

    # -- following ------------------------------------------------------------------------------

    def commit(self, revision: int, events: tuple[Event, ...], author: str | None) -> None:
        """A commit by `author`; None: the store ended a session."""
        self.commits += 1
        heads: list[tuple[Lock, KeyValue | None]] = []
        before: dict[Lock, dict[str, Wish]] = {}
        for event in events:
            key, put = event.kv.key, event.kind == "put"
            if key.startswith((HEADS, DOMAINS)):
                self.touched = revision
            if key == OFFSET and put:
                self.tokens = decode_offset(event.kv)
                self._all_tokens.append(self.tokens)
                self.raises, self.raised_at = self.raises + 1, self.now()
            if key.startswith(HEADS):
                found = lock_of(key)
                if found is not None:
                    heads.append((found, event.kv if put else None))
            elif key.startswith(DOMAINS):
                domain = key[len(DOMAINS) :].split(b"/")[0]
                member, wish = member_of(key), Keys(domain, "").split_wish(key)
                if member is not None:
                    self._member(*member, event.kv if put else None, author)
                elif wish is not None:
                    record = self.lock((domain, wish[0]))
                    before.setdefault((domain, wish[0]), dict(record.wishes))
                    self._wish(record, event.kv, wish[1], put=put)
        for lock, kv in heads:
            record = self.lock(lock)
            if author == OPERATOR:
                self._spoil(record, kv, revision)
                continue
            old, new = record.head, NONE if kv is None else decode_head(kv)
            record.head, record.head_revision = new, 0 if kv is None else revision
            wishes = before.get(lock, record.wishes)
            _Change(self, lock, old, new, revision, author, wishes).check(deleted=kv is None)
            if _named(new.abandoned) != _named(old.abandoned):
                record.seers.clear()

    def _wish(self, record: LockRecord, kv: KeyValue, node: str, *, put: bool) -> None:
        record.spoilt.discard(kv.key)
        record.wishes.pop(node, None)
        if put:
            try:
                record.wishes[node] = decode_wish(kv, node)
            except BadState:  # as if it were not there
                record.spoilt.add(kv.key)
                record.disordered = True

    def _spoil(self, record: LockRecord, kv: KeyValue | None, revision: int) -> None:
        """Somebody who is no node wrote over a head: nobody may change it while it cannot be read. Or
        it is as it was before; or gone, and with it value and mark."""
        if kv is None:
            record.spoilt.clear()
            record.head, record.head_revision = NONE, 0
            record.values.append(Value(revision, EMPTY_LVB))
            return
        try:
            record.head = decode_head(kv)
        except BadState:
            record.spoilt.add(kv.key)
        else:
            record.spoilt.discard(kv.key)
        record.head_revision = revision

    def _member(self, domain: bytes, node: str, kv: KeyValue | None, author: str | None) -> None:
        members = self.members.setdefault(domain, {})
        if kv is not None:
            members[node] = kv.create_revision
            if author == OPERATOR:  # its node is to take it away, when it has noticed
                self.lost.add((domain, node, kv.create_revision))
            return
        incarnation = members.pop(node, None)
        if incarnation is not None:
            self.ended[domain, node, incarnation] = self.clock()
        if author != node or (domain, node, incarnation) in self.lost:
            return
        # A clean leave with a lock cached looks like a death to the others (protocol-traps 12).
        for lock, record in self.locks.items():
            if any(key.startswith(HEADS) for key in record.spoilt):
                continue  # nobody could take it out of there
            member = record.head.members.get(node)
            if lock[0] == domain and member is not None and member.incarnation == incarnation:
                if member.level is not Mode.NL:
                    raise Violation(
                        f"{node} left {domain!r} with {lock[1]!r} at {member.level.name}"
                    )


def _copied(record: LockRecord) -> LockRecord:
    return LockRecord(record.head, record.head_revision, dict(record.wishes), list(record.values))


@dataclass
class _Change:
    """One head's change, and the rules for it."""

    oracle: Oracle
    lock: Lock
    old: Head
    new: Head
    revision: int
    author: str | None
    wishes: dict[str, Wish]
    """As they stood before."""

    def check(self, *, deleted: bool) -> None:
        spoilt = self.oracle.lock(self.lock).spoilt
        if any(key.startswith(HEADS) for key in spoilt):
            self._fail("a head was changed that nobody can read")
        if deleted:
            self._deletion()
        self._compatible()
        self._members()
        if not spoilt:  # who queues where another's wish cannot be read is served before it
            self._order()
        self._value()
        self._mark(deleted=deleted)
        mine = self.old.members.get(self.author or "")
        if mine is not None and self.author is not None and self.author not in self.new.members:
            if self._alive(self.author, mine):
                self.oracle.left(self.lock, self.old, self.new, self.author)

    def _fail(self, what: str) -> None:
        name = b"/".join(self.lock).decode(errors="replace")
        raise Violation(f"commit {self.revision} by {self.author}: {name}: {what}")

    def _alive(self, node: str, member: Member) -> bool:
        return self.oracle.alive(self.lock[0], node, member.incarnation)

    def _compatible(self) -> None:
        """Promise 1: no two living members at incompatible levels."""
        living = [(n, m) for n, m in self.new.members.items() if self._alive(n, m)]
        for place, (one, a) in enumerate(living):
            for other, b in living[place + 1 :]:
                if not compatible(a.level, b.level):
                    self._fail(f"{one} at {a.level.name} and {other} at {b.level.name}")

    def _members(self) -> None:
        """Promise 2 and rule 12: a raise gets this revision, nothing else changes one; nobody but a
        member itself lowers or removes it while it lives; nobody is left behind by the dead alone."""
        record = self.oracle.lock(self.lock)
        for node, new in self.new.members.items():
            old = self.old.members.get(node)
            known = old is not None and old.incarnation == new.incarnation
            before = old.level if old is not None and known else Mode.NL
            if new.level > before:
                if new.revision != self.revision:
                    self._fail(f"{node} got {new.level.name} with the old revision {new.revision}")
                if self.oracle.now() < self.oracle.closed_until:
                    self._fail(f"{node} got {new.level.name} so soon after the store went back")
                self.oracle.grant(record, self.revision, node)
            elif new.level < before and node != self.author:
                self._fail(f"{node} was lowered to {new.level.name} by another")
            elif old is not None and known and new.revision == self.revision:
                # One that has given up its idle level, and told nobody, may wish for it again.
                wished = node in self.wishes and node not in record.wishes
                if node != self.author and not wished:
                    self._fail(f"the revision of {node} was changed by another")
                self.oracle.grant(record, self.revision, node)
            elif old is not None and known and new.revision != old.revision:
                self._fail(f"the revision of {node} went from {old.revision} to {new.revision}")
        self._removals()

    def _removals(self) -> None:
        """The other half of `_members`: who is in the head no more."""
        for node, old in self.old.members.items():
            kept = self.new.members.get(node)
            if kept is None or kept.incarnation != old.incarnation:
                if node != self.author and self._alive(node, old):
                    self._fail(f"{node} was removed alive")
                self._in_time(node, old)
        if self.new.members and self.new.abandoned is None and not self.oracle.lock_delay:
            domain, waiting = self.lock[0], self.oracle.lock(self.lock).wishes.values()
            living = any(self._alive(n, m) for n, m in self.new.members.items())
            # Whose membership was taken from it comes back, and takes back what it wished for.
            living |= any(
                (domain, n, m.incarnation) in self.oracle.lost for n, m in self.new.members.items()
            )
            looked_after = any(self.oracle.alive(domain, w.node, w.incarnation) for w in waiting)
            if not living and not looked_after:
                self._fail("only dead members are left: nobody looks at it again (traps 9)")

    def _in_time(self, node: str, old: Member) -> None:
        """Promise 5: what a dead member had is not taken away before the lock-delay is over."""
        delay_s = self.oracle.lock_delay_s
        ended = self.oracle.ended.get((self.lock[0], node, old.incarnation))
        if old.level is Mode.NL or ended is None or not delay_s:
            return
        if self.oracle.clock() < ended + delay_s - ROUNDING_S:
            self._fail(f"{node} was removed {self.oracle.clock() - ended:.3f} s after its end")

    def _order(self) -> None:
        """Promise 5 and rule 6: first come, first served; conversions first."""
        waiting = self.oracle.lock(self.lock).wishes
        standing = [
            w
            for w in waiting.values()
            if not w.trying and w.node in self.wishes and w.revision == self.wishes[w.node].revision
        ]
        for node, new in self.new.members.items():
            old = self.old.members.get(node)
            if new.level is Mode.NL or new.revision != self.revision:
                continue
            if old is not None and old.incarnation == new.incarnation and old.level >= new.level:
                continue
            own = self.wishes.get(node)
            by_wish = own is not None and node not in waiting
            for other in standing:
                if other.node == node or not self.oracle.alive(
                    self.lock[0], other.node, other.incarnation
                ):
                    continue
                earlier = own is None or (
                    (not other.convert, other.revision) < (not own.convert, own.revision)
                )
                passed = earlier if by_wish else not compatible(other.mode, new.level)
                if passed:
                    self._fail(f"{node} got {new.level.name} before the wish of {other.node}")

    def _value(self) -> None:
        """Promise 4 and rule 13: only an EX member writes, and what it writes is a write(2) begun."""
        record = self.oracle.lock(self.lock)
        if self.new.lvb == self.old.lvb:
            return
        if self.new == NONE:
            record.values.append(Value(self.oracle.base(self.revision), EMPTY_LVB))
            self.oracle.forgotten(self.lock, self.old, self.author)
            return
        member = self.old.members.get(self.author or "")
        if member is None or member.level is not Mode.EX:
            self._fail("a value was put by one who does not have the lock exclusively")
        for write in record.writes:
            if write.node == self.author and not write.revision:
                if write.onto(self.old) == self.new.lvb:
                    write.revision = self.oracle.base(self.revision)
                    if self.old.lvb == EMPTY_LVB:
                        self.oracle.valued(self.lock)
                    record.values.append(Value(write.revision, self.new.lvb))
                    return
        self._fail(f"a value that nobody wrote: {self.new.lvb!r}")

    def _mark(self, *, deleted: bool) -> None:
        """Promise 4: a death at EX is marked until somebody writes; no other mark appears."""
        dead = [
            Abandoned(node, member.revision)
            for node, member in self.old.members.items()
            if member.level is Mode.EX
            and not self._alive(node, member)
            and self.new.members.get(node, NO_MEMBER).incarnation != member.incarnation
        ]
        mark = self.new.abandoned
        if mark is not None:
            self.oracle.lock(self.lock).marks.add((mark.node, mark.revision))
        dead += self._given_up_by_a_fault(mark)
        if self.new.lvb != self.old.lvb and not dead:
            if mark is not None:
                self._fail(f"a value was written, and the mark for {mark.node} stands")
        elif dead:
            if mark not in dead:
                self._fail(f"{dead[0].node} died at EX, and the mark says {mark}")
        elif mark != self.old.abandoned and not deleted and not self._seen(mark):
            self._fail(f"the mark went from {self.old.abandoned} to {mark}")

    def _seen(self, mark: Abandoned | None) -> bool:
        """Whether all that changed is that an exclusive holder has seen the mark."""
        old, member = self.old.abandoned, self.old.members.get(self.author or "", NO_MEMBER)
        if old is None or mark != old._replace(seen=True) or member.level is not Mode.EX:
            return False
        return self.author in self.oracle.lock(self.lock).seers

    def _given_up_by_a_fault(self, mark: Abandoned | None) -> list[Abandoned]:
        """A lock whose state was broken on a living node: it is taken out of the head as by a death, with
        the mark if it was EX. What it had handed over itself before has none."""
        broken = self.oracle.broken.get(self.lock, set())
        if self.author not in broken:
            return []
        old = self.old.members.get(self.author, NO_MEMBER)
        new = self.new.members.get(self.author, NO_MEMBER)
        if new.level is not Mode.NL:
            return []
        broken.discard(self.author)
        told = Abandoned(self.author, old.revision)
        return [told] if old.level is Mode.EX and mark == told else []

    def _deletion(self) -> None:
        """Rule 15: only the last living member removes a head, and not one that tells of a death which no
        exclusive holder has seen."""
        mark = self.old.abandoned
        if mark is not None and not mark.seen and not self._seen(mark._replace(seen=True)):
            self._fail("a head with a mark was removed")
        for node, member in self.old.members.items():
            if node == self.author:
                continue
            if self._alive(node, member):
                self._fail(f"removed with {node} in it")
            if member.level is Mode.EX:
                self._fail(f"removed though {node} died in it at EX")


NO_MEMBER: Final = Member(0, Mode.NL, 0)


def _named(mark: Abandoned | None) -> tuple[object, ...] | None:
    """The death that it tells of."""
    return mark and mark[:2]


class Arbiter(MemoryServer):
    """The cluster's memory, with an oracle that sees each commit. `author` is set while a node's
    transaction is applied; `expired` is called with each lease that runs out, and its node,
    `told` of each commit."""

    def __init__(self, loop: SimLoop, start_revision: int, bounds: Bounds, oracle: Oracle) -> None:
        super().__init__(loop, start_revision, bounds)
        self.oracle = oracle
        oracle.now = loop.time
        self.author: str | None = None
        self.expired: Callable[[int, str], None] = lambda _lease, _node: None
        self.told: Callable[[str | None, int, tuple[Event, ...]], None] = lambda *_: None

    def expire(self, lease: int) -> None:
        record = self.leases.get(lease)
        if record is not None and record.ttl_s is not None:
            if self.loop.time() - record.renewed >= record.ttl_s:
                self.expired(lease, record.node)
        super().expire(lease)

    def _commit(self, revision: int, events: list[Event]) -> None:
        super()._commit(revision, events)
        self.told(self.author, revision, tuple(events))
        self.oracle.commit(revision, tuple(events), self.author)
