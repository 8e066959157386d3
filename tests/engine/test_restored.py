"""A store that went back, on the simulated clock: what each node finds, does, and gives as tokens."""

from __future__ import annotations

import json

import pytest

from dlmfs.core.events import Claim, Stage
from dlmfs.core.lease import LeaseState
from dlmfs.core.timeline import KEPT
from dlmfs.core.tokens import BASE_MAX, ROOM
from dlmfs.engine import changes
from dlmfs.engine.forgetting import leave_unused
from dlmfs.engine.timeline import OFFSET, QUARANTINE, STAMP, decode_stamp, encode_stamp
from dlmfs.errors import OutcomeUnknown
from dlmfs.model import Mode
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Look, Put, Txn, TxnDone
from dlmfs.store.memory import MemoryServer, Snapshot
from dlmfs.timing import Timing
from tests.engine.test_lease import TTL_S, Node, run

RENEWAL_S = Timing(TTL_S).renew_every_s
pytestmark = pytest.mark.allow_warnings


@pytest.fixture
def loop() -> SimLoop:
    return SimLoop()


@pytest.fixture
def server(loop: SimLoop) -> MemoryServer:
    return MemoryServer(loop, start_revision=100)


def start(server: MemoryServer, *names: str) -> list[Node]:
    nodes = [Node(server, name).start() for name in names]
    for node in nodes:
        node.join()
    return nodes


def held(loop: SimLoop, node: Node, fh: int, mode: Mode = Mode.EX) -> int:
    """The node has the lock, and gave the open a token."""
    claim = node.open(fh, mode)
    run(loop, lambda: claim.stage is not Stage.WAITING)
    assert claim.stage is Stage.HELD
    return claim.token


def restore(
    server: MemoryServer, copy: Snapshot, nodes: list[Node], *, bump: int = 0, others: int = 0
) -> None:
    """`others`: commits of another tenant before anybody looks."""
    server.restore(copy, bump=bump, term=server.term)
    for _ in range(others):
        server.apply(Txn((), (Put(b"tenant", b""),)))
    for node in nodes:
        node.store.restarted()


def healthy(node: Node) -> bool:
    return node.member.state is LeaseState.HEALTHY


WAYS: dict[str, dict[str, int]] = {
    "plain": {},
    "bumped": {"bump": 10**9},
    "written": {"others": 300},
}


@pytest.mark.parametrize("way", WAYS)
def test_all_are_fenced_come_back_after_a_lease_time_and_tokens_grow(
    server: MemoryServer, loop: SimLoop, way: str
) -> None:
    a, b, idle = nodes = start(server, "a", "b", "c")
    loop.run_for(3 * RENEWAL_S)  # the copy has a stamp, an earlier one
    copy = server.snapshot()
    assert STAMP in copy.data
    for _ in range(200):  # so that what comes after the restore has smaller revisions
        server.apply(Txn((), (Put(b"tenant", b""),)))
    tokens = [held(loop, a, 1)]
    loop.run_for(3 * RENEWAL_S)  # b and c, which do nothing, have seen a stamp by now
    restore(server, copy, nodes, **WAYS[way])
    begun = loop.time()
    for node in nodes:
        run(loop, lambda node=node: node.member.fences == 1, 1.0)  # type: ignore[misc]
        assert "went back" in str(node.member.reason)
    run(loop, lambda: any(healthy(node) for node in nodes))
    assert loop.time() - begun >= TTL_S, "one of before may serve still"
    run(loop, lambda: all(healthy(node) and node.back for node in nodes))
    for number, node in enumerate((b, a, idle)):
        tokens.append(held(loop, node, 10 + number))
        node.member.spaces[b"d"].lock(b"x").close(node.granted_to[-1])
    assert tokens == sorted(set(tokens))
    assert all(node.member.fences == 1 for node in nodes)
    assert QUARANTINE not in server.data


def test_who_has_what_the_copy_has_not_knows_without_a_stamp(
    server: MemoryServer, loop: SimLoop
) -> None:
    """Granted a moment before the server stops: by the head; and the other hears of it from there."""
    a, b = nodes = start(server, "a", "b")
    loop.run_for(3 * RENEWAL_S)
    copy = server.snapshot()
    held(loop, a, 1)
    restore(server, copy, nodes, bump=10**9)
    run(loop, lambda: a.member.fences == 1, 1.0)
    assert "the lock d/x" in str(a.member.reason)
    assert b.member.fences == 0, "it has nothing to know it by"
    run(loop, lambda: b.member.fences == 1, 2 * RENEWAL_S)
    assert "another node" in str(b.member.reason)


def test_a_value_that_the_copy_has_not_is_missed(server: MemoryServer, loop: SimLoop) -> None:
    """The grant is in the copy, what was written under it is not."""
    a, _ = nodes = start(server, "a", "b")
    held(loop, a, 1)
    loop.run_for(0.1)
    copy = server.snapshot()
    written: list[object] = []
    a.member.spaces[b"d"].lock(b"x").write_lvb(0, b"precious", written.append)
    run(loop, lambda: written == [None])
    restore(server, copy, nodes, bump=10**9)
    run(loop, lambda: a.member.fences == 1, 1.0)
    assert "the lock d/x" in str(a.member.reason)


def test_a_value_is_missed_though_another_has_changed_the_head_since(
    server: MemoryServer, loop: SimLoop
) -> None:
    """So that its revision is larger than that of what was lost."""
    (a,) = start(server, "a")
    held(loop, a, 1)
    loop.run_for(0.1)
    copy = server.snapshot()
    written: list[object] = []
    lock = a.member.spaces[b"d"].lock(b"x")
    lock.write_lvb(0, b"precious", written.append)
    run(loop, lambda: written == [None])
    server.restore(copy, bump=10**9, term=server.term)
    head = lock.space.keys.head(b"x")
    server.apply(Txn((), (Put(head, server.data[head].value.replace(b",0]", b",%d]" % 103)),)))
    a.store.restarted()
    run(loop, lambda: a.member.fences == 1, 1.0)
    assert "the lock d/x" in str(a.member.reason)


def test_what_a_node_took_away_must_not_come_back(server: MemoryServer, loop: SimLoop) -> None:
    """A lock was left, and the copy has this node in its head: others would wait for it for ever."""
    a, b = nodes = start(server, "a", "b")
    held(loop, a, 1)
    lock = a.member.spaces[b"d"].lock(b"x")
    lock.close(a.granted_to[-1])
    loop.run_for(3 * RENEWAL_S)
    copy = server.snapshot()
    left: list[object] = []
    lock.forget(left.append)
    run(loop, lambda: left == [None])
    a.member.spaces[b"d"].drop(b"x")
    restore(server, copy, nodes, bump=10**9)
    run(loop, lambda: a.member.fences == 1, 1.0)
    assert "is there again" in str(a.member.reason)
    run(loop, lambda: healthy(b) and bool(b.back))
    held(loop, b, 2)


def test_what_the_watch_told_of_others_is_read_anew(server: MemoryServer, loop: SimLoop) -> None:
    """Of a member that the store forgot, and of one that took its revision: neither may be mistaken."""
    a, b = start(server, "a", "b")
    held(loop, a, 1, Mode.PR)
    loop.run_for(3 * RENEWAL_S)
    copy = server.snapshot()
    c = Node(server, "c").start()
    c.join()
    loop.run_for(0.1)
    assert "c" in a.member.spaces[b"d"].members
    c.store.crash()
    restore(server, copy, [a, b], others=300)
    run(loop, lambda: healthy(a) and "c" not in a.member.spaces[b"d"].members)
    assert a.member.fences == 0


def test_a_lost_connection_alone_harms_nothing_and_nothing_is_served_before_the_look(
    server: MemoryServer, loop: SimLoop
) -> None:
    a, b = start(server, "a", "b")
    held(loop, a, 1, Mode.PR)
    lock = a.member.spaces[b"d"].lock(b"x")
    a.store.faults.delay_s = 0.5
    a.store.broken(a.store.connection)
    assert a.member.state is LeaseState.UNPROVED
    again, other = a.open(2, Mode.PR), b.open(3, Mode.PR)
    values: list[bytes] = []
    lock.read_lvb(values.append)
    run(loop, lambda: other.stage is Stage.HELD)
    loop.run_for(0.01)
    assert again.stage is Stage.WAITING
    assert not values
    run(loop, lambda: again.stage is Stage.HELD and bool(values))
    assert healthy(a)
    assert a.member.fences == 0


def test_a_trylock_of_a_cached_lock_is_answered_while_nothing_is_proved(
    server: MemoryServer, loop: SimLoop
) -> None:
    (a,) = start(server, "a")
    held(loop, a, 1)
    a.store.cut()
    a.store.broken(a.store.connection)
    trying = Claim(3, Mode.EX, trying=True, pid=3)
    assert not a.member.spaces[b"d"].lock(b"x").open(trying)
    run(loop, lambda: bool(a.failed_with), Timing(TTL_S).try_timeout_s + 0.1)
    assert trying.stage is Stage.ENDED


def test_many_stampings_while_one_was_away_are_no_proof(
    server: MemoryServer, loop: SimLoop
) -> None:
    """Then each head is proved by itself, and nobody is fenced."""
    a, b = start(server, "a", "b")
    held(loop, a, 1)
    loop.run_for(3 * RENEWAL_S)
    kv = server.data[STAMP]
    stamp = decode_stamp(kv)
    for number in range(KEPT + 5):
        stamp = stamp.next(f"often.{number}")
    server.apply(Txn((), (Put(STAMP, encode_stamp(stamp)),)))
    for node in (a, b):
        node.store.broken(node.store.connection)
    run(loop, lambda: healthy(a) and healthy(b))
    loop.run_for(2 * TTL_S)
    assert [a.member.fences, b.member.fences] == [0, 0]


def test_stamps_are_one_for_all_and_none_while_nothing_happens(
    server: MemoryServer, loop: SimLoop
) -> None:
    nodes: list[Node] = []
    for name in "abcdefgh":
        nodes += start(server, name)
        loop.run_for(RENEWAL_S / 8)  # not all at once
    loop.run_for(3 * RENEWAL_S)
    at_rest = server.revision
    loop.run_for(20 * RENEWAL_S)
    assert server.revision == at_rest, "an idle lock space fills the store"

    def stamps() -> int:
        return decode_stamp(server.data[STAMP]).number

    before = stamps()
    for number in range(200):
        node = nodes[number % len(nodes)]
        node.member.spaces[b"d"].lock(b"%d" % number).open(Claim(1000 + number, Mode.EX))
        loop.run_for(RENEWAL_S / 10)
    assert 5 <= stamps() - before <= 21


@pytest.mark.parametrize("garbage", [b"", b"null", b'{"v":1,"n":"x","names":[]}', b"[" * 5000])
def test_a_stamp_put_by_hand_harms_nothing(
    server: MemoryServer, loop: SimLoop, garbage: bytes
) -> None:
    (a,) = start(server, "a")
    held(loop, a, 1)
    loop.run_for(3 * RENEWAL_S)
    server.apply(Txn((), (Put(STAMP, garbage),)))
    loop.run_for(TTL_S)
    a.store.broken(a.store.connection)
    loop.run_for(TTL_S)
    assert healthy(a)
    assert a.member.fences == 0


@pytest.mark.parametrize(
    "garbage", [b"", b"[" * 5000, b'{"v":1,"offset":-1}', b'{"v":1,"offset":1,"before":3}']
)
def test_an_offset_put_by_hand_stops_only_who_begins(
    server: MemoryServer, loop: SimLoop, garbage: bytes
) -> None:
    (a,) = start(server, "a")
    held(loop, a, 1)
    server.apply(Txn((), (Put(OFFSET, garbage),)))
    loop.run_for(2 * TTL_S)
    assert healthy(a)
    b = Node(server, "b").start()
    assert "is no offset of dlmfs" in str(b.error)
    server.apply(Txn((), (Put(OFFSET, b'{"v":1,"offset":5}'),)))
    run(loop, lambda: a.member.fences == 1)  # as another node's word
    run(loop, lambda: healthy(a) and bool(a.back))
    assert held(loop, a, 2) >> 16 > 100 + 5


def test_tokens_that_would_not_fit_are_refused_in_words(
    server: MemoryServer, loop: SimLoop
) -> None:
    offset = BASE_MAX - ROOM // 2
    server.apply(Txn((), (Put(OFFSET, b'{"v":1,"offset":%d}' % offset),)))
    (a,) = start(server, "a")
    copy = server.snapshot()
    token = held(loop, a, 1)
    restore(server, copy, [a], bump=10)
    loop.run_for(3 * TTL_S)
    assert a.member.fences == 1
    assert "63 bits" in str(a.member.reason)
    assert a.member.state is LeaseState.FENCED
    server.apply(Txn((), (Put(OFFSET, b'{"v":1,"offset":%d}' % (offset + 1000)),)))
    run(loop, lambda: healthy(a) and bool(a.back))
    assert token < held(loop, a, 2) < 1 << 63


def test_a_node_mounted_in_the_quarantine_waits_for_its_end(
    server: MemoryServer, loop: SimLoop
) -> None:
    (a,) = start(server, "a")
    copy = server.snapshot()
    held(loop, a, 1)
    restore(server, copy, [a])
    run(loop, lambda: QUARANTINE in server.data)
    begun = loop.time()
    fresh = Node(server, "b").start()
    assert fresh.error is None
    assert loop.time() - begun >= TTL_S
    assert QUARANTINE not in server.data
    fresh.join()
    assert held(loop, fresh, 2) >> 16 > ROOM


def test_the_quarantine_is_as_long_as_the_longest_lease(
    server: MemoryServer, loop: SimLoop
) -> None:
    a, b = start(server, "a", "b")
    server.apply(Txn((), (Put(b"n/slow", b'{"v":1,"ttl":100.0}'),)))
    copy = server.snapshot()
    held(loop, a, 1)
    restore(server, copy, [a, b])
    begun = loop.time()
    run(loop, lambda: a.member.fences == 1)
    run(loop, lambda: healthy(a), 300.0)
    assert loop.time() - begun >= 200.0


def test_a_quarantine_committed_late_covers_who_looked_before(
    server: MemoryServer, loop: SimLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from the grant of its lease, and ended with the commit, or a moment later."""
    (a,) = start(server, "a")
    copy = server.snapshot()
    held(loop, a, 1)
    send = a.store.txn

    def late(txn: Txn, done: TxnDone) -> None:
        puts = any(isinstance(each, Put) and each.key == QUARANTINE for each in txn.then)
        loop.call_later(0.9 * TTL_S if puts else 0.0, send, txn, done)

    monkeypatch.setattr(a.store, "txn", late)
    restore(server, copy, [a])
    run(loop, lambda: QUARANTINE in server.data)
    begun = loop.time()
    run(loop, lambda: QUARANTINE not in server.data)
    assert loop.time() - begun >= TTL_S
    run(loop, lambda: healthy(a))


def test_restored_while_a_node_had_no_session(server: MemoryServer, loop: SimLoop) -> None:
    """Cut off and fenced, it remembers the stamp: it must not begin where it would give old tokens."""
    a, b = start(server, "a", "b")
    loop.run_for(3 * RENEWAL_S)
    copy = server.snapshot()
    assert STAMP in copy.data
    token = held(loop, a, 1)
    loop.run_for(3 * RENEWAL_S)
    a.store.cut()
    b.store.cut()
    run(loop, lambda: a.member.fences == 1 and b.member.fences == 1)
    restore(server, copy, [], others=300)
    a.store.heal()
    b.store.heal()
    run(loop, lambda: healthy(a) and healthy(b) and bool(a.back) and bool(b.back))
    assert server.data[OFFSET]
    assert held(loop, b, 2) > token


def test_restored_twice(server: MemoryServer, loop: SimLoop) -> None:
    a, _ = nodes = start(server, "a", "b")
    copy = server.snapshot()
    tokens = []
    for number in range(3):
        tokens.append(held(loop, a, 10 + number))
        a.member.spaces[b"d"].lock(b"x").close(a.granted_to[-1])
        loop.run_for(3 * RENEWAL_S)
        restore(server, copy, nodes, others=20 * number)
        run(loop, lambda: all(node.member.fences > number for node in nodes))  # noqa: B023
        run(loop, lambda: all(healthy(node) for node in nodes))
        loop.run_for(1.0)
    assert tokens == sorted(set(tokens))
    assert json.loads(server.data[OFFSET].value)["before"] == []


# -- what is under way when the connection is lost --------------------------------------------------


def test_an_unlink_whose_answer_was_lost_is_no_restore(server: MemoryServer, loop: SimLoop) -> None:
    """The head is gone by our own hand, and we do not know it yet."""
    a, _ = start(server, "a", "b")
    held(loop, a, 1)
    lock = a.member.spaces[b"d"].lock(b"x")
    lock.close(a.granted_to[-1])
    head = lock.space.keys.head(b"x")
    a.store.faults.delay_s = 0.5
    said: list[object] = []
    lock.forget(said.append)
    run(loop, lambda: head not in server.data)
    assert not said
    a.store.broken(a.store.connection)
    run(loop, lambda: said == [None])
    loop.run_for(TTL_S)
    assert a.member.fences == 0


def test_a_leave_unasked_whose_answer_was_lost_is_no_restore(
    server: MemoryServer, loop: SimLoop
) -> None:
    """Nobody used the lock; by the next attempt all is as it should be."""
    a, _ = start(server, "a", "b")
    held(loop, a, 1)
    lock = a.member.spaces[b"d"].lock(b"x")
    lock.close(a.granted_to[-1])
    head = lock.space.keys.head(b"x")
    a.store.faults.delay_s = 0.5
    said: list[object] = []
    leave_unused(lock, lambda: said.append(None))
    run(loop, lambda: head not in server.data)
    assert not said
    a.store.broken(a.store.connection)
    loop.run_for(TTL_S)
    assert a.member.fences == 0
    leave_unused(lock, lambda: said.append(None))
    assert said == [None]


def test_a_conversion_granted_by_mail_without_the_head_is_no_restore(
    server: MemoryServer, loop: SimLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost before the head is read, by which alone the grant is known."""
    monkeypatch.setattr(changes, "mail_max", lambda _bounds: 0)
    a, b = start(server, "a", "b")
    held(loop, a, 1, Mode.PR)
    held(loop, b, 2, Mode.PR)
    a.open(3, Mode.EX)
    lock = a.member.spaces[b"d"].lock(b"x")
    run(loop, lambda: lock.view.wish is not None)
    monkeypatch.setattr(a.store, "txn", lambda _txn, _done: None)
    lock.space.revive()  # answered late: nothing is asked until then
    b.member.spaces[b"d"].lock(b"x").close(b.granted_to[0])
    run(loop, lambda: lock.view.wish is None)
    a.store.broken(a.store.connection)
    loop.run_for(TTL_S)
    assert a.member.fences == 0


def test_who_had_a_write_under_way_knows_of_its_grant_all_the_same(
    server: MemoryServer, loop: SimLoop
) -> None:
    """The lock was granted to another since, so its head is a newer one, and may tell of our write."""
    a, b = start(server, "a", "b")
    loop.run_for(3 * RENEWAL_S)
    copy = server.snapshot()
    held(loop, a, 1)
    a.store.cut()
    a.member.spaces[b"d"].lock(b"x").write_lvb(0, b"value", lambda _error: None)
    loop.run_for(0.01)
    restore(server, copy, [b], bump=10**9)
    held(loop, b, 2)
    a.store.broken(a.store.connection)
    a.store.heal()
    run(loop, lambda: a.member.fences == 1, 1.0)
    assert "the lock d/x" in str(a.member.reason)


def test_a_look_through_two_connections_proves_nothing(server: MemoryServer, loop: SimLoop) -> None:
    """It was begun while all was well and asked for no head; then the connection was given up, and the
    rest was read through the next one, in a store that went back and has a later stamp by now."""
    a, b = start(server, "a", "b")
    held(loop, b, 1)
    b.member.spaces[b"d"].lock(b"x").close(b.granted_to[0])
    loop.run_for(5 * RENEWAL_S)
    copy = server.snapshot()
    held(loop, a, 2)
    timeline = a.member.timeline
    assert list(timeline.keys()) == []
    server.restore(copy, bump=10**9, term=server.term)
    stamp = decode_stamp(server.data[STAMP]).next("other.1")
    server.apply(Txn((), (Put(STAMP, encode_stamp(stamp)),)))
    a.store.broken(a.store.connection)
    look = Look(mine=True, timeline=(server.data[STAMP],), found=(), revision=server.revision)
    assert isinstance(timeline.judge(look), OutcomeUnknown)
    run(loop, lambda: a.member.fences == 1, 1.0)


def test_a_look_begun_before_there_was_anything_to_prove_proves_nothing(
    server: MemoryServer, loop: SimLoop
) -> None:
    """The connection is lost at once, and the session is begun while the look is under way."""
    (a,) = start(server, "a")
    timeline = a.member.timeline
    timeline.doubt()
    timeline._begun = False
    assert list(timeline.keys()) == []
    timeline._begun = True
    look = Look(mine=True, timeline=(), found=(), revision=server.revision)
    assert isinstance(timeline.judge(look), OutcomeUnknown)
