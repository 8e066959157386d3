"""A small cluster of one domain over the memory store, for tests that tell a race step by step (`hand`).

Real core, real engine; simulated clock, network, leases and programs. The checkers stand at the
instant of every grant, read and write:

* exclusion between the nodes that serve (promise 1),
* tokens larger than those of all earlier conflicting grants (promise 2),
* the LVB as a register whose unacknowledged writes may or may not show (promise 4),
* the abandonment mark after a death at EX (promise 4).

Whole clusters from seeds are `dlmfs.sim`'s.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from dlmfs.core.events import Claim, Phase, Stage
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.errors import DlmfsError, LockLost
from dlmfs.model import EMPTY_LVB, LVB_SIZE, HolderRule, Mode, compatible
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import BOUNDS, Bounds, Session
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_session import MemorySession
from dlmfs.store.memory_store import Faults, MemoryStore
from dlmfs.timing import Timing

TTL_S = 15.0


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class LockHistory:
    """What the checkers remember of one lock."""

    max_ex_token: int = 0
    max_token: int = 0
    value: bytes = EMPTY_LVB
    maybe: set[bytes] = field(default_factory=set)
    abandoned: bool = False


@dataclass
class Program:
    """One simulated open file."""

    claim: Claim
    lock: bytes
    node: SimNode
    asked_at: float


class SimNode:
    """A node: store handle, session, lockspace, and the programs on it."""

    def __init__(self, cluster: SimCluster, name: str, rule: HolderRule) -> None:
        self.cluster = cluster
        self.name = name
        self.rule = rule
        self.alive = True
        self.buried: set[int] = set()
        """Programs that died with a former self; its timers may still name them."""
        self.space: Lockspace | None = None
        self.programs: dict[int, Program] = {}
        self.session: MemorySession | None = None
        self.start()

    def start(self) -> None:
        cluster = self.cluster
        self.alive = True
        self.programs = {}
        self.store = MemoryStore(cluster.server, cluster.rng, cluster.faults)
        self.store.open_session(self.name, TTL_S, self.session_lost, self._open)

    def _open(self, session: Session | DlmfsError) -> None:
        if isinstance(session, DlmfsError):
            self.cluster.loop.call_later(0.5, self.start)
            return
        assert isinstance(session, MemorySession)
        self.session = session
        space = Lockspace(
            self.store,
            self.cluster.loop,
            self,
            domain=b"dom",
            node=self.name,
            lease=session.lease,
            rule=self.rule,
            timing=Timing(TTL_S),
        )

        def joined(error: DlmfsError | None) -> None:
            if error is not None and self.alive:
                self.cluster.loop.call_later(1.0, space.join, joined)
            elif error is None:
                self.space = space

        space.join(joined)
        self._guard()

    def _guard(self) -> None:
        """The fence: stop serving before the lease can have run out."""
        if not self.alive or self.session is None:
            return
        assert self.session.renewed_at is not None
        fence_at = self.session.renewed_at + Timing(TTL_S).fence_after_s
        now = self.cluster.loop.time()
        if now >= fence_at:
            self.session_lost(LockLost("no renewal"))
            return
        self.cluster.loop.call_later(fence_at - now, self._guard)

    def session_lost(self, error: DlmfsError) -> None:
        if self.alive:
            if self.space is not None:
                self.space.lose(str(error))
            self.restart()

    def restart(self) -> None:
        self.crash()
        self.cluster.loop.call_later(0.1, self.start_again)

    def start_again(self) -> None:
        if not self.alive:
            self.start()

    def crash(self) -> None:
        self.alive = False
        space, self.space = self.space, None
        if space is not None and space.life is not Life.LOST:
            for name, lock in space.locks.items():
                mine = lock.view.head.members.get(self.name)
                surely = lock.res.phase is Phase.IDLE and lock.res.level is Mode.EX
                if mine is not None and surely and mine.level is Mode.EX:
                    self.cluster.locks[name].abandoned = True
        self.buried |= set(self.programs)
        self.programs = {}
        self.store.crash()

    @property
    def serving(self) -> Lockspace | None:
        return self.space if self.alive and self.space is not None and self.space.live else None

    # -- Host -----------------------------------------------------------------------------------

    def granted(self, claim: Claim) -> None:
        if claim.fh in self.buried:
            return
        program = self.programs[claim.fh]
        self.cluster.check_grant(program)
        if claim.mode is Mode.EX and self.space is not None:
            lock = self.space.locks[program.lock]
            lock.view.had_ex = lock.res.revision  # as the file system does

    def failed(self, claim: Claim, reason: int) -> None:
        if claim.fh in self.buried:
            return
        program = self.programs.pop(claim.fh)
        if (
            self.serving is not None
            and not claim.trying
            and reason not in (errno.EDEADLK, errno.EAGAIN)
        ):
            raise Violation(f"{program} failed with {errno.errorcode[reason]}")

    def notify(self, claim: Claim) -> None:
        self.cluster.notices += 1

    def identify(
        self, claim: Claim, holders: Sequence[Claim], done: Callable[[bool], None]
    ) -> None:
        done(any(h.pid == claim.pid for h in holders))

    def lock_lost(
        self, lock: ClusterLock, holders: Sequence[Claim], waiters: Sequence[Claim]
    ) -> None:
        for claim in holders:
            self.programs.pop(claim.fh)
        for claim in waiters:
            self.failed(claim, LockLost.errno)

    def broken(self, where: str, error: Exception) -> None:
        if not isinstance(error, DlmfsError):
            raise error

    def domain_lost(self, domain: bytes, reason: str) -> None:
        if self.alive:
            self.cluster.loop.call_soon(self.restart)


class SimCluster:
    """Nodes, programs and checkers of one run."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 3,
        locks: int = 2,
        faults: Faults | None = None,
        rules: tuple[HolderRule, ...] = (HolderRule.NODE, HolderRule.FILE),
        bounds: Bounds = BOUNDS,
    ) -> None:
        self.rng = Random(seed)
        self.loop = SimLoop(self.rng)
        self.faults = faults or Faults()
        self.server = MemoryServer(self.loop, 1000, bounds)
        self.locks = {b"lock%d" % i: LockHistory() for i in range(locks)}
        self.notices = 0
        self.grants = 0
        self.fh = 0
        self.writes = 0
        self.nodes = [SimNode(self, f"n{i}", self.rng.choice(rules)) for i in range(nodes)]
        self.loop.run_until(lambda: all(n.space is not None for n in self.nodes), 120)

    # -- checkers -------------------------------------------------------------------------------

    def check_grant(self, program: Program) -> None:
        claim, history = program.claim, self.locks[program.lock]
        self.grants += 1
        for node in self.nodes:
            space = node.serving
            if node is program.node or space is None:
                continue
            lock = space.locks.get(program.lock)
            if lock is not None and not compatible(lock.res.level, claim.mode):
                raise Violation(
                    f"{program.node.name} serves {claim} while {node.name} is at {lock.res.level!r}"
                )
        floor = history.max_token if claim.mode is Mode.EX else history.max_ex_token
        same_holder = program.node.rule is HolderRule.NODE
        if claim.token < floor or (claim.token == floor and not same_holder):
            raise Violation(f"token of {claim} went back: {claim.token} after {floor}")
        history.max_token = max(history.max_token, claim.token)
        if claim.mode is Mode.EX:
            history.max_ex_token = max(history.max_ex_token, claim.token)
        space = program.node.serving
        assert space is not None
        head = space.locks[program.lock].view.head
        if history.abandoned and head.abandoned is None:
            raise Violation(f"{program.lock!r}: the holder before {claim} died and nobody says so")

    def read(self, program: Program) -> None:
        space = program.node.serving
        assert space is not None

        def value(lvb: bytes) -> None:
            if program.claim.stage is not Stage.HELD or program.node.serving is not space:
                return
            history = self.locks[program.lock]
            if lvb != history.value and lvb not in history.maybe:
                raise Violation(f"{program.lock!r}: read {lvb[:8]!r}, want {history.value[:8]!r}")
            if lvb != history.value:
                history.value = lvb
                # Writes that came after it may still be under way.
                history.maybe = {late for late in history.maybe if late > lvb}

        space.locks[program.lock].read_lvb(value)

    def write(self, program: Program) -> None:
        space = program.node.serving
        assert space is not None
        self.writes += 1
        new = b"%08d" % self.writes * (LVB_SIZE // 8)
        history = self.locks[program.lock]
        history.maybe.add(new)

        def done(error: DlmfsError | None) -> None:
            if error is None and program.node.alive:
                if new not in history.maybe and history.value != new:
                    return  # a later write of this node has overtaken it in the record
                history.value = new
                history.maybe.discard(new)
                history.abandoned = False

        space.locks[program.lock].write_lvb(0, new, done)

    def close(self, program: Program) -> None:
        space = program.node.serving
        node = program.node
        if node.programs.pop(program.claim.fh, None) is not None and space is not None:
            space.locks[program.lock].close(program.claim)
