"""Races between nodes that were found one by one; each is told step by step, so that it stays mended.

Every docstring names the race and the promise of the README that it broke.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

import pytest

from dlmfs.core.claims import COUNTER_MAX
from dlmfs.core.events import Claim, Phase
from dlmfs.engine.lockspace import Life
from dlmfs.errors import BadState, DlmfsError, LockLost, OutcomeUnknown, StoreFull, Unavailable
from dlmfs.model import HolderRule, Mode
from dlmfs.store.base import Txn, TxnDone
from tests.engine.hand import LOCK, QUEUE, SOON_S, HandCluster, ended, holds, waits

LONG_S = 60.0
"""Longer than every timer of the protocol: what has not happened by then never does."""


# -- turns (promise 5) ----------------------------------------------------------------------------


def test_a_renewal_of_the_token_sees_a_wish_filed_just_before() -> None:
    """The holder's users have used up its token's counter; a new head renews it. Another node's wish
    was committed a moment before and the watch has yet to tell. The renewal must compare the queue:
    else its commit passes for a look at a queue without the wish, and nobody ever gives way.
    """
    cluster = HandCluster(2, HolderRule.FILE)
    a, b = cluster.hands
    cluster.cache(a, Mode.EX)
    a.lock.res._counter = COUNTER_MAX
    a.network(delay_s=0.0, watch_delay_s=0.05)
    wanting = cluster.begin(b, Mode.EX)
    assert cluster.loop.run_until(cluster.wish_stands, 0.04)
    renewing = cluster.begin(a, Mode.EX)
    cluster.pass_time(0.02)
    assert holds(renewing)
    cluster.end(a, renewing)
    cluster.pass_time(LONG_S)
    assert holds(wanting)


def test_users_who_come_after_a_hand_over_stand_behind_who_waited_before_it() -> None:
    """A node gets the lock while another already waits behind it. Its wish is known and not told
    again, so the barrier between those who came before and after must be set at the grant: else users
    that overlap on the new node keep the lock for ever.
    """
    cluster = HandCluster(4)
    a, b, c, d = cluster.hands
    first = cluster.hold(a, Mode.EX)
    second = cluster.open(b, Mode.EX)
    third = cluster.open(c, Mode.EX)
    fourth = cluster.open(a, Mode.EX)
    assert waits(fourth)
    cluster.end(a, first)
    cluster.pass_time()
    assert holds(second)
    fifth = cluster.open(d, Mode.EX)
    cluster.end(b, second)
    cluster.pass_time()
    assert holds(third)
    cluster.end(c, third)
    cluster.pass_time()
    assert holds(fourth)

    current = fourth
    for _ in range(20):  # users of one node overlap, as long as they are let in
        later = cluster.open(a, Mode.EX)
        if waits(later):
            break
        cluster.end(a, current)
        cluster.pass_time()
        current = later
    assert waits(later), "every later open on the node passed the other node's"
    cluster.end(a, current)
    cluster.pass_time()
    assert holds(fifth)


def test_a_hand_over_refused_by_a_full_store_is_tried_again_though_an_unlink_waits() -> None:
    """The store is full for a moment, just as the lock is handed to another node; meanwhile the file
    is unlinked here. The refusal was taken for the unlink's, and the hand-over was forgotten: the
    other node waited for ever.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.cache(a, Mode.EX)
    wanting = cluster.begin(b, Mode.EX)
    assert cluster.loop.run_until(lambda: a.lock.res.phase is Phase.DROPPING, 1)
    a.medium(full=True)
    unlinked: list[DlmfsError | None] = []
    a.lock.forget(unlinked.append)
    cluster.pass_time(SOON_S / 2)
    a.medium(full=False)
    cluster.pass_time(LONG_S)
    assert holds(wanting)
    assert unlinked == [None]


@pytest.mark.parametrize("error", [BadState("a record of another format"), Unavailable("away")])
def test_a_definite_refusal_by_the_store_answers_the_open(error: DlmfsError) -> None:
    """The contract lets a store refuse a transaction by any error. All but "full" were dropped
    without a word, and with them the opens that waited for the answer.
    """
    cluster = HandCluster(1)
    (a,) = cluster.hands

    def refuse(_txn: Txn, done: TxnDone) -> None:
        cluster.loop.call_later(0.001, done, error)

    a.answer_next(refuse)
    claim = cluster.begin(a, Mode.EX)
    cluster.pass_time(LONG_S)
    assert ended(claim)
    assert a.reasons[claim.fh] in (errno.ENOLCK, errno.EIO)


def test_an_exception_in_a_callback_leaves_no_waiter_of_the_lock_unanswered() -> None:
    """A bug in the node's own code is raised while actions are carried out. The node is fenced for
    it, but the lock still believed to be inside the loop: its waiters' failures were queued behind
    an action that nobody carried out any more, and their programs hung (promise 3).
    """
    cluster = HandCluster(1, HolderRule.FILE)
    (a,) = cluster.hands
    holding = cluster.hold(a, Mode.EX)
    cluster.open(a, Mode.EX)
    waiting = cluster.open(a, Mode.EX)

    def broken(_claim: Claim) -> None:
        raise KeyError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a, "granted", broken)
        with pytest.raises(KeyError):
            cluster.end(a, holding)
    a.joined.lose("internal error")
    assert waiting.fh in a.reasons


def test_an_answer_on_its_way_is_not_the_reading_that_a_gap_asks_for() -> None:
    """A waiter's reading is answered late. Meanwhile its wish is granted, but the watch that would have
    told has a gap. Everything must be read anew; the late answer, from before all that, passed for
    this reading, and the waiter waited for ever.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    held = cluster.hold(a, Mode.EX)
    claim = cluster.open(b, Mode.EX)
    late: list[Callable[[], None]] = []

    def keep(txn: Txn, done: TxnDone) -> None:
        late.append(partial(done, cluster.server.apply(txn)))

    b.answer_next(keep)
    b.lock.member_gone()  # as after any death in the domain
    cluster.pass_time()
    b.network(watch_delay_s=SOON_S)
    cluster.end(a, held)
    assert cluster.loop.run_until(lambda: not cluster.wish_stands(), SOON_S / 2)
    cluster.server.compact(cluster.server.revision)
    cluster.pass_time(2 * SOON_S)
    late.pop()()
    cluster.pass_time()
    assert holds(claim)


@pytest.mark.parametrize("how", ["full", "epoch"])
def test_a_reading_that_the_store_refuses_is_due_again(how: str) -> None:
    """A waiter reads how things stand, as after any death. The reading is refused definitely: another
    lock's write in its commit finds the store full, or the epoch has changed under it. That it was due
    is noted nowhere else: it was forgotten, and the waiter went on by what it knew from before.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.hold(a, Mode.EX)
    assert waits(cluster.open(b, Mode.EX))
    readings: list[Txn] = []

    def refuse(txn: Txn, done: TxnDone) -> None:
        readings.append(txn)
        if how == "full":
            cluster.loop.call_later(0.001, done, StoreFull("the store is full"))
        else:
            b.joined.revive()  # as for an unknown outcome of another lock's
            cluster.loop.call_later(SOON_S, lambda: done(cluster.server.apply(txn)))
        b.answer_next(again)

    def again(txn: Txn, done: TxnDone) -> None:
        readings.append(txn)
        done(cluster.server.apply(txn))

    b.answer_next(refuse)
    b.lock.member_gone()
    cluster.pass_time(LONG_S)
    first, second = readings
    assert first.then == second.then


def test_a_death_that_only_the_newest_waiter_knows_of_holds_nobody_up() -> None:
    """A reader dies. Its neighbour's watch lags; a newcomer's does not. The newcomer wishes, the
    neighbour gives way with the dead one still in its view, and grants nobody. It is told of the
    death later, but wants nothing any more; the newcomer was told before it came: nobody acted.
    """
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    dead = cluster.hold(a, Mode.PR)
    reading = cluster.hold(b, Mode.PR)
    assert holds(dead)
    b.network(watch_delay_s=20.0)
    assert a.session is not None
    lease = a.session.lease
    a.crash()
    cluster.server.expire(lease)
    cluster.pass_time()
    cluster.end(b, reading)
    waiting = cluster.open(c, Mode.EX)
    assert waits(waiting)
    b.lock.reread()  # as after an unknown outcome: this tells it of the wish, ahead of its watch
    b.lock.resume()
    cluster.pass_time(LONG_S)
    assert holds(waiting)


def test_a_wish_that_only_the_list_after_a_gap_tells_of_is_not_filed_again() -> None:
    """A wish is filed, and the watch has a gap before it tells so. All answers that name it are older
    than what the watch tells next. It was filed a second time; if the first had been granted
    meanwhile, the second stood in the queue and nobody had made it.
    """
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    cluster.hold(a, Mode.EX)
    late: list[Callable[[], None]] = []

    def keep(txn: Txn, done: TxnDone) -> None:
        late.append(partial(done, cluster.server.apply(txn)))

    b.network(watch_delay_s=SOON_S)
    b.answer_next(keep)
    cluster.begin(b, Mode.EX)
    assert cluster.loop.run_until(cluster.wish_stands, SOON_S / 2)
    key = QUEUE + LOCK + b"/" + b.name.encode()
    filed = cluster.server.data[key].create_revision
    cluster.server.compact(cluster.server.revision)
    cluster.pass_time(2 * SOON_S)
    b.network()
    b.answer_next(keep)
    late.pop()()
    cluster.pass_time()
    c.joined.revive()  # something else that every watch tells
    cluster.pass_time()
    late.pop()()
    cluster.pass_time()
    assert cluster.server.data[key].mod_revision == filed


# -- trylocks (promise 6) -------------------------------------------------------------------------


def test_the_timer_of_an_earlier_trylock_refuses_no_later_one() -> None:
    """A trylock was granted long ago, but its timer still ran: it refused whichever trylock waited on
    this lock when it went off, a moment after that one had been tried.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.cache(b, Mode.EX)
    start = cluster.loop.time()
    earlier = cluster.open(a, Mode.EX, trying=True)
    assert holds(earlier)
    cluster.end(a, earlier)
    cluster.cache(b, Mode.EX)
    limit = a.joined.timing.try_timeout_s
    cluster.pass_time(start + limit - cluster.loop.time() - 0.0005)
    later = cluster.open(a, Mode.EX, trying=True)
    assert holds(later), errno.errorcode[a.reasons[later.fh]]


def test_each_of_two_trylocks_has_its_own_time() -> None:
    """Two trylocks of one node at a silent holder, the second just before the first one's time is up:
    the one timer refused both, the second after a moment in which no holder could have answered.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.hold(b, Mode.EX)
    b.store.cut()
    limit = a.joined.timing.try_timeout_s
    earlier = cluster.begin(a, Mode.EX, trying=True)
    cluster.pass_time(limit - SOON_S)
    later = cluster.begin(a, Mode.EX, trying=True)
    cluster.pass_time(2 * SOON_S)
    assert ended(earlier)
    assert a.reasons[earlier.fh] == errno.ETXTBSY
    assert waits(later)
    cluster.pass_time(limit)
    assert ended(later)
    assert a.reasons[later.fh] == errno.ETXTBSY


def test_a_trylock_is_not_refused_by_the_grant_of_the_one_before() -> None:
    """Two trylocks of one node, shared and exclusive, and an idle holder elsewhere. The first one's
    wish leaves the queue because it is granted; once the core has asked for the second, the same
    event read as its refusal.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.cache(b, Mode.EX)
    shared = cluster.begin(a, Mode.PR, trying=True)
    exclusive = cluster.begin(a, Mode.EX, trying=True)
    cluster.pass_time(2.0)
    assert holds(shared)
    assert holds(exclusive), errno.errorcode[a.reasons[exclusive.fh]]


def test_an_answer_on_its_way_hides_no_newer_reason_to_look() -> None:
    """The holder deletes a trylock's wish while the trying node's reading, evaluated before that, is
    still on its way. The old answer cleared the reason to look that had come in meanwhile: the
    refusal was only noticed when the trylock's time was up.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.hold(b, Mode.EX)
    b.network(delay_s=0.01, watch_delay_s=0.01)
    a.network(delay_s=0.0001, watch_delay_s=0.0001)
    claim = cluster.begin(a, Mode.EX, trying=True)
    lock = a.lock
    assert cluster.loop.run_until(lambda: lock.view.wish is not None and lock.res.asked_trying, 1)
    assert cluster.loop.run_until(lambda: not lock.busy, 1)

    def answer_late(txn: Txn, done: TxnDone) -> None:
        cluster.loop.call_later(0.2, done, cluster.server.apply(txn))

    a.answer_next(answer_late)
    lock.member_gone()  # as after any death in the domain
    start = cluster.loop.time()
    assert cluster.loop.run_until(lambda: ended(claim), 20)
    assert cluster.loop.time() - start < 1.0


def test_an_answer_older_than_the_watch_still_tells_that_the_own_wish_is_gone() -> None:
    """A trylock's wish is refused while the answer to its filing is on its way; the reading that
    follows is overtaken by the watch, which tells of something else. Too old for the queue, it was
    not asked about our own wish either, and nobody looked again: the trylock waited out its time.
    """
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    cluster.hold(b, Mode.EX)
    late: list[Callable[[], None]] = []

    def keep(txn: Txn, done: TxnDone) -> None:
        late.append(partial(done, cluster.server.apply(txn)))

    a.answer_next(keep)
    claim = cluster.begin(a, Mode.EX, trying=True)
    cluster.pass_time()
    a.answer_next(keep)
    late.pop()()
    cluster.pass_time()
    assert ended(cluster.open(c, Mode.EX, trying=True))
    assert waits(claim)
    late.pop()()
    cluster.pass_time()
    assert ended(claim)
    assert a.reasons[claim.fh] == errno.ETXTBSY


# -- the mark of an exclusive holder's death (promise 4) -------------------------------------------


def test_the_mark_outlives_a_clean_leave_of_the_last_member() -> None:
    """The exclusive holder dies; the only other member sees it, writes nothing and leaves cleanly.
    The head must stay for its mark's sake: who comes next has to learn that the value may be torn.
    """
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    assert_left(cluster, cluster.leave(c))
    holding = cluster.hold(a, Mode.EX)
    cluster.put_value(a, holding)
    a.crash()
    cluster.pass_time(40)
    reading = cluster.hold(b, Mode.PR)
    assert b.head.abandoned is not None
    cluster.end(b, reading)
    assert_left(cluster, cluster.leave(b))
    c.restart()
    assert cluster.loop.run_until(lambda: c.space is not None, 20)
    cluster.hold(c, Mode.PR)
    assert c.head.abandoned is not None


def test_the_mark_is_set_when_the_dead_holders_successor_is_granted() -> None:
    """A node dies exclusively and is back at once under its name. A node whose watch lags grants the
    newcomer's wish before it has heard of the death: the new place must not silently overwrite the
    dead one's. That a later incarnation wishes is proof of the earlier one's end.
    """
    cluster = HandCluster(2)
    a, x = cluster.hands
    holding = cluster.hold(x, Mode.EX)
    cluster.put_value(x, holding)
    a.network(delay_s=0.0001, watch_delay_s=20.0)
    assert x.session is not None
    lease = x.session.lease
    x.restart()
    cluster.server.expire(lease)
    assert cluster.loop.run_until(lambda: x.space is not None, 5)
    x.network(delay_s=0.01, watch_delay_s=0.001)
    returned = cluster.begin(x, Mode.PR)
    assert cluster.loop.run_until(cluster.wish_stands, 1)
    other = cluster.begin(a, Mode.PR)
    cluster.pass_time(1.0)
    assert holds(returned)
    assert holds(other)
    assert x.head.abandoned is not None


def test_a_leave_that_a_full_store_refuses_looks_like_no_death() -> None:
    """The store is full for a moment, just as a node leaves with a cached exclusive lock. Its place in
    the head could not be removed; if the membership goes all the same, the next one is told of a
    dead exclusive holder where nobody died.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    cluster.cache(a, Mode.EX)
    lock = a.lock
    a.medium(full=True)
    said = cluster.leave(a)
    assert cluster.loop.run_until(lambda: not lock.forgets, 1)
    a.medium(full=False)
    cluster.pass_time(1.0)
    assert len(said) == 1
    cluster.hold(b, Mode.PR)
    assert b.head.abandoned is None
    if said != [None]:
        assert a.joined.life is Life.JOINED, "told that it failed, one must be able to leave again"


# -- exclusion (promise 1) ------------------------------------------------------------------------


def test_an_open_while_the_domain_is_left_outlives_no_membership() -> None:
    """An open comes while a clean leave is under way. Whatever it is told, it must not hold the lock
    of a membership that is gone, beside the next node's holder; nor wait there for ever.
    """
    cluster = HandCluster(2)
    a, b = cluster.hands
    lock = a.lock
    said = cluster.leave(a)
    early = cluster.begin(a, Mode.EX)
    assert_left(cluster, said)
    other = cluster.hold(b, Mode.EX)
    assert holds(other)
    assert ended(early), lock.res.phase


def assert_left(cluster: HandCluster, said: list[DlmfsError | None]) -> None:
    assert cluster.loop.run_until(lambda: bool(said), LONG_S)
    assert said == [None]


def test_a_late_attempt_at_a_new_epoch_changes_nothing() -> None:
    """The first one's answer is lost, the second is answered, and then the first arrives. Applied, it
    would change the epoch behind our back, and each transaction of ours would be refused for it."""
    cluster = HandCluster(2)
    a, _ = cluster.hands
    space = a.joined
    late: list[Txn] = []

    def lost(txn: Txn, done: TxnDone) -> None:
        late.append(txn)
        cluster.loop.call_soon(done, OutcomeUnknown("lost on the way"))

    a.answer_next(lost)
    before = space.epoch
    space.revive()
    cluster.pass_time(1.0)
    assert space.epoch > before
    assert space.running
    a.store.txn(late[0], lambda _result: None)
    cluster.pass_time()
    assert cluster.server.data[space.keys.mine].mod_revision == space.epoch


def test_a_leave_that_a_loss_overtakes_is_no_clean_one() -> None:
    """Its locks end with the membership, not with their leave: their places stand still."""
    cluster = HandCluster(1)
    (a,) = cluster.hands
    cluster.end(a, cluster.hold(a, Mode.EX))
    space = a.joined
    a.network(delay_s=5.0)
    said: list[DlmfsError | None] = []
    space.leave(said.append)
    commits = space.commits
    space.lose("a test")
    assert [type(error) for error in said] == [LockLost]
    assert space.commits == commits
