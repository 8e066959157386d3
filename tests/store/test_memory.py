"""The memory store's faults, each on command."""

from __future__ import annotations

import pytest

from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown, StoreFull, Unavailable
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Delete, Get, Put, Txn, WatchBatch, WatchGap
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_session import MemorySession
from dlmfs.store.memory_store import Faults, MemoryStore

WRITE = Txn((), (Put(b"a", b"1"),))


class World:
    """A server with one handle and one watch on everything."""

    def __init__(self) -> None:
        self.loop = SimLoop()
        self.server = MemoryServer(self.loop, start_revision=100)
        self.faults = Faults()
        self.store = MemoryStore(self.server, faults=self.faults)
        self.answers: list[object] = []
        self.seen: list[WatchBatch | WatchGap] = []

    def watch(self) -> None:
        self.store.watch([b""], self.server.revision + 1, self.seen.append)

    def session(self, ttl_s: float = 10.0) -> tuple[MemorySession, list[DlmfsError]]:
        lost: list[DlmfsError] = []
        opened: list[object] = []
        self.store.open_session("n", ttl_s, lost.append, opened.append)
        assert self.loop.run_until(lambda: bool(opened))
        assert isinstance(opened[0], MemorySession)
        return opened[0], lost

    def revisions(self) -> list[int]:
        return [batch.revision for batch in self.seen if isinstance(batch, WatchBatch)]


@pytest.fixture
def world() -> World:
    return World()


def test_a_request_is_applied_after_its_sender_was_told_unknown(world: World) -> None:
    world.faults.apply_late = 1.0
    world.store.txn(WRITE, world.answers.append)
    assert world.loop.run_until(lambda: bool(world.answers))
    assert isinstance(world.answers[0], OutcomeUnknown)
    assert b"a" not in world.server.data
    assert world.loop.run_until(lambda: b"a" in world.server.data)
    world.loop.run_for(60)
    assert len(world.answers) == 1
    assert world.server.commits == 1


def test_a_lost_answer_was_applied(world: World) -> None:
    world.faults.lose_answer = 1.0
    world.store.txn(WRITE, world.answers.append)
    assert world.loop.run_until(lambda: bool(world.answers))
    assert isinstance(world.answers[0], OutcomeUnknown)
    assert world.server.data[b"a"].value == b"1"
    world.loop.run_for(60)
    assert len(world.answers) == 1


def test_a_lost_request_was_not_applied(world: World) -> None:
    world.faults.lose_request = 1.0
    world.store.txn(WRITE, world.answers.append)
    world.loop.run_for(60)
    assert [type(answer) for answer in world.answers] == [OutcomeUnknown]
    assert world.server.commits == 0


def test_a_full_store_takes_nothing_but_answers_reads(world: World) -> None:
    world.faults.full = True
    world.store.txn(WRITE, world.answers.append)
    world.store.txn(Txn((), (Get(b"a"),)), world.answers.append)
    world.loop.run_for(1)
    assert sorted(type(answer).__name__ for answer in world.answers) == ["StoreFull", "TxnResult"]
    assert any(isinstance(answer, StoreFull) for answer in world.answers)
    assert world.server.commits == 0


def test_cut_and_heal_leave_no_gap(world: World) -> None:
    world.watch()
    for _ in range(5):
        world.server.apply(WRITE)
        world.loop.run_for(1)
    world.store.cut()
    for _ in range(5):
        world.server.apply(WRITE)
        world.loop.run_for(1)
    assert world.revisions() == list(range(101, 106))
    world.store.txn(WRITE, world.answers.append)
    world.loop.run_for(60)
    assert isinstance(world.answers[0], OutcomeUnknown)
    assert world.server.revision == 110
    world.store.heal()
    world.loop.run_for(60)
    assert world.revisions() == list(range(101, 111))
    world.server.apply(WRITE)
    world.loop.run_for(60)
    assert world.revisions() == list(range(101, 112))


def test_a_cut_node_cannot_open_a_session(world: World) -> None:
    world.store.cut()
    world.store.open_session("n", 10.0, lambda _reason: None, world.answers.append)
    assert not world.answers
    world.loop.run_for(60)
    assert [type(answer) for answer in world.answers] == [Unavailable]


def test_an_expired_lease_is_lost_with_all_its_keys_in_one_revision(world: World) -> None:
    session, lost = world.session()
    leased = (Put(b"a", b"", session.lease), Put(b"b", b"", session.lease), Put(b"c", b""))
    world.server.apply(Txn((), leased))
    world.watch()
    world.loop.run_for(60)
    assert not lost
    assert not world.seen
    world.server.expire(session.lease)
    world.server.expire(session.lease)
    world.loop.run_for(60)
    assert len(lost) == 1
    (batch,) = world.seen
    assert isinstance(batch, WatchBatch)
    assert [(event.kind, event.kv.key) for event in batch.events] == [
        ("delete", b"a"),
        ("delete", b"b"),
    ]
    assert {event.kv.mod_revision for event in batch.events} == {batch.revision}
    assert set(world.server.data) == {b"c"}
    with pytest.raises(LockLost):
        world.server.apply(Txn((), (Delete(b"c"), Put(b"d", b"", session.lease))))
    assert set(world.server.data) == {b"c"}


def test_a_cut_nodes_lease_runs_out_after_its_deadline(world: World) -> None:
    session, lost = world.session(ttl_s=10.0)
    world.server.apply(Txn((), (Put(b"a", b"", session.lease),)))
    world.loop.run_for(7)
    assert session.renewed_at is not None
    world.store.cut()
    deadline = session.renewed_at + session.ttl_s
    assert world.loop.run_until(lambda: b"a" not in world.server.data)
    assert world.loop.time() >= deadline
    assert not lost
    world.store.heal()
    world.loop.run_for(60)
    assert len(lost) == 1


def test_a_closed_session_is_not_lost(world: World) -> None:
    session, lost = world.session()
    session.close(world.answers.append)
    assert not world.answers
    world.loop.run_for(60)
    assert world.answers == [None]
    assert not lost


def test_nothing_calls_back_after_a_crash(world: World) -> None:
    session, lost = world.session()
    world.server.apply(Txn((), (Put(b"leased", b"", session.lease),)))
    world.watch()
    world.store.txn(WRITE, world.answers.append)
    world.store.crash()
    world.loop.run_for(60)
    assert not world.answers
    assert not world.seen
    assert not lost
    assert b"leased" not in world.server.data


def test_compaction_ends_a_watch_that_fell_behind(world: World) -> None:
    world.watch()
    world.store.cut()
    for _ in range(5):
        world.server.apply(WRITE)
    world.server.compact(103)
    world.store.heal()
    world.loop.run_for(60)
    world.server.apply(WRITE)
    world.loop.run_for(60)
    assert world.seen == [WatchGap(104)]
    world.store.watch([b""], 104, world.seen.append)
    world.loop.run_for(60)
    assert world.revisions() == [104, 105, 106]
