"""Races in the life of one node: its joins, leaves and clean end, with a fence or a full store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dlmfs.core.events import Claim
from dlmfs.engine.eviction import Mark, mark_key
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.engine.membership import REMOVED, Config, Membership
from dlmfs.engine.records import NODES
from dlmfs.errors import DlmfsError, Unavailable
from dlmfs.model import Mode
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Delete, Event, Put, Txn
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_store import Faults, MemoryStore
from tests.engine.hand import holds, waits

DOMAIN, LOCK = b"dom", b"lock"
TTL_S = 15.0
SOON_S = 0.1
PATIENCE_S = 60.0


class Node:
    """A node and its programs, who hold whatever they are granted."""

    def __init__(self, loop: SimLoop, server: MemoryServer, name: str) -> None:
        self.loop = loop
        self.store = MemoryStore(server)
        config = Config((name,), {}, lambda _facts: False, ttl_s=TTL_S)
        self.membership = Membership(self.store, loop, loop.time, config)
        self.membership.host = self
        self.fences: list[str] = []
        self.claims: list[Claim] = []
        started: list[DlmfsError | None] = []
        self.membership.start(started.append)
        assert loop.run_until(lambda: bool(started), PATIENCE_S)
        assert started == [None]

    def join(self) -> Lockspace:
        said: list[Lockspace | DlmfsError] = []
        self.membership.join(DOMAIN, said.append)
        assert self.loop.run_until(lambda: bool(said), PATIENCE_S)
        (space,) = said
        assert isinstance(space, Lockspace)
        return space

    def open(self) -> Claim:
        """Open the lock exclusively; it may be granted at once or later."""
        claim = Claim(1, Mode.EX, pid=1)
        self.claims.append(claim)
        self.membership.spaces[DOMAIN].lock(LOCK).open(claim)
        return claim

    def cache(self) -> None:
        """Have the lock here at EX, used by nobody."""
        claim = self.open()
        assert self.loop.run_until(lambda: holds(claim), PATIENCE_S)
        self.membership.spaces[DOMAIN].lock(LOCK).close(claim)

    # -- Host -----------------------------------------------------------------------------------

    def granted(self, claim: Claim) -> None:
        """The claim says so itself."""

    def failed(self, claim: Claim, reason: int) -> None:
        """The claim says so itself."""

    def notify(self, claim: Claim) -> None:
        """Nobody sleeps in poll."""

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
        """The claims say so themselves."""

    def fenced(self, reason: str) -> None:
        self.fences.append(reason)

    def rejoined(self, space: Lockspace) -> None:
        """It is in `membership.spaces`."""

    def holding(self) -> bool:
        return any(holds(claim) for claim in self.claims)

    def ends(self, reason: str) -> None:
        """The claims are asked."""


@pytest.fixture
def pair() -> tuple[Node, Node]:
    loop = SimLoop()
    server = MemoryServer(loop, start_revision=1000)
    return Node(loop, server, "a"), Node(loop, server, "b")


@pytest.mark.allow_warnings
def test_the_locks_of_a_node_that_a_bug_fenced_come_free(pair: tuple[Node, Node]) -> None:
    """A broken invariant of its own fences a node for good, though its session is healthy. It must end
    that session, not only stop serving: else its locks were kept from all others for as long as
    the useless daemon ran (promise 5).
    """
    a, b = pair
    for node in pair:
        node.join()
    held = a.open()
    assert a.loop.run_until(lambda: holds(held), PATIENCE_S)
    wanted = b.open()
    a.loop.run_for(SOON_S)
    assert waits(wanted)
    a.membership.lose("internal error: a bug")
    assert a.fences == ["internal error: a bug"]
    assert a.loop.run_until(lambda: not waits(wanted), TTL_S / 2)
    assert holds(wanted)


@pytest.mark.allow_warnings
def test_a_join_that_is_answered_after_a_fence_joins_nothing(pair: tuple[Node, Node]) -> None:
    """The node is fenced while a join is under way, and the answer is "joined". A domain that came to
    the list only then was passed by the fence, and served on (promise 3).
    """
    a, _ = pair
    said: list[Lockspace | DlmfsError] = []
    a.store.faults = Faults(delay_s=0.4)
    a.membership.join(DOMAIN, said.append)
    assert a.loop.run_until(lambda: any(b"/m/" in key for key in a.store.server.data), PATIENCE_S)
    assert not said
    a.membership.lose("a test")
    assert a.loop.run_until(lambda: bool(said), PATIENCE_S)
    assert isinstance(said[0], Unavailable)
    assert not a.membership.spaces


def test_a_late_leave_does_not_strike_the_newer_membership(pair: tuple[Node, Node]) -> None:
    """A domain is joined again while the leave of its former membership is still on its way to the
    store. The end of that leave concerns its own membership only: what is not on the list is
    neither fenced nor left at the end (promise 3).
    """
    a, _ = pair
    old = a.join()
    left: list[DlmfsError | None] = []
    a.store.faults = Faults(delay_s=10.0)
    a.membership.leave(old, left.append)
    a.store.faults = Faults()
    new = a.join()
    assert not left
    assert a.loop.run_until(lambda: bool(left), PATIENCE_S)
    assert a.membership.spaces == {DOMAIN: new}
    assert new.life is Life.JOINED


def test_a_clean_end_waits_for_a_full_store(pair: tuple[Node, Node]) -> None:
    """The store is full for a moment, just as a node ends with a cached exclusive lock. To end the
    session all the same would look like a death at EX, and the next holder would be told that the
    value may be torn (promise 4).
    """
    a, b = pair
    for node in pair:
        node.join()
    a.cache()
    a.store.faults = Faults(full=True)
    ended: list[DlmfsError | None] = []
    a.membership.ending.begin("a test", ended.append)
    a.loop.run_for(1.0)
    assert not ended
    a.store.faults = Faults()
    assert a.loop.run_until(lambda: bool(ended), PATIENCE_S)
    assert ended == [None]
    claim = b.open()
    assert b.loop.run_until(lambda: holds(claim), PATIENCE_S)
    assert b.membership.spaces[DOMAIN].locks[LOCK].view.head.abandoned is None


@pytest.mark.allow_warnings
def test_a_record_that_was_removed_in_a_gap_of_the_watch_fences(pair: tuple[Node, Node]) -> None:
    """An operator removes the node's record by hand, and the watch that would have told has a gap. What
    the node serves from there on, another may take under its name (promise 3).
    """
    a, _ = pair
    a.store.break_watches(1.0)
    server = a.store.server
    server.apply(Txn((), (Delete(b"n/a"),)))
    server.compact(server.revision)
    assert a.loop.run_until(lambda: bool(a.fences), TTL_S / 2)
    assert a.fences == [REMOVED]


@pytest.mark.allow_warnings
def test_a_wish_of_a_former_membership_does_not_stand(pair: tuple[Node, Node]) -> None:
    """A domain is lost and joined again in one session. The wish that waited there is on that session's
    lease: nobody withdrew it, and whoever came after it waited for ever (promise 5).
    """
    a, b = pair
    for node in pair:
        node.join()
    held = b.open()
    assert a.loop.run_until(lambda: holds(held), PATIENCE_S)
    wanted = a.open()
    a.loop.run_for(SOON_S)
    assert waits(wanted)
    key = b"d/" + DOMAIN + b"/w/" + LOCK + b"/a"
    assert key in a.store.server.data
    a.membership.spaces[DOMAIN].lose("a test")
    assert a.loop.run_until(lambda: a.membership.spaces[DOMAIN].live, PATIENCE_S)
    a.loop.run_for(SOON_S)
    assert key not in a.store.server.data


# -- exceptions in what belongs to the whole node -------------------------------------------------------


class Once:
    """A bug that comes out once, and then the real thing."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real = real
        self.left = 1

    def __call__(self, *args: Any) -> Any:
        if self.left:
            self.left -= 1
            raise KeyError("a bug")
        return self.real(*args)


@pytest.fixture
def shaky(pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node that notes what breaks, and stands."""
    a, _ = pair
    a.join()
    monkeypatch.setattr(a, "broken", lambda where, _error: a.fences.append(where))
    return a


@pytest.mark.allow_warnings
def test_the_look_at_the_lease_goes_on_after_an_exception(
    shaky: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a chain of timers: broken once, nobody would have fenced a node whose store is silent."""
    member = shaky.membership
    monkeypatch.setattr(member, "serving", Once(member.serving))
    shaky.loop.run_for(TTL_S)
    assert shaky.fences == ["the node's membership"]
    shaky.store.cut(up=True, down=True)
    shaky.loop.run_for(TTL_S)
    assert len(shaky.fences) == 2, "fenced by the timer alone"


@pytest.mark.allow_warnings
def test_a_node_comes_back_though_something_breaks_on_its_way(
    shaky: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = shaky.membership
    monkeypatch.setattr(member, "_named", Once(member._named))
    session = member.session
    assert session is not None
    shaky.store.server.expire(session.lease)
    assert shaky.loop.run_until(lambda: len(shaky.fences) == 2, PATIENCE_S)
    assert shaky.fences[1] == "the node's membership"
    assert shaky.loop.run_until(lambda: member.up and member.spaces[DOMAIN].live, PATIENCE_S)


@pytest.mark.allow_warnings
def test_what_breaks_at_one_record_costs_that_record(
    shaky: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's mark beside it is heard."""
    member = shaky.membership

    def buggy(_event: Event) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(member.questions, "told", buggy)
    ask = NODES + member.name.encode() + b"/ask/b"
    mark = Put(mark_key(member.name), Mark(member.record, "b").encode())
    shaky.store.server.apply(Txn((), (Put(ask, b"{}"), mark)))
    assert shaky.loop.run_until(lambda: member.final, PATIENCE_S)
    assert shaky.fences[0] == "the node's membership"


def test_a_beginning_that_breaks_is_told_to_who_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = SimLoop()
    node = Node.__new__(Node)
    node.fences, node.claims = [], []
    store = MemoryStore(MemoryServer(loop, start_revision=1000))
    config = Config(("a",), {}, lambda _facts: False, ttl_s=TTL_S)
    member = Membership(store, loop, loop.time, config)
    member.host = node
    monkeypatch.setattr(node, "broken", lambda where, _error: node.fences.append(where))
    monkeypatch.setattr(member, "_named", Once(member._named))
    said: list[DlmfsError | None] = []
    member.start(said.append)
    loop.run_for(1.0)
    assert len(said) == 1
    assert isinstance(said[0], Unavailable)
