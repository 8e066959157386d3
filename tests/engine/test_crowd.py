"""More nodes at one lock than fit into one commit (engine rule 17): nobody is forgotten or passed."""

from __future__ import annotations

import errno

import pytest

from dlmfs.core.events import Claim
from dlmfs.engine.changes import grants_max, mail_max
from dlmfs.engine.records import decode_head
from dlmfs.model import Mode
from dlmfs.store.base import BOUNDS, Bounds
from tests.engine.cluster import TTL_S, Program
from tests.engine.hand import LOCK, HandCluster, HandNode, holds, waits

ONE_BY_ONE = Bounds(operations=6)
"""A commit that grants one wish."""
TWO_BY_TWO = Bounds(operations=8)
HEADLESS = Bounds(operations=20, size=1200)
"""No head of these tests is short enough to go along in mail."""
AT_ONCE_S = 1.0
"""Far less than any timer or lease."""


def behind_a_writer(cluster: HandCluster, modes: list[Mode]) -> tuple[HandNode, Claim, list[Claim]]:
    """The first node holds the lock exclusively, the others wait in this order."""
    writer, *others = cluster.hands
    held = cluster.hold(writer, Mode.EX)
    waiting = [cluster.open(node, mode) for node, mode in zip(others, modes, strict=True)]
    assert all(waits(claim) for claim in waiting)
    return writer, held, waiting


def nobody_lost(cluster: HandCluster) -> bool:
    return all(node.joined.reason is None for node in cluster.hands)


@pytest.mark.parametrize("count", [62, 63, 70])
def test_shared_waiters_are_all_granted_however_many(count: int) -> None:
    """With the real bound: up to 62 in one commit."""
    assert grants_max(BOUNDS) == 62
    cluster = HandCluster(count + 1)
    writer, held, waiting = behind_a_writer(cluster, [Mode.PR] * count)
    commits = cluster.server.commits
    cluster.end(writer, held)
    cluster.pass_time(AT_ONCE_S)
    assert all(holds(claim) for claim in waiting)
    assert nobody_lost(cluster)
    # What is over is done by who made the pass, or by the first who waits; both may try.
    assert cluster.server.commits - commits <= -(-count // 62) + 1


def test_order_holds_from_one_commit_to_the_next() -> None:
    cluster = HandCluster(7, bounds=TWO_BY_TWO)
    modes = [Mode.PR, Mode.PR, Mode.PR, Mode.EX, Mode.PR, Mode.PR]
    writer, held, waiting = behind_a_writer(cluster, modes)
    cluster.end(writer, held)
    cluster.pass_time(AT_ONCE_S)
    assert [holds(claim) for claim in waiting] == [True, True, True, False, False, False]
    for node, claim in list(zip(cluster.hands[1:], waiting, strict=True))[:3]:
        cluster.end(node, claim)
    cluster.pass_time(AT_ONCE_S)
    assert [holds(claim) for claim in waiting[3:]] == [True, False, False]
    cluster.end(cluster.hands[4], waiting[3])
    cluster.pass_time(AT_ONCE_S)
    assert all(holds(claim) for claim in waiting[4:])


def test_a_conversion_goes_before_the_rest_of_a_pass() -> None:
    """A pass is interrupted: its maker is cut off, and so is the first of those who still wait. A reader
    that was granted asks for more meanwhile: conversions first, in whatever commit."""
    cluster = HandCluster(5, bounds=ONE_BY_ONE)
    writer, held, waiting = behind_a_writer(cluster, [Mode.PR] * 4)
    reader = cluster.hands[1]
    cluster.hands[2].store.cut()
    before = cluster.server.commits
    cluster.end(writer, held)
    assert cluster.loop.run_until(lambda: cluster.server.commits > before, AT_ONCE_S)
    writer.store.cut()
    cluster.pass_time()
    assert [holds(claim) for claim in waiting] == [True, False, False, False]
    converting = Claim(1000, Mode.EX, pid=waiting[0].pid)
    reader.programs[1000] = Program(converting, LOCK, reader, cluster.loop.time())
    reader.lock.open(converting)
    cluster.pass_time()
    writer.store.heal()
    cluster.pass_time(AT_ONCE_S)
    assert holds(converting)
    assert not any(holds(claim) for claim in waiting[1:])
    cluster.end(reader, converting)
    cluster.end(reader, waiting[0])
    cluster.pass_time(2 * TTL_S)
    assert all(holds(claim) for claim in waiting[2:])


def test_whoever_made_the_pass_goes_on_with_it_past_one_who_is_silent() -> None:
    """The first of those who still wait would go on, too: but its daemon is stopped or cut off."""
    cluster = HandCluster(5, bounds=ONE_BY_ONE)
    writer, held, waiting = behind_a_writer(cluster, [Mode.PR] * 4)
    cluster.hands[2].store.cut()
    cluster.end(writer, held)
    cluster.pass_time(AT_ONCE_S)
    assert [holds(claim) for claim in waiting] == [True, False, True, True]


def test_the_first_who_waits_goes_on_when_the_granter_is_gone() -> None:
    cluster = HandCluster(5, bounds=ONE_BY_ONE)
    writer, held, waiting = behind_a_writer(cluster, [Mode.PR] * 4)
    before = cluster.server.commits
    cluster.end(writer, held)
    assert cluster.loop.run_until(lambda: cluster.server.commits > before, AT_ONCE_S)
    writer.store.cut()
    cluster.pass_time(AT_ONCE_S)
    assert all(holds(claim) for claim in waiting)


def test_who_leaves_the_lock_grants_all_before() -> None:
    """A leave whose grants do not fit is not the last word of a node that nobody hears again."""
    cluster = HandCluster(5, bounds=ONE_BY_ONE)
    writer, held, waiting = behind_a_writer(cluster, [Mode.PR] * 4)
    cluster.hands[2].store.cut()
    cluster.end(writer, held)
    said = cluster.leave(writer)
    cluster.pass_time(AT_ONCE_S)
    assert said == [None]
    assert [holds(claim) for claim in waiting] == [True, False, True, True]


def test_who_leaves_after_a_death_grants_all_before() -> None:
    """It hears of an exclusive holder's death before those who wait for it, and was about to leave."""
    cluster = HandCluster(6, bounds=ONE_BY_ONE)
    leaver, dead, *others = cluster.hands
    cluster.cache(leaver, Mode.EX)
    cluster.hold(dead, Mode.EX)
    waiting = [cluster.open(node, Mode.PR) for node in others]
    for node in others:
        node.network(watch_delay_s=2.0)
    others[1].store.cut()
    (lease,) = (n for n, record in cluster.server.leases.items() if record.node == dead.name)
    dead.crash()
    cluster.server.expire(lease)
    assert cluster.loop.run_until(lambda: dead.name not in leaver.joined.members, AT_ONCE_S)
    said = cluster.leave(leaver)
    cluster.pass_time(AT_ONCE_S)
    assert said == [None]
    cluster.pass_time(2.0)
    assert [holds(claim) for claim in waiting] == [True, False, True, True]


def test_a_lost_answer_in_the_middle_of_a_pass() -> None:
    """Its outcome is unknown to the granter: a reading tells it what is left to do."""
    cluster = HandCluster(5, bounds=ONE_BY_ONE)
    writer, held, waiting = behind_a_writer(cluster, [Mode.PR] * 4)
    cluster.hands[2].store.cut()
    cluster.end(writer, held)
    before = cluster.server.commits
    assert cluster.loop.run_until(lambda: cluster.server.commits > before, AT_ONCE_S)
    writer.store.cut(up=False)
    cluster.pass_time(0.5)
    writer.store.heal()
    cluster.pass_time(5 * AT_ONCE_S)
    assert [holds(claim) for claim in waiting] == [True, False, True, True]


def test_more_trylocks_than_fit_are_refused_by_the_holder() -> None:
    """None of them waits for its own timer, which would come after 3 s."""
    cluster = HandCluster(9, bounds=TWO_BY_TWO)
    holder, *others = cluster.hands
    cluster.hold(holder, Mode.EX)
    holder.network(watch_delay_s=0.05)  # it hears of all of them at once
    for node in others:
        cluster.begin(node, Mode.EX, trying=True)
    cluster.pass_time(AT_ONCE_S)
    assert [list(node.reasons.values()) for node in others] == [[errno.ETXTBSY]] * 8
    assert nobody_lost(cluster)


def test_a_node_leaves_a_head_with_hundreds() -> None:
    """The compare that somebody left behind is alive does not grow with them."""
    cluster = HandCluster(130)
    for node in cluster.hands:
        cluster.cache(node, Mode.PR)
    for node in cluster.hands[:2]:
        said = cluster.leave(node)
        cluster.pass_time()
        assert said == [None]
    (kv,) = [kv for key, kv in cluster.server.data.items() if key.startswith(b"h/")]
    assert len(decode_head(kv).members) == 128


def test_a_head_too_long_for_mail_is_read() -> None:
    """... and nobody takes the wish that was granted for one that was taken away: a trylock neither."""
    cluster = HandCluster(7, bounds=HEADLESS)
    writer, *others = cluster.hands
    cluster.cache(writer, Mode.EX)
    tried = cluster.open(others[0], Mode.EX, trying=True)
    assert holds(tried)
    cluster.end(others[0], tried)
    held = cluster.hold(writer, Mode.EX)
    waiting = [cluster.open(node, Mode.PR) for node in others]
    cluster.end(writer, held)
    cluster.pass_time(AT_ONCE_S)
    assert all(holds(claim) for claim in waiting)
    (head,) = [kv.value for key, kv in cluster.server.data.items() if key.startswith(b"h/")]
    assert len(head) > mail_max(HEADLESS)
    # What they know of the head is whole: the next exclusive holder excludes all of them.
    for node, claim in zip(others, waiting, strict=True):
        cluster.end(node, claim)
    assert holds(cluster.open(writer, Mode.EX))


def test_a_leaver_finds_somebody_alive_among_the_dead() -> None:
    """A member that died, as the store knows and the watch has not told yet: who leaves waits for the
    news rather than leave only the dead behind, where nobody looks again."""
    cluster = HandCluster(3)
    a, b, c = cluster.hands
    for node in (a, b, c):
        cluster.cache(node, Mode.PR)
    cluster.leave(c)
    cluster.pass_time()
    b.crash()
    a.network(watch_delay_s=2.0)
    lease = next(n for n, record in cluster.server.leases.items() if record.node == "n1")
    cluster.server.expire(lease)
    said = cluster.leave(a)
    cluster.pass_time(1.0)
    assert said == []
    cluster.pass_time(5.0)
    assert said == [None]
    assert LOCK not in [key.rpartition(b"/")[2] for key in cluster.server.data]
