"""What every program must see: the promises of design section 2, checked at each answer.

`oracle` watches the commits; here stand the checks that need to know what was served to whom, and when.
In a lenient run (clocks beyond the stated ratio), and for an answer that a pause of the daemon has
overtaken, only what no clock can break is checked: tokens and values.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.engine.lockspace import Life
from dlmfs.engine.records import Head
from dlmfs.model import EMPTY_LVB, LVB_SIZE, TOKEN_SHIFT, DeadValue, HolderRule, Mode, compatible
from dlmfs.sim.graces import Graces
from dlmfs.sim.history import Op, judge
from dlmfs.sim.kernel import Call, Reply
from dlmfs.sim.oracle import Lock, Oracle, Violation, Write

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.fs.handle import Handle
    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode
    from dlmfs.sim.programs import OpenFile, Process

SLACK_S: Final = 0.2
NEWS_S: Final = 0.01
SILENT_S: Final = 1.0
"""A signal ends what waits for the store alone after so long, and not before (promise 7)."""
ENDS_S: Final = SILENT_S + 0.5
"""A signal has ended any wait after so long."""
PLACE_S: Final = 1.0
"""In so long a file that is only made has its place."""
DATA: Final = 8
"""Bytes of a write; each is unlike every other."""

EXPECTED: Final = frozenset(
    {
        errno.ETXTBSY,
        errno.EINTR,
        errno.EDEADLK,
        errno.EAGAIN,
        errno.ENOLCK,
        errno.ENOENT,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ESTALE,
        errno.EIO,
    }
)
"""What an open may be refused with."""


@dataclass
class Open:
    """One open(2) as its program sees it, until its descriptor is closed or lost."""

    number: int
    process: int
    node: SimNode
    life: int
    lock: Lock
    mode: Mode
    trying: bool
    invoked: float
    returned: float | None = None
    outcome: str = "unknown"
    token: int = 0
    taken_at: float = 0.0
    stalls: int = 0
    newest: int = 0
    """The last handle that the node had given out when the open came."""
    calm: bool = False
    converting: bool = False
    ahead: list[tuple[str, int]] = field(default_factory=list)
    """The other nodes' conflicting wishes that the node knew of when the open came."""
    closed: float | None = None
    released: float | None = None
    lease: int = 0
    grant: int = 0
    """The revision of the node's grant; 0: not known."""
    told: float | None = None
    """When its program could know that the lock is over."""
    crashed: float | None = None
    """When its daemon died."""
    let_go: float | None = None
    """When its program closed it."""


class Grace(NamedTuple):
    """A lock was lost on one node by a fault: who held it has so long to close. A fence ends that."""

    node: SimNode
    life: int
    fences: int
    until: float
    held: list[Open]


@dataclass
class Seen:
    """What was seen of one lock."""

    max_token: int = 0
    max_ex_token: int = 0
    floor: int = 0
    """No read that begins now may return a value older than this revision's."""
    opens: list[Open] = field(default_factory=list)
    graces: list[Grace] = field(default_factory=list)
    bases: dict[int, str] = field(default_factory=dict)


class Checks:
    """The checks of one run. `grants`, `reads`, `writes`, `refusals`, `lost` count what was judged."""

    def __init__(self, cluster: Cluster, oracle: Oracle) -> None:
        self.cluster = cluster
        self.oracle = oracle
        self.locks: dict[Lock, Seen] = {}
        self.grants = self.reads = self.writes = self.refusals = self.losses = self.judged = 0
        self.margin: float | None = None
        """The least share of a lease time between a node's last answer and its lease's end."""
        self.graces = Graces(cluster, oracle)
        self._files: dict[tuple[str, int, int], Open] = {}
        self._numbers = 0
        self._valued: dict[Lock, float] = {}
        oracle.valued, oracle.forgotten, oracle.left = self.valued, self.forgotten, self.left

    def seen(self, lock: Lock) -> Seen:
        record = self.locks.get(lock)
        if record is None:
            record = self.locks[lock] = Seen()
        return record

    @property
    def now(self) -> float:
        return self.cluster.loop.time()

    @property
    def strict(self) -> bool:
        return not (self.cluster.scenario.lenient or self.cluster.restores.blind)

    # -- open -----------------------------------------------------------------------------------

    def opening(
        self,
        process: Process,
        domain: bytes,
        name: bytes,
        mode: Mode,
        *,
        trying: bool,
    ) -> Open:
        """A program begins an open(2)."""
        self._numbers += 1
        node = process.node
        lock = (domain, name)
        opened = Open(self._numbers, process.pid, node, node.life, lock, mode, trying, self.now)
        self.seen(lock).opens.append(opened)
        return opened

    def refused(self, opened: Open, reason: int, *, signalled: bool) -> None:
        """It failed. Interrupted, it may have been granted in the same instant."""
        if reason == errno.EINTR and not signalled:
            raise Violation(f"{self._name(opened)} failed with EINTR, and no signal was caught")
        self.refusals += 1
        opened.returned = self.now
        dead = reason in (errno.EINTR, errno.ENOTCONN, errno.ECONNABORTED)
        # In trouble a lock may seem to be in use that is only cached by a node which does not answer.
        calm = opened.calm and self.cluster.calm and not self._delayed(opened)
        busy = reason == errno.ETXTBSY and calm
        opened.outcome = "unknown" if dead else "busy" if busy else "failed"
        if reason not in EXPECTED:
            raise Violation(f"{self._name(opened)} failed with {errno.errorcode[reason]}")

    def _delayed(self, opened: Open) -> bool:
        """Whether a dead member is in the way: with lock-delay it may be for long after its death, which
        a node that joins later counts from then on. So is the node's own former self in any mode: its
        place is not free before."""
        if not self.cluster.scenario.lock_delay_s:
            return False
        return any(
            not self.oracle.alive(opened.lock[0], node, member.incarnation)
            and (node == opened.node.name or not compatible(member.level, opened.mode))
            for node, member in self.oracle.lock(opened.lock).head.members.items()
        )

    def ends(self, process: Process, call: Call) -> None:
        """Promise 7: a signal that it catches, or its death, ends a wait soon, whatever interrupted it
        before."""
        if not self.strict or call.request.op not in ("open", "read", "write"):
            return
        machine = process.node.machine
        stalls = machine.stalls

        def look() -> None:
            if machine.stalls != stalls:
                self.ends(process, call)
            elif process.call is call and not process.dead and not process.stopped:
                raise Violation(
                    f"pid {process.pid} on {process.node.name}: a signal does not end its "
                    f"{call.request.op}"
                )

        machine.call_later(ENDS_S + SLACK_S, look)

    def taken(self, node: SimNode, call: Call) -> None:
        """The daemon takes a request up."""
        request = call.request
        if request.op == "release":
            opened = self._files.pop((node.name, node.life, request.args[0]), None)
            if opened is not None:
                opened.released = self.now
        elif isinstance(request.note, Open):
            opened = request.note
            opened.taken_at, opened.stalls = node.machine.time(), node.machine.stalls
            opened.newest, opened.calm = node.fs.last_fh, self.cluster.calm
            lock = node.lock(opened.lock)
            if lock is not None:
                # Who races with an unlink is refused (kernel-behaviour, "unlink"), and who comes after
                # waiters of its own node does not pass them.
                opened.calm &= not lock.forgetting and not lock.res.waiters
                opened.converting = lock.res.pr > 0 and opened.mode is Mode.EX
                opened.ahead = [
                    (w.node, w.revision)
                    for w in lock.view.others()
                    if not w.trying and not compatible(w.mode, opened.mode)
                ]

    def answered(self, node: SimNode, call: Call, reply: Reply) -> None:
        """The answer is about to reach its program."""
        request = call.request
        note = request.note
        if isinstance(note, Open):
            if note.trying and self.strict and reply != errno.ECONNABORTED:
                self._in_time(node, note)
            if isinstance(reply, bytes):
                self._granted(node, note, call, int.from_bytes(reply[:8], "little"))
        elif request.op in ("read", "write") and isinstance(reply, bytes):
            file: OpenFile = note  # type: ignore[assignment]
            self._served(node, file.grant, call)

    def _in_time(self, node: SimNode, opened: Open) -> None:
        """Promise 6: a trylock is answered in bounded time."""
        timing, took = node.membership.timing, node.machine.time() - opened.taken_at
        if took > timing.try_timeout_s + SLACK_S and node.machine.stalls == opened.stalls:
            raise Violation(f"{self._name(opened)}: the trylock was answered after {took:.1f} s")

    def _granted(self, node: SimNode, opened: Open, call: Call, fh: int) -> None:
        self.grants += 1
        opened.returned = self.now
        handle = node.fs.handles.get(fh)
        lock = node.lock(opened.lock)
        opened.outcome = "unknown" if call.overtaken else "ok"
        self._files[node.name, node.life, fh] = opened
        if handle is None or lock is None or handle.token == 0:
            opened.outcome, opened.closed = "unknown", self.now
            return
        opened.token = handle.token
        if node.membership.session is not None:
            opened.lease = node.membership.session.lease
            member = self.oracle.lock(opened.lock).head.members.get(node.name)
            opened.grant = 0 if member is None else member.revision
            if not call.overtaken:
                node.last_served[opened.lease] = self.now
        # Who takes over the place that an interrupted open left may have been granted long ago.
        late = call.overtaken or handle.fh <= opened.newest
        self._token(node, opened, strict=self.strict and not late)
        if self.strict and not call.overtaken:
            self._exclusion(node, opened)
            self._gracious(opened)
            self._marked(opened, lock)
            self.graces.granted(node, opened, self.seen(opened.lock).opens)
            self._in_order(opened, handle)

    def _served(self, node: SimNode, opened: Open, call: Call) -> None:
        """A read or a write was answered with success."""
        if self.strict and not call.overtaken:
            self._exclusion(node, opened)
        session = node.membership.session
        if session is not None and not call.overtaken:
            node.last_served[session.lease] = self.now

    def _name(self, opened: Open) -> str:
        lock = b"/".join(opened.lock).decode()
        how = "try" if opened.trying else "open"
        return f"{how} {opened.number} {lock} {opened.mode.name} on {opened.node.name}"

    def _exclusion(self, node: SimNode, opened: Open) -> None:
        """Promise 1: nobody else serves, or would serve at once, an incompatible mode."""
        for other in self.cluster.nodes:
            if other is node:
                continue
            level = other.serves(opened.lock)
            if not compatible(level, opened.mode):
                raise Violation(
                    f"{self._name(opened)} is served while {other.name} has {level.name}"
                )

    def _token(self, node: SimNode, opened: Open, *, strict: bool) -> None:
        """Promise 2: larger than that of every earlier conflicting grant."""
        seen, token = self.seen(opened.lock), opened.token
        self._offset(node, opened)
        base = token >> TOKEN_SHIFT
        granted = self.oracle.lock(opened.lock).granted.get(base, set())
        if node.name not in granted:
            raise Violation(f"{self._name(opened)}: no commit granted it its token {token}")
        if not strict:
            return
        floor = seen.max_token if opened.mode is Mode.EX else seen.max_ex_token
        if token < floor or (token == floor and node.rule is HolderRule.FILE):
            raise Violation(f"{self._name(opened)}: its token {token} is not above {floor}")
        if token == floor and seen.bases.get(base, node.name) != node.name:
            raise Violation(f"{self._name(opened)}: its token {token} is another node's")
        seen.bases[base] = node.name
        seen.max_token = max(seen.max_token, token)
        if opened.mode is Mode.EX:
            seen.max_ex_token = max(seen.max_ex_token, token)

    def _offset(self, node: SimNode, opened: Open) -> None:
        """A lease time after the offset was raised all serve under it."""
        since = self.now - self.oracle.raised_at
        if since > self.cluster.scenario.ttl_s and self.strict:
            offset = node.membership.tokens.offset
            if offset != self.oracle.tokens.offset:
                raise Violation(f"{self._name(opened)} is granted under the offset {offset}")

    def _marked(self, opened: Open, lock: ClusterLock) -> None:
        """Promise 4: who gets the lock after a death at EX can see it."""
        mark = self.oracle.lock(opened.lock).head.abandoned
        if mark is not None and lock.view.head.abandoned is None:
            raise Violation(f"{self._name(opened)}: {mark.node} died at EX, and nobody says so")

    def _in_order(self, opened: Open, handle: Handle) -> None:
        """Promise 5: whoever comes after another node's wish, and conflicts with it, is served after."""
        if handle.kin or opened.converting or handle.fh <= opened.newest:
            return  # the last: it took over the place that an interrupted open left behind
        if self.oracle.lock(opened.lock).disordered:
            return
        wishes = self.oracle.lock(opened.lock).wishes
        for node, revision in opened.ahead:
            wish = wishes.get(node)
            if wish is not None and wish.revision == revision:
                raise Violation(f"{self._name(opened)} was served before the wish of {node}")

    # -- the value ------------------------------------------------------------------------------

    def writing(self, file: OpenFile, offset: int) -> Write:
        self.writes += 1
        lock = file.grant.lock
        data = (b"%08d" % self.writes)[:DATA]
        node = file.grant.node
        write = Write(lock, node.name, offset, data, node.dead_value is DeadValue.INVALID)
        self.oracle.lock(lock).writes.append(write)
        return write

    def wrote(self, process: Process, write: Write, reply: Reply) -> None:
        """Promise 4: a write that returned is durable. Promise 7: a signal makes none fail but where the
        store is silent."""
        waited = process.node.machine.time() - process.interrupted_at
        if reply == errno.EINTR and not process.dying and waited < SILENT_S - NEWS_S:
            raise Violation(f"a write to {write.lock!r} failed with EINTR after {waited:.3f} s")
        if isinstance(reply, int):
            return
        if not write.revision:
            raise Violation(f"a write to {write.lock!r} returned, and is not in the store")
        if any(value.revision == write.revision for value in self.oracle.lock(write.lock).values):
            seen = self.seen(write.lock)
            seen.floor = max(seen.floor, write.revision)
        # Else it was committed, and the store put back before its answer came.

    def reading(self, file: OpenFile) -> int:
        """What the read must not be older than: all that was acknowledged or read before, and what
        stood when the reader was granted; in a lenient run the latter only."""
        seen = self.seen(file.grant.lock)
        granted = file.grant.token >> TOKEN_SHIFT
        return max(seen.floor, granted) if self.strict else granted

    def read(self, file: OpenFile, lvb: bytes, floor: int) -> None:
        """Promise 4: a whole value, and none that is older than `floor`."""
        self.reads += 1
        lock = file.grant.lock
        if not lvb and file.grant.node.dead_value is DeadValue.INVALID:
            self._invalid(file)
            return
        assert len(lvb) == LVB_SIZE
        values = self.oracle.lock(lock).values
        at_floor = max(v.revision for v in values if v.revision <= floor)
        found = [v.revision for v in values if v.revision >= at_floor and v.lvb == lvb]
        if not found and self._of_before(file) and lvb in self.oracle.lock(lock).lost:
            return
        if not found:
            known = any(v.lvb == lvb for v in values)
            what = (
                "a value that is older than one seen before" if known else "a value never written"
            )
            raise Violation(
                f"read {b'/'.join(lock).decode()} on {file.grant.node.name}: {what}: {lvb!r}"
            )
        if self.strict:
            seen = self.seen(lock)
            seen.floor = max(seen.floor, found[0])

    def _invalid(self, file: OpenFile) -> None:
        """Nothing is read only if a holder died, and nobody has written since."""
        lock, node = file.grant.lock, file.grant.node
        if self.strict and self.oracle.lock(lock).head.abandoned is None:
            raise Violation(f"{lock} on {node.name}: nothing is read, and no holder died")

    def valued(self, lock: Lock) -> None:
        """A first value is written."""
        self._valued[lock] = self.now

    def made(self, node: SimNode, lock: Lock) -> None:
        """A lock's file is made, or its domain joined again."""
        node.files[lock] = self.now

    def forgotten(self, lock: Lock, head: Head, author: str | None) -> None:
        """Promise 4: a value lives as long as some node has the lock's file, and has for a second."""
        faults = self.cluster.scenario.faults
        slack = 10 * faults.delay_s + 2 * faults.watch_delay_s + SLACK_S
        for node in self.cluster.nodes:
            space = node.space(lock[0])
            if not self.cluster.calm or node.name in (author, *head.members) or not node.up:
                continue
            if space is None or space.life is not Life.JOINED or not node.has_file(lock):
                continue
            since = max(node.files[lock], self._valued.get(lock, 0.0))
            if self.now > since + PLACE_S / node.machine.rate + slack:
                raise Violation(
                    f"{author} forgets the value of {lock}, and {node.name} has the file"
                )

    def left(self, lock: Lock, old: Head, new: Head, author: str) -> None:
        """What a node leaves unasked, since nobody uses it, nobody uses; and there is nothing to lose."""
        node = next(node for node in self.cluster.nodes if node.name == author)
        space, found = node.space(lock[0]), node.lock(lock)
        if found is None or space is None or space.life is not Life.JOINED or node.machine.dead:
            return
        if found.forgetting or found.wreck_left is not None or node.leaving:
            return
        name = f"{author} leaves {b'/'.join(lock).decode()} unasked"
        if old.lvb != EMPTY_LVB:
            raise Violation(f"{name}, and its value is forgotten")
        if old.abandoned is not None or new.abandoned is not None:
            raise Violation(f"{name}, and a death is marked")
        files = [
            h.file for h in node.fs.handles.values() if not h.file.lost
        ]  # those of a wreck are over
        if any((file.domain.name, file.name) == lock for file in files):
            raise Violation(f"{name}, and a program has it open")

    def _of_before(self, file: OpenFile) -> bool:
        """Whether it was opened before the store went back."""
        return (file.grant.returned or 0.0) <= self.cluster.restores.last

    # -- ends -----------------------------------------------------------------------------------

    def closing(self, file: OpenFile) -> None:
        """close(2) of the last descriptor begins."""
        file.grant.let_go = self.now
        if file.grant.closed is None:
            over = (
                file.grant.node.deadline()
            )  # a node that stands still does not tell that it is lost
            file.grant.closed = max(min(self.now, over), file.grant.returned or 0.0)

    def _of(self, node: SimNode, domain: bytes | None = None) -> list[Open]:
        """What the node's present life has or had open, in one domain or in all."""
        return [
            opened
            for lock, seen in self.locks.items()
            for opened in seen.opens
            if (domain is None or lock[0] == domain)
            and opened.node is node
            and opened.life == node.life
        ]

    def node_ends(self, node: SimNode) -> None:
        """The node's programs are told that it ends. What they have is theirs until they close it."""
        self.graces.told(self._of(node), self.now)

    def crashed(self, node: SimNode) -> None:
        """The daemon has died."""
        self.lost(node, None)
        self.graces.crashed(self._of(node), self.now)

    def lost(self, node: SimNode, domain: bytes | None) -> None:
        """What the node had open (in one domain, or in all) is lost, since its deadline at the latest."""
        self.losses += 1
        at = min(self.now, node.deadline())
        opens = self._of(node, domain)
        self.graces.told(opens, at)
        for opened in opens:
            if opened.closed is None and opened.outcome == "ok":
                opened.closed = max(at, opened.returned or at)

    def lock_lost(self, node: SimNode, lock: Lock) -> None:
        """An exception in one lock's state: what the node had open of it is lost, and its holders have
        their time before anybody else has the lock."""
        self.losses += 1
        seen = self.seen(lock)
        lost = [
            o for o in seen.opens if o.node is node and o.life == node.life and o.outcome == "ok"
        ]
        known = {id(opened) for grace in seen.graces for opened in grace.held}
        held = [o for o in lost if o.released is None and id(o) not in known]  # once lost is lost
        at = min(self.now, node.deadline())
        for opened in lost:
            if opened.closed is None:
                opened.closed = max(at, opened.returned or at)
        space = node.space(lock[0])
        if held and space is not None:
            until = self.now + 0.99 * space.grace_s / node.machine.rate
            seen.graces.append(Grace(node, node.life, node.membership.fences, until, held))
        self.oracle.wrecked(lock, node.name)

    def _gracious(self, opened: Open) -> None:
        """Promise 5: nobody has the lock before those who lost it have closed, or had their time."""
        for grace in self.seen(opened.lock).graces:
            node = grace.node
            over = node.life != grace.life or node.membership.fences != grace.fences
            if over or self.now >= grace.until:
                continue
            for lost in grace.held:
                if lost.released is None and not compatible(lost.mode, opened.mode):
                    raise Violation(
                        f"{self._name(opened)} was granted before {self._name(lost)}, which "
                        "was lost, had its time"
                    )

    def lease_ended(self, node: SimNode, lease: int) -> None:
        """Promise 3: the store lets a lease run out; the node must have stopped serving long before."""
        self.graces.expired.add(lease)
        served = node.last_served.get(lease)
        scenario = self.cluster.scenario
        if served is None or not self.strict or not scenario.leased:
            return
        margin = (self.now - served) / scenario.ttl_s
        rate = node.machine.rate
        if margin < 1 - 0.67 / rate - 0.001:
            raise Violation(f"{node.name} served {margin:.2f} ttl before the end of its lease")
        if self.margin is None or margin < self.margin:
            self.margin = margin

    def put_back(self) -> None:
        """The store is what it was once: so are the values."""
        for lock, seen in self.locks.items():
            seen.floor = min(seen.floor, self.oracle.lock(lock).values[-1].revision)

    # -- the whole history ------------------------------------------------------------------------

    def judge(self) -> None:
        """Judge the lock as an object, from what programs saw alone."""
        if not self.strict:
            return
        for lock, seen in self.locks.items():
            ops = [op for opened in seen.opens for op in self._ops(opened)]
            self.judged += len(ops)
            verdict = judge(ops)
            if not verdict.ok:
                raise Violation(f"{b'/'.join(lock).decode()}: {verdict.why}")

    def _ops(self, opened: Open) -> list[Op]:
        owner: tuple[object, ...] = (opened.node.name, opened.life)
        if opened.node.rule is HolderRule.FILE:
            owner = (*owner, opened.number)
        kind = "try" if opened.trying else "acquire"
        invoked = opened.invoked
        if opened.outcome == "busy":
            # That the lock came free may be under way to this node still.
            faults = self.cluster.scenario.faults
            invoked -= faults.watch_delay_s + 4 * faults.delay_s + NEWS_S
        returned = None if opened.outcome == "unknown" else opened.returned
        ops = [
            Op(
                opened.process,
                owner,
                kind,  # type: ignore[arg-type]
                opened.mode,
                invoked,
                returned,
                opened.outcome,  # type: ignore[arg-type]
                opened.number,
            )
        ]
        if opened.outcome == "ok" and opened.closed is not None:
            done = opened.released
            ops.append(
                Op(
                    opened.process,
                    owner,
                    "release",
                    opened.mode,
                    opened.closed,
                    done,
                    "ok" if done is not None else "unknown",
                    opened.number,
                )
            )
        return ops
