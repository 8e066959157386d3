"""A node's life on the simulated clock: lease states, fencing, coming back, names, marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from dlmfs.core.events import Claim, Stage
from dlmfs.core.lease import LeaseState, lease_state
from dlmfs.engine.eviction import mark_key
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.engine.membership import Config, Membership
from dlmfs.engine.records import NODES
from dlmfs.errors import DlmfsError, LockLost, NodeNameInUse
from dlmfs.model import Mode
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Put, Txn
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_session import MemorySession
from dlmfs.store.memory_store import MemoryStore
from dlmfs.timing import GRACE_S, Timing

TTL_S = 15.0
TIMING = Timing(TTL_S)
pytestmark = pytest.mark.allow_warnings


class Node:
    """A membership with programs; a clock of its own that may run at another rate."""

    def __init__(
        self,
        server: MemoryServer,
        name: str,
        *,
        rate: float = 1.0,
        over: Callable[[Mapping[str, object]], bool] = lambda _facts: False,
        lock_delay_s: float = 0.0,
    ) -> None:
        assert isinstance(server.loop, SimLoop)
        self.loop = server.loop
        self.store = MemoryStore(server)
        config = Config((name,), {"who": name}, over, ttl_s=TTL_S, lock_delay_s=lock_delay_s)
        self.member = Membership(self.store, self.loop, lambda: self.loop.time() * rate, config)
        self.member.host = self
        self.granted_to: list[Claim] = []
        self.failed_with: list[int] = []
        self.fenced_at: float | None = None
        self.ended_at: float | None = None
        self.back: list[Lockspace] = []
        self.error: DlmfsError | None = None
        self.started = False

    # -- Host -------------------------------------------------------------------------------------

    def granted(self, claim: Claim) -> None:
        self.granted_to.append(claim)

    def failed(self, claim: Claim, reason: int) -> None:
        self.failed_with.append(reason)

    def notify(self, claim: Claim) -> None:
        return

    def identify(
        self, claim: Claim, holders: Sequence[Claim], done: Callable[[bool], None]
    ) -> None:
        done(False)

    def lock_lost(
        self, lock: ClusterLock, holders: Sequence[Claim], waiters: Sequence[Claim]
    ) -> None:
        """The claims say so themselves."""

    def broken(self, where: str, error: Exception) -> None:
        raise error

    def domain_lost(self, domain: bytes, reason: str) -> None:
        return

    def fenced(self, reason: str) -> None:
        self.fenced_at = self.loop.time()

    def rejoined(self, space: Lockspace) -> None:
        self.back.append(space)

    def holding(self) -> bool:
        return any(claim.stage is Stage.HELD for claim in self.granted_to)

    def ends(self, reason: str) -> None:
        self.ended_at = self.loop.time()

    # -- what a test does ---------------------------------------------------------------------------

    def start(self) -> Node:
        def done(error: DlmfsError | None) -> None:
            self.error, self.started = error, True

        self.member.start(done)
        run(self.loop, lambda: self.started)
        return self

    def join(self, domain: bytes = b"d") -> Lockspace:
        joined: list[Any] = []
        self.member.join(domain, joined.append)
        run(self.loop, lambda: bool(joined))
        assert isinstance(joined[0], Lockspace), joined
        return joined[0]

    def open(self, fh: int, mode: Mode = Mode.EX) -> Claim:
        claim = Claim(fh, mode, pid=fh)
        if self.member.spaces[b"d"].lock(b"x").open(claim):
            self.granted(claim)
        return claim


def run(loop: SimLoop, true: Callable[[], bool], limit_s: float = 120.0) -> None:
    assert loop.run_until(true, limit_s)


@pytest.fixture
def loop() -> SimLoop:
    return SimLoop()


@pytest.fixture
def server(loop: SimLoop) -> MemoryServer:
    return MemoryServer(loop, start_revision=100)


def test_the_states_follow_the_age_of_the_last_good_renewal() -> None:
    ages = {0.0: "HEALTHY", 5.99: "HEALTHY", 6.0: "SUSPECT", 10.04: "SUSPECT", 10.06: "FENCED"}
    for age, state in ages.items():
        assert lease_state(TIMING, 100.0, 100.0 + age) is LeaseState(state), age
    assert lease_state(TIMING, None, 1e9) is LeaseState.HEALTHY


def test_a_session_that_ends_while_it_takes_its_name_is_no_life(
    server: MemoryServer, loop: SimLoop
) -> None:
    """Nobody renews it any more: the node would be there for most of a lease time, and go."""
    node = Node(server, "n").start()
    session = node.member.session
    assert session is not None
    server.expire(session.lease)
    run(loop, lambda: node.fenced_at is not None)
    run(loop, lambda: node.member.session is not session)
    assert not node.member.up  # the name is not taken yet
    assert isinstance(node.member.session, MemorySession)
    node.member.session.lose(LockLost("the lease has ended in the store"))
    run(loop, lambda: node.member.up)
    back = node.member.session
    loop.run_for(3 * TTL_S)
    assert node.member.up
    assert node.member.session is back


def test_a_cut_off_node_is_unproved_then_fenced_before_the_lease_is_over(
    server: MemoryServer, loop: SimLoop
) -> None:
    node, other = Node(server, "n").start(), Node(server, "o").start()
    node.join()
    other.join()
    claim = node.open(1)
    run(loop, lambda: claim.stage is Stage.HELD)
    loop.run_for(1.0)
    cut = loop.time()
    node.store.cut()
    run(loop, lambda: node.member.state is LeaseState.UNPROVED)
    assert loop.time() - cut <= TIMING.suspect_after_s + TIMING.renew_every_s
    assert not node.failed_with
    heir = other.open(2)
    run(loop, lambda: node.member.state is LeaseState.FENCED)
    assert claim.stage is Stage.ENDED
    assert heir.stage is Stage.WAITING, "granted before the holder was fenced"
    run(loop, lambda: heir.stage is Stage.HELD)
    assert loop.time() - cut <= TTL_S + 2


@pytest.mark.parametrize("rate", [1 / 1.48, 1.0, 1.48])
def test_the_fence_holds_for_clocks_within_the_stated_ratio(
    server: MemoryServer, loop: SimLoop, rate: float
) -> None:
    node = Node(server, "n", rate=rate).start()
    node.join()
    node.store.cut()
    lease = node.store.session.lease if node.store.session is not None else 0
    run(loop, lambda: lease not in server.leases)
    assert node.fenced_at is not None, "the store gave the lease up first"


def test_every_operation_looks_at_the_clock(server: MemoryServer, loop: SimLoop) -> None:
    """A daemon that stood still notices by its first operation, not by a timer."""
    node = Node(server, "n").start()
    space = node.join()
    now = loop.time()
    node.member.clock = lambda: now + TIMING.fence_after_s + TIMING.renew_every_s
    assert not node.member.serving()
    assert space.life is Life.LOST


def test_a_fenced_node_comes_back_as_another_incarnation(
    server: MemoryServer, loop: SimLoop
) -> None:
    node = Node(server, "n").start()
    space = node.join()
    claim = node.open(1)
    run(loop, lambda: claim.stage is Stage.HELD)
    node.store.cut()
    run(loop, lambda: node.member.state is LeaseState.REJOINING)
    node.store.heal()
    run(loop, lambda: bool(node.back))
    again = node.member.spaces[b"d"]
    assert node.member.state is LeaseState.HEALTHY
    assert again.incarnation > space.incarnation
    assert claim.stage is Stage.ENDED
    newer = node.open(2)
    run(loop, lambda: newer.stage is Stage.HELD)
    assert newer.token > claim.token


def test_a_waiting_open_fails_when_the_node_is_fenced(server: MemoryServer, loop: SimLoop) -> None:
    holder, node = Node(server, "h").start(), Node(server, "n").start()
    holder.join()
    node.join()
    first = holder.open(1)
    run(loop, lambda: first.stage is Stage.HELD)
    waiter = node.open(2)
    loop.run_for(1.0)
    node.store.cut()
    run(loop, lambda: waiter.stage is Stage.ENDED)
    assert node.failed_with == [37]  # ENOLCK


def test_a_name_in_use_is_refused_and_one_of_a_dead_process_is_taken_over(
    server: MemoryServer, loop: SimLoop
) -> None:
    first = Node(server, "n").start()
    first.join()
    assert isinstance(Node(server, "n").start().error, NodeNameInUse)
    asked: list[Mapping[str, object]] = []

    def over(facts: Mapping[str, object]) -> bool:
        asked.append(facts)
        return True

    first.store.crash()
    heir = Node(server, "n", over=over).start()
    assert heir.error is None
    assert asked[0]["who"] == "n"
    heir.join()
    assert loop.time() < TTL_S, "it waited for the lease of its former self"


def test_a_dead_daemons_holders_have_their_time_when_another_takes_its_name(
    server: MemoryServer, loop: SimLoop
) -> None:
    """A service manager starts it anew within a moment, and its programs are at work still."""
    first, other = Node(server, "n").start(), Node(server, "other").start()
    for node in (first, other):
        node.join()
    held = first.open(1)
    run(loop, lambda: held.stage is Stage.HELD)
    waits = other.open(2)
    loop.run_for(1.0)
    died = loop.time()
    first.store.crash()
    heir = Node(server, "n", over=lambda _facts: True).start()
    assert heir.error is None
    run(loop, lambda: waits.stage is Stage.HELD)
    assert GRACE_S <= loop.time() - died < GRACE_S + 1.0


def test_an_evicted_node_goes_for_good(server: MemoryServer, loop: SimLoop) -> None:
    node = Node(server, "n").start()
    node.join()
    mark = json.dumps({"record": node.member.record, "by": "op"}).encode()
    other = MemoryStore(server)
    other.txn(Txn((), (Put(mark_key("n"), mark),)), lambda _result: None)
    run(loop, lambda: node.member.state is LeaseState.FENCED)
    loop.run_for(60.0)
    assert node.member.state is LeaseState.FENCED
    assert node.member.reason == "evicted by op"
    assert NODES + b"n" not in server.data


def test_a_mark_against_a_former_life_of_the_name_ends_nobody(
    server: MemoryServer, loop: SimLoop
) -> None:
    node = Node(server, "n").start()
    mark = json.dumps({"record": node.member.record - 1, "by": "op"}).encode()
    other = MemoryStore(server)
    other.txn(Txn((), (Put(mark_key("n"), mark),)), lambda _result: None)
    loop.run_for(10.0)
    assert node.member.state is LeaseState.HEALTHY
    assert node.ended_at is None


def test_a_mark_that_was_put_while_the_node_was_cut_off_keeps_it_out(
    server: MemoryServer, loop: SimLoop
) -> None:
    node = Node(server, "n").start()
    node.store.cut()
    mark = json.dumps({"record": node.member.record, "by": "op"}).encode()
    other = MemoryStore(server)
    other.txn(Txn((), (Put(mark_key("n"), mark),)), lambda _result: None)
    run(loop, lambda: node.member.state is LeaseState.REJOINING)
    node.store.heal()
    loop.run_for(60.0)
    assert node.member.final
    assert node.member.reason == "evicted by op"


def test_a_dead_nodes_locks_wait_for_the_lock_delay(server: MemoryServer, loop: SimLoop) -> None:
    victim, heir = Node(server, "v").start(), Node(server, "h", lock_delay_s=30.0).start()
    victim.join()
    heir.join()
    claim = victim.open(1)
    run(loop, lambda: claim.stage is Stage.HELD)
    victim.store.crash()
    dead = loop.time()
    waiter = heir.open(2)
    run(loop, lambda: waiter.stage is Stage.HELD)
    took = loop.time() - dead
    assert 30.0 <= took <= 30.0 + TTL_S + TIMING.renew_every_s + 1


def test_the_lock_delay_is_kept_whatever_else_happens(server: MemoryServer, loop: SimLoop) -> None:
    """Each event has the waiters look again, and none of them shortens it."""
    victim, heir = Node(server, "v").start(), Node(server, "h", lock_delay_s=30.0).start()
    bystander = Node(server, "b").start()
    for node in (victim, bystander):
        node.join()
    space = heir.join()
    claim = victim.open(1)
    run(loop, lambda: claim.stage is Stage.HELD)
    victim.store.crash()
    run(loop, lambda: "v" not in space.members)
    noticed = loop.time()
    waiter = heir.open(2)
    loop.run_for(20.0)
    bystander.member.leave(bystander.member.spaces[b"d"], lambda _error: None)
    run(loop, lambda: "b" not in space.members)
    assert waiter.stage is Stage.WAITING
    run(loop, lambda: waiter.stage is Stage.HELD)
    assert 29.9 < loop.time() - noticed < 31.0


def test_suspect_serves_what_is_here_and_asks_nothing_of_the_store(
    server: MemoryServer, loop: SimLoop
) -> None:
    node = Node(server, "n").start()
    space = node.join()
    cached = node.open(1)
    run(loop, lambda: cached.stage is Stage.HELD)
    node.member.clock = lambda: loop.time() + TIMING.suspect_after_s + 0.1
    assert node.member.serving()
    assert node.member.state is LeaseState.SUSPECT
    asked = space.commits
    again = node.open(2)
    assert again.stage is Stage.HELD
    other = Claim(3, Mode.EX, pid=3)
    assert not space.lock(b"y").open(other)
    loop.run_for(1.0)
    assert space.commits == asked
    assert node.member.state is LeaseState.SUSPECT
    node.member.clock = loop.time
    assert node.member.serving()
    run(loop, lambda: other.stage is Stage.HELD, 1.0)
