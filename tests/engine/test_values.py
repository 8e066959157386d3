"""How long a value lives, and what is left when nobody needs it (promise 4; design, engine rule 15)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dlmfs.core.events import Claim
from dlmfs.engine.records import decode_head
from dlmfs.errors import StoreFull
from dlmfs.model import EMPTY_LVB, LVB_SIZE, DeadValue, Mode
from dlmfs.store.base import BOUNDS, Bounds, Put, Txn
from tests.engine.hand import LOCK, HandCluster, HandNode, ended, holds, waits

A_SECOND = 1.0
"""In so long a file that is only made has its place."""
VALUE = b"precious".ljust(LVB_SIZE, b".")


def write(cluster: HandCluster, node: HandNode, value: bytes = VALUE, name: bytes = LOCK) -> None:
    """A program takes the lock, writes, and closes."""
    cluster.fh += 1
    claim = Claim(cluster.fh, Mode.EX, pid=1000 + cluster.fh)
    lock = node.joined.lock(name)
    said: list[object] = []
    if not lock.open(claim):
        cluster.loop.run_until(lambda: holds(claim), 10)
    assert holds(claim)
    lock.write_lvb(0, value, said.append)
    cluster.pass_time()
    assert said == [None]
    if name in cluster.locks:
        cluster.locks[name].abandoned = False
    lock.close(claim)
    cluster.pass_time()


def read(cluster: HandCluster, node: HandNode) -> bytes:
    claim = cluster.hold(node, Mode.PR)
    said: list[bytes] = []
    node.lock.read_lvb(said.append)
    cluster.end(node, claim)
    cluster.pass_time()
    return said[0]


def heads(cluster: HandCluster) -> dict[bytes, set[str]]:
    """Who is in which head."""
    return {
        key.rpartition(b"/")[2]: set(decode_head(kv).members)
        for key, kv in cluster.server.data.items()
        if key.startswith(b"h/")
    }


def unjudged(cluster: HandCluster) -> None:
    """The programs of `write` are nobody's: their grants are judged by their tests."""
    for node in cluster.hands:
        told = node.granted

        def granted(
            claim: Claim, told: Callable[[Claim], None] = told, node: HandNode = node
        ) -> None:
            if claim.fh in node.programs:
                told(claim)

        node.granted = granted  # type: ignore[method-assign]


def quiet(count: int, bounds: Bounds = BOUNDS) -> HandCluster:
    cluster = HandCluster(count, bounds=bounds)
    unjudged(cluster)
    return cluster


# -- files that are only made ---------------------------------------------------------------------


def test_a_file_that_is_only_made_keeps_the_value_alive() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    write(cluster, a)
    b.joined.files.made((LOCK,))
    cluster.pass_time(A_SECOND)
    assert heads(cluster) == {LOCK: {"n0", "n1"}}
    assert cluster.leave(a) == []
    cluster.pass_time()
    assert a.space is not None
    assert not a.space.live
    assert read(cluster, b) == VALUE


def test_so_does_one_that_was_made_before_anybody_wrote() -> None:
    """The lock's head is made later, by a node that knows nothing of the file."""
    cluster = quiet(2)
    a, b = cluster.hands
    b.joined.files.made((LOCK,))
    cluster.pass_time(10 * A_SECOND)
    write(cluster, a)
    cluster.pass_time(A_SECOND)
    a.lock.forget(lambda _error: a.joined.drop(LOCK))
    cluster.pass_time()
    assert heads(cluster) == {LOCK: {"n1"}}
    assert read(cluster, b) == VALUE


def test_a_refused_trylocks_file_keeps_it_too() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    held = cluster.hold(a, Mode.EX)
    cluster.put_value(a, held)
    b.joined.files.made((LOCK,))
    tried = cluster.open(b, Mode.EX, trying=True)
    assert ended(tried)
    cluster.pass_time(A_SECOND)
    assert heads(cluster) == {LOCK: {"n0", "n1"}}


def test_a_waiting_opens_file_keeps_it_when_the_wait_is_given_up() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    held = cluster.hold(a, Mode.EX)
    cluster.put_value(a, held)
    b.joined.files.made((LOCK,))
    waiting = cluster.open(b, Mode.EX)
    cluster.pass_time(A_SECOND)
    assert waits(waiting)
    b.lock.interrupt(waiting)
    cluster.end(a, held)
    cluster.leave(a)
    cluster.pass_time()
    assert heads(cluster) == {LOCK: {"n1"}}


def test_making_a_file_makes_no_key_of_the_lock_and_waits_for_nothing() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    before = a.joined.commits
    a.joined.files.made((LOCK,))
    assert a.joined.commits == before
    cluster.pass_time(60.0)
    assert heads(cluster) == {}
    assert a.joined.commits == before + 1
    assert LOCK not in a.joined.locks
    cluster.leave(a)
    cluster.leave(b)
    cluster.pass_time()
    assert cluster.server.data == {}


def test_a_file_made_when_the_membership_is_lost_waits_for_the_next_one() -> None:
    """The lost one looked for its moment for ever, four times a second."""
    cluster = quiet(2)
    _, b = cluster.hands
    lost = b.joined
    lost.lose("a test")
    b.crash()
    cluster.pass_time(60.0)
    before = cluster.loop.pending()
    lost.files.made((LOCK,))
    assert cluster.loop.pending() == before


def test_a_file_that_is_opened_at_once_costs_nothing_more() -> None:
    cluster = quiet(2)
    a, _ = cluster.hands
    a.joined.files.made((LOCK,))
    before = a.joined.commits
    cluster.cache(a, Mode.EX)
    cluster.pass_time(10.0)
    assert a.joined.commits == before + 1


def test_first_values_are_told_to_nobody_who_does_not_care() -> None:
    cluster = quiet(3)
    a, b, c = cluster.hands
    before = b.joined.revision
    write(cluster, a)
    assert b.joined.revision == before
    b.joined.files.made((b"another",))
    cluster.pass_time(A_SECOND)
    write(cluster, a, VALUE[::-1])  # not the first
    assert c.joined.revision == before
    assert heads(cluster) == {LOCK: {"n0"}}


def test_many_files_at_once_cost_few_commits() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    names = [b"lock%d" % number for number in range(1000)]
    for name in names[:300]:
        write(cluster, a, name=name)
    before = cluster.server.commits, b.joined.commits
    b.joined.files.made(names)
    cluster.pass_time(A_SECOND)
    assert all(heads(cluster)[name] == {"n0", "n1"} for name in names[:300])
    assert len(heads(cluster)) == 300
    assert b.joined.commits - before[1] <= 8 + 10 + 2  # looks at 126 each, joins by 32
    assert cluster.server.commits - before[0] <= 11


def test_news_that_were_lost_in_a_gap_are_looked_for() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    b.joined.files.made((LOCK,))
    cluster.pass_time(A_SECOND)
    b.store.break_watches(5.0)
    write(cluster, a)
    cluster.server.compact(cluster.server.revision)
    cluster.pass_time(4.0)
    assert heads(cluster) == {LOCK: {"n0"}}
    cluster.pass_time(1.0 + A_SECOND)
    assert heads(cluster) == {LOCK: {"n0", "n1"}}


def test_a_look_without_an_answer_is_repeated() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    write(cluster, a)
    b.joined.files.made((LOCK,))
    b.store.cut(up=False)
    cluster.pass_time(2.0)
    b.store.heal()
    cluster.pass_time(2 * A_SECOND)
    assert heads(cluster) == {LOCK: {"n0", "n1"}}


def test_files_made_after_a_leave_that_failed_are_looked_after() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    cluster.cache(b, Mode.PR)
    write(cluster, a, name=b"other")
    b.joined.files.made((b"gone",))  # its look is still to come
    b.medium(full=True)
    said = cluster.leave(b)
    cluster.pass_time()
    assert [type(error) for error in said] == [StoreFull]
    b.medium(full=False)
    b.joined.files.made((b"other",))
    cluster.pass_time(A_SECOND)
    assert heads(cluster)[b"other"] == {"n0", "n1"}


def test_a_file_that_is_gone_by_then_gets_no_place() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    write(cluster, a)
    b.joined.files.made((LOCK,))
    b.network(delay_s=0.3)
    cluster.pass_time(0.4)  # the look is under way
    b.joined.drop(LOCK)
    cluster.pass_time(2 * A_SECOND)
    assert heads(cluster) == {LOCK: {"n0"}}
    assert LOCK not in b.joined.locks


def test_a_file_unlinked_while_its_place_is_taken_leaves_it_again() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    write(cluster, a)
    b.joined.files.made((LOCK,))
    b.network(delay_s=0.1)
    assert cluster.loop.run_until(lambda: LOCK in b.joined.locks and b.lock.busy, 2.0)
    said: list[object] = []
    b.lock.forget(said.append)
    cluster.pass_time(2 * A_SECOND)
    assert said == [None]
    assert heads(cluster) == {LOCK: {"n0"}}


def test_our_former_selfs_place_is_not_taken_before_its_death_is_over() -> None:
    """It died with the lock exclusively, which must be marked; with a lock-delay that takes its time."""
    cluster = quiet(2)
    a, b = cluster.hands
    write(cluster, a)
    held = cluster.hold(b, Mode.EX)
    cluster.put_value(b, held)
    b.store.dead = True
    b.crash()
    cluster.pass_time(16.0)
    b.start()
    assert cluster.loop.run_until(lambda: b.space is not None, 5.0)
    b.joined.deaths._delay_s = 5.0
    b.joined.deaths.listed()
    b.joined.files.made((LOCK,))
    cluster.pass_time(4.0)
    (kv,) = [kv for key, kv in cluster.server.data.items() if key.startswith(b"h/")]
    assert decode_head(kv).members["n1"].incarnation != b.joined.incarnation
    cluster.pass_time(4.0)
    (kv,) = [kv for key, kv in cluster.server.data.items() if key.startswith(b"h/")]
    assert decode_head(kv).members["n1"].incarnation == b.joined.incarnation
    mark = decode_head(kv).abandoned
    assert mark is not None
    assert mark.node == "n1"


def test_first_values_of_one_commit_are_told_together_and_fit() -> None:
    cluster = quiet(2, Bounds(operations=8))
    a, b = cluster.hands
    names = [b"x%d" % number for number in range(20)]
    b.joined.files.made(names)
    cluster.pass_time(2 * A_SECOND)
    claims: list[Claim] = []
    for name in names:
        claim = Claim(len(claims) + 1, Mode.EX)
        claims.append(claim)
        a.joined.lock(name).open(claim)
    cluster.pass_time()
    assert all(holds(claim) for claim in claims)
    for name in names:
        a.joined.lock(name).write_lvb(0, VALUE, lambda _error: None)
    cluster.pass_time(2 * A_SECOND)
    assert all(heads(cluster)[name] == {"n0", "n1"} for name in names)


@pytest.mark.allow_warnings
@pytest.mark.parametrize(
    "record", [b"", b"{", b'{"v":1}', b'{"v":1,"locks":7}', b'{"v":1,"locks":[7]}']
)
def test_a_record_that_is_no_news_is_taken_for_news_of_everything(record: bytes) -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    b.joined.files.made((LOCK,))
    cluster.pass_time(A_SECOND)
    before = b.joined.commits
    cluster.server.apply(Txn((), (Put(a.joined.keys.my_news, record),)))
    cluster.pass_time(A_SECOND)
    assert b.joined.commits == before + 1
    assert b.joined.live
    write(cluster, a)
    cluster.pass_time(A_SECOND)
    assert heads(cluster) == {LOCK: {"n0", "n1"}}


# -- marks ------------------------------------------------------------------------------------------


def die(cluster: HandCluster, node: HandNode) -> None:
    """The node dies having the lock exclusively, and its lease ends."""
    cluster.hold(node, Mode.EX)
    (lease,) = (n for n, record in cluster.server.leases.items() if record.node == node.name)
    node.crash()
    cluster.server.expire(lease)
    cluster.pass_time()


def forget(cluster: HandCluster, node: HandNode) -> None:
    node.lock.forget(lambda _error: node.joined.drop(LOCK))
    cluster.pass_time()


def mark(cluster: HandCluster) -> str | None:
    found = [kv for key, kv in cluster.server.data.items() if key.startswith(b"h/")]
    abandoned = decode_head(found[0]).abandoned if found else None
    return None if abandoned is None else abandoned.node


def test_an_exclusive_holder_that_unlinks_leaves_no_key_for_a_dead_one() -> None:
    cluster = HandCluster(2)
    a, b = cluster.hands
    die(cluster, a)
    held = cluster.hold(b, Mode.EX)
    assert b.head.abandoned is not None, "the next holder sees it"
    cluster.end(b, held)
    forget(cluster, b)
    assert heads(cluster) == {}


def test_nor_does_one_that_has_given_the_lock_away_before() -> None:
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    die(cluster, a)
    cluster.end(b, cluster.hold(b, Mode.EX))
    cluster.end(c, cluster.hold(c, Mode.PR))
    assert c.head.abandoned is not None, "until somebody writes"
    forget(cluster, b)
    assert mark(cluster) == a.name
    forget(cluster, c)
    assert heads(cluster) == {}


def test_a_mark_that_no_exclusive_holder_has_seen_stays() -> None:
    """A shared holder, and an exclusive grant that reached no program, are none."""
    cluster = HandCluster(2)
    a, b = cluster.hands
    die(cluster, a)
    cluster.end(b, cluster.hold(b, Mode.PR))
    forget(cluster, b)
    assert mark(cluster) == a.name
    unheard = cluster.begin(b, Mode.EX)
    del b.programs[unheard.fh]
    b.buried.add(unheard.fh)
    cluster.pass_time()
    assert holds(unheard)
    b.lock.close(unheard)
    forget(cluster, b)
    assert mark(cluster) == a.name
    cluster.leave(b)
    cluster.pass_time()
    assert mark(cluster) == a.name


def test_a_later_death_is_a_mark_of_its_own() -> None:
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    die(cluster, a)
    cluster.end(b, cluster.hold(b, Mode.EX))
    die(cluster, c)
    assert cluster.hold(b, Mode.PR)
    assert mark(cluster) == c.name
    (kv,) = [kv for key, kv in cluster.server.data.items() if key.startswith(b"h/")]
    found = decode_head(kv).abandoned
    assert found is not None
    assert not found.seen


def test_the_last_clean_leave_takes_what_was_seen_along() -> None:
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    die(cluster, a)
    cluster.end(b, cluster.hold(b, Mode.EX))
    cluster.end(c, cluster.hold(c, Mode.EX))
    for node in (b, c):
        cluster.leave(node)
        cluster.pass_time()
    assert cluster.server.data == {}


# -- dead-value=invalid -------------------------------------------------------------------------------


def test_a_dead_holders_value_is_none_until_somebody_writes() -> None:
    """With dead-value=invalid; where the value is kept, as by default, it is read, and marked."""
    cluster = quiet(3)
    a, b, c = cluster.hands
    b.joined.dead_value = DeadValue.INVALID
    write(cluster, a)
    die(cluster, a)
    assert read(cluster, c) == VALUE
    assert read(cluster, b) == b""
    write(cluster, b, b"new")
    assert read(cluster, b) == read(cluster, c) == b"new".ljust(LVB_SIZE, b"\0")


def test_a_write_of_zeros_is_a_write() -> None:
    cluster = quiet(2)
    a, b = cluster.hands
    b.joined.dead_value = DeadValue.INVALID
    die(cluster, a)
    assert read(cluster, b) == b""
    write(cluster, b, b"\0")
    assert read(cluster, b) == EMPTY_LVB
