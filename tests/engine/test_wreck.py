"""An exception in one lock's state costs that lock: it is never served on, and nothing else suffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dlmfs.core.events import Claim
from dlmfs.core.lease import LeaseState
from dlmfs.core.lockres import Lockres
from dlmfs.engine import hearing
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Life
from dlmfs.engine.view import View
from dlmfs.errors import DlmfsError
from dlmfs.model import HolderRule, Mode
from dlmfs.store.base import Txn
from dlmfs.timing import GRACE_S
from tests.engine.cluster import LockHistory, Program
from tests.engine.hand import LOCK, HandCluster, HandNode, ended, holds, waits

pytestmark = pytest.mark.allow_warnings

OTHER = b"other"


@pytest.fixture
def pair() -> tuple[HandCluster, HandNode, HandNode]:
    cluster = HandCluster(2, HolderRule.FILE)
    a, b = cluster.hands
    a.faults = []
    return cluster, a, b


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


def spoil(lock: ClusterLock) -> None:
    """From now on the core's invariants do not hold: the next event finds it out."""
    lock.res.pr += 1


def buggy(*_args: object, **_more: object) -> None:
    raise KeyError("a bug")


def hold_other(cluster: HandCluster, node: HandNode) -> Claim:
    cluster.fh += 1
    claim = Claim(cluster.fh, Mode.EX, pid=cluster.fh)
    cluster.locks[OTHER] = LockHistory()
    node.programs[claim.fh] = Program(claim, OTHER, node, 0.0)
    node.joined.lock(OTHER).open(claim)
    cluster.pass_time()
    assert holds(claim)
    return claim


def mark(node: HandNode) -> str | None:
    abandoned = node.head.abandoned
    return None if abandoned is None else abandoned.node


# -- how an exception comes ---------------------------------------------------------------------------


def by_a_local_open(cluster: HandCluster, a: HandNode, _b: HandNode) -> None:
    spoil(a.lock)
    cluster.begin(a, Mode.EX)


def by_another_nodes_wish(cluster: HandCluster, a: HandNode, b: HandNode) -> None:
    spoil(a.lock)
    cluster.open(b, Mode.EX)


def by_an_answer(cluster: HandCluster, a: HandNode, _b: HandNode) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(View, "committed", buggy)
        (program,) = (p for p in a.programs.values() if p.lock == LOCK and holds(p.claim))
        cluster.write(program)
        cluster.pass_time(0.01)


def by_a_timer(cluster: HandCluster, a: HandNode, _b: HandNode) -> None:
    lock = a.lock
    lock.later(0.01, buggy)
    cluster.pass_time(0.02)


def by_a_kinship(cluster: HandCluster, a: HandNode, _b: HandNode) -> None:
    """In the middle of carrying out the core's actions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a, "identify", buggy)
        cluster.begin(a, Mode.EX)


WAYS = (by_a_local_open, by_another_nodes_wish, by_an_answer, by_a_timer, by_a_kinship)


@pytest.mark.parametrize("way", WAYS)
def test_it_costs_that_lock_and_nothing_else(
    pair: tuple[HandCluster, HandNode, HandNode],
    way: Callable[[HandCluster, HandNode, HandNode], None],
) -> None:
    cluster, a, b = pair
    other = hold_other(cluster, a)
    held = cluster.hold(a, Mode.EX)
    lost = a.lock
    way(cluster, a, b)
    assert a.faults == [f"lock dom/{LOCK.decode()}"]
    assert ended(held)
    assert holds(other)
    assert a.joined.life is Life.JOINED
    # Its holder has not closed: nobody has the lock yet, here or there.
    first, second = cluster.open(b, Mode.EX), cluster.begin(a, Mode.EX)
    cluster.pass_time(GRACE_S - 0.5)
    assert waits(second)
    assert waits(first)
    lost.close(held)
    cluster.pass_time()
    granted = [claim for node in (a, b) for claim in map(claim_of, node.programs.values())]
    holding = [claim for claim in granted if holds(claim) and claim is not other]
    assert len(holding) == 1, "the queue goes on, one at a time"
    assert holding[0].token > held.token
    assert mark(b) == "n0", "to the others it is a death"


def claim_of(program: Program) -> Claim:
    return program.claim


def test_its_holders_have_their_time_and_no_more(
    pair: tuple[HandCluster, HandNode, HandNode],
) -> None:
    cluster, a, b = pair
    cluster.hold(a, Mode.PR)
    by_a_local_open(cluster, a, b)
    waiter = cluster.begin(b, Mode.EX)
    cluster.pass_time(GRACE_S - 0.1)
    assert waits(waiter)
    cluster.pass_time(0.3)
    assert holds(waiter)
    assert mark(b) is None, "a reader's death is none to tell of"


def test_what_was_only_cached_is_free_at_once(pair: tuple[HandCluster, HandNode, HandNode]) -> None:
    cluster, a, b = pair
    cluster.cache(a, Mode.EX)
    spoil(a.lock)
    waiter = cluster.open(b, Mode.EX)
    assert holds(waiter)
    assert mark(b) == "n0", "nobody can tell whether it was in use"


def test_the_lock_delay_is_kept(pair: tuple[HandCluster, HandNode, HandNode]) -> None:
    cluster, a, b = pair
    delay = 3 * GRACE_S
    for node in (a, b):
        node.joined.lock_delay_s = delay
    held = cluster.hold(a, Mode.EX)
    lost = a.lock
    by_a_local_open(cluster, a, b)
    lost.close(held)
    waiter = cluster.begin(b, Mode.EX)
    cluster.pass_time(delay - 0.1)
    assert waits(waiter)
    cluster.pass_time(0.3)
    assert holds(waiter)


def test_a_waiters_wish_does_not_outlive_it(pair: tuple[HandCluster, HandNode, HandNode]) -> None:
    """It stands in the queue for a resource that is no more: whoever is after it would wait for ever."""
    cluster, a, b = pair
    held = cluster.hold(b, Mode.EX)
    waiting = cluster.open(a, Mode.EX)
    assert cluster.wish_stands()
    spoil(a.lock)
    cluster.begin(a, Mode.EX)
    assert waiting.fh in a.reasons
    cluster.pass_time()
    assert not cluster.wish_stands()
    cluster.end(b, held)
    assert holds(cluster.open(b, Mode.EX))


def test_mail_that_comes_to_the_lost_lock_is_nobodys(
    pair: tuple[HandCluster, HandNode, HandNode],
) -> None:
    """The wish is granted while the fault is found: the grant belongs to nobody, and is given back."""
    cluster, a, b = pair
    held = cluster.hold(b, Mode.EX)
    cluster.open(a, Mode.EX)
    a.network(watch_delay_s=1.0)
    cluster.end(b, held)
    cluster.pass_time()  # granted, and not heard of
    spoil(a.lock)
    again = cluster.begin(a, Mode.PR)
    assert ended(again)
    third = cluster.begin(b, Mode.EX)
    cluster.pass_time(5.0)
    assert holds(third)
    assert mark(b) == "n0"
    assert not [key for key in cluster.server.data if key.startswith(b"d/dom/g/n0/")]


def test_what_it_had_sent_no_longer_applies(pair: tuple[HandCluster, HandNode, HandNode]) -> None:
    """A change of the head is on its way when the lock is lost. Applied later, it would put us back."""
    cluster, a, b = pair
    held = cluster.hold(a, Mode.EX)
    sent: list[tuple[object, object]] = []
    a.answer_next(lambda txn, done: sent.append((txn, done)))
    cluster.put_value(a, held)
    assert len(sent) == 1
    lost = a.lock
    by_a_local_open(cluster, a, b)
    lost.close(held)
    waiter = cluster.open(b, Mode.EX)
    cluster.pass_time()
    assert holds(waiter)
    before = b.head
    txn, done = sent[0]
    a.store.txn(txn, done)  # type: ignore[arg-type]
    cluster.pass_time()
    assert cluster.server.data[b"h/dom/" + LOCK].mod_revision == b.lock.view.head_revision
    assert b.head == before


def test_what_it_had_not_sent_yet_is_not_sent(
    pair: tuple[HandCluster, HandNode, HandNode],
) -> None:
    """It would go out under the new epoch, and take the lock for nobody."""
    cluster, a, b = pair
    a.joined.suspend(LeaseState.SUSPECT)
    cluster.begin(a, Mode.EX)
    cluster.pass_time()
    by_a_local_open(cluster, a, b)
    a.joined.suspend(LeaseState.HEALTHY)
    cluster.pass_time()
    assert holds(cluster.open(b, Mode.EX))
    assert mark(b) is None, "nobody had it"


def test_nor_while_its_holders_have_their_time(
    pair: tuple[HandCluster, HandNode, HandNode],
) -> None:
    """The head is as it was until then, and its write would be believed: only the new epoch tells."""
    cluster, a, b = pair
    held = cluster.hold(a, Mode.EX)
    late: list[Txn] = []
    a.answer_next(lambda txn, _done: late.append(txn))
    cluster.put_value(a, held)
    by_a_local_open(cluster, a, b)
    cluster.pass_time()
    before = cluster.server.data[b"h/dom/" + LOCK]
    a.store.txn(late[0], lambda _result: None)
    cluster.pass_time()
    assert cluster.server.data[b"h/dom/" + LOCK] == before


def test_an_unlink_that_was_under_way_is_carried_out(
    pair: tuple[HandCluster, HandNode, HandNode], patch: pytest.MonkeyPatch
) -> None:
    cluster, a, _b = pair
    cluster.cache(a, Mode.PR)
    said: list[DlmfsError | None] = []
    real = View.committed

    def once(*_args: object) -> None:
        patch.setattr(View, "committed", real)
        raise KeyError("a bug")

    patch.setattr(View, "committed", once)
    a.lock.forget(said.append)
    cluster.pass_time()
    assert a.faults
    assert said == [None]
    assert b"h/dom/" + LOCK not in cluster.server.data


def test_a_write_that_was_under_way_is_answered(
    pair: tuple[HandCluster, HandNode, HandNode],
) -> None:
    cluster, a, b = pair
    cluster.hold(a, Mode.EX)
    a.network(delay_s=0.5)
    said: list[DlmfsError | None] = []
    read: list[bytes] = []
    a.lock.write_lvb(0, b"x", said.append)
    cluster.pass_time(0.1)
    by_a_local_open(cluster, a, b)
    assert len(said) == 1
    assert isinstance(said[0], DlmfsError)
    assert read == []


def test_if_it_breaks_again_the_membership_ends(
    pair: tuple[HandCluster, HandNode, HandNode], patch: pytest.MonkeyPatch
) -> None:
    cluster, a, b = pair
    cluster.hold(a, Mode.EX)
    space = a.joined
    patch.setattr(View, "adopt", buggy)
    by_a_local_open(cluster, a, b)
    cluster.pass_time()
    assert space.life is Life.LOST
    assert space.reason is not None
    assert "cannot be recovered" in space.reason
    patch.undo()
    waiter = cluster.begin(b, Mode.EX)
    cluster.pass_time(60.0)
    assert holds(waiter)
    assert mark(b) == "n0"


def test_what_breaks_at_the_domains_end_is_lost_all_the_same(
    pair: tuple[HandCluster, HandNode, HandNode], patch: pytest.MonkeyPatch
) -> None:
    """The loss of one lock must not keep the others from being told of theirs."""
    cluster, a, _b = pair
    held, other = cluster.hold(a, Mode.EX), hold_other(cluster, a)
    real = Lockres.lose

    def broken(res: Lockres, reason: int) -> object:
        if held.fh in res.holders:
            raise KeyError(held)
        return real(res, reason)

    patch.setattr(Lockres, "lose", broken)
    a.joined.lose("taken away")
    assert ended(held)
    assert ended(other)


def test_what_the_domain_itself_gets_wrong_costs_its_membership(
    pair: tuple[HandCluster, HandNode, HandNode], patch: pytest.MonkeyPatch
) -> None:
    cluster, a, b = pair
    held = cluster.hold(a, Mode.EX)
    space = a.joined
    note = hearing.note
    patch.setattr(hearing, "note", lambda s, batch: buggy() if s is space else note(s, batch))
    cluster.begin(b, Mode.EX)
    cluster.pass_time(0.01)
    assert a.faults == ["domain dom"]
    assert space.life is Life.LOST
    assert ended(held)


def test_an_unlink_is_answered_when_the_membership_ends_by_it(
    pair: tuple[HandCluster, HandNode, HandNode], patch: pytest.MonkeyPatch
) -> None:
    cluster, a, _b = pair
    cluster.cache(a, Mode.PR)
    said: list[DlmfsError | None] = []
    patch.setattr(View, "committed", buggy)
    patch.setattr(View, "adopt", buggy)
    a.lock.forget(said.append)
    cluster.pass_time()
    assert said == [None]
