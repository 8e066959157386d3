"""Semaphores and elections, for threads and for asyncio alike, and `dlmfs lock --slots`."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from dlmfs.client import Election, Lock, LockLost, Semaphore, TimedOut, UsageError, aio
from tests.cli.jobs import Job
from tests.client.conftest import Twice
from tests.client.threads import awaited, begin, free, join
from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs
from tests.robust.helpers import kill
from tests.waiting.agents import holding, until, waiting

pytestmark = pytest.mark.fuse


class Kind:
    """One of the two libraries, called in the same way."""

    def __init__(self, run: Callable[[Any], Any], semaphore: Any, election: Any) -> None:
        self.run, self.semaphore, self.election = run, semaphore, election


@pytest.fixture(params=["threads", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    if request.param == "threads":
        yield Kind(lambda result: result, Semaphore, Election)
        return
    loop = asyncio.new_event_loop()
    yield Kind(loop.run_until_complete, aio.Semaphore, aio.Election)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


# -- semaphores -----------------------------------------------------------------------------------------


def test_there_are_as_many_slots_as_it_says(kind: Kind, lock: Twice) -> None:
    """Of objects on both nodes; each of them is a lock of its own."""
    have = [kind.semaphore(path, 3) for path in (lock.a, lock.b, lock.a)]
    for each in have:
        assert kind.run(each.acquire()) is True
        assert each.held
        each.check()
    assert sorted(each.slot for each in have) == [1, 2, 3]
    assert all(each.token == each.lock.token > 0 for each in have)
    one_more = kind.semaphore(lock.b, 3)
    assert kind.run(one_more.try_acquire()) is False
    with pytest.raises(TimedOut, match="no slot"):
        kind.run(one_more.acquire(timeout=0))
    with pytest.raises(TimeoutError):
        kind.run(one_more.acquire(timeout=0.1))
    assert not awaited(), "no wait is left behind"
    with pytest.raises(UsageError, match="by this object"):
        kind.run(have[0].acquire())
    slot, token = have[1].slot, have[1].token
    have[1].release()
    assert kind.run(one_more.acquire(timeout=0)) is True
    assert one_more.slot == slot
    assert one_more.token >= token
    for each in (have[0], have[2], one_more):
        each.release()
        with pytest.raises(UsageError, match="no slot"):
            each.release()
    for number in (1, 2, 3):
        assert free(lock.a.with_name(f"{lock.a.name}.{number}"))


def test_who_came_first_has_the_first_slot_that_comes_free(kind: Kind, lock: Twice) -> None:
    """Whichever of them: the first waits for all, the second for its turn; across nodes."""
    holders = [Semaphore(path, 2) for path in lock]
    for each in holders:
        each.acquire()
    order: list[str] = []

    def wait(name: str, semaphore: Any) -> None:
        semaphore.acquire()
        order.append(name)
        semaphore.release()

    def turn_is_awaited() -> bool:
        return bool(waiting(lock.b.with_name(f"{lock.b.name}.turn")))

    slots = [f"dlmfs:{lock.a.name}.{number}" for number in (1, 2)]
    first = begin(lambda: wait("first", Semaphore(lock.a, 2)))
    until(lambda: set(slots) <= set(awaited()), "it waits for both")
    second = begin(lambda: wait("second", Semaphore(lock.b, 2)))
    until(turn_is_awaited, "it waits for its turn")
    with pytest.raises(TimedOut):
        kind.run(kind.semaphore(lock.b, 2).acquire(timeout=0))
    holders[1].release()
    join(first, second)
    assert order == ["first", "second"]
    mine = kind.semaphore(lock.a, 2)
    threading.Timer(0.05, holders[0].release).start()
    others = Semaphore(lock.b, 2)
    others.acquire()
    assert kind.run(mine.acquire(timeout=PATIENCE_S)) is True
    mine.release()
    others.release()
    assert not awaited()


def test_a_block_ends_with_the_loss_of_its_slot(nodes: Nodes) -> None:
    a = nodes.mount("a")

    async def main() -> None:
        async with aio.Semaphore(a / "dom/x", 2):
            await asyncio.to_thread(kill, a)
            await asyncio.sleep(PATIENCE_S)

    with pytest.raises(LockLost):
        asyncio.run(main())
    a = nodes.mount("a")
    with pytest.raises(LockLost), Semaphore(a / "dom/x", 2) as slot:
        kill(a)
        assert slot.lock is not None
        assert slot.lock.wait_lost(PATIENCE_S)
        with pytest.raises(LockLost):
            slot.check()


@pytest.mark.parametrize("slots", [0, -1, 257, 2.0])
def test_a_number_of_slots_that_is_none(kind: Kind, slots: int) -> None:
    with pytest.raises(UsageError, match="1 to 256"):
        kind.semaphore("jobs/x", slots)


def test_the_command_and_the_library_share_the_slots(lock: Twice) -> None:
    with Semaphore(lock.a, 2) as mine:
        job = Job("--slots", 2, lock.b, "-c", 'echo "$DLMFS_SLOT $DLMFS_LOCK"; read _')
        try:
            slot, path = job.line().split()
            assert {int(slot), mine.slot} == {1, 2}
            assert path == f"{lock.b}.{slot}"
            for words in (["-n"], ["-w", "0.2"]):
                done = dlmfs("lock", *words, "--slots", "2", str(lock.b), "true", check=False)
                assert (done.returncode, done.stderr) == (1, "")
            waiter = Job("--slots", 2, lock.b, "-c", "echo $DLMFS_TOKEN")
            try:
                turn = lock.b.with_name(f"{lock.b.name}.turn")
                until(lambda: bool(holding(turn)), "it is the next")
                job.close()
                assert int(waiter.line()) > 0
                assert waiter.over() == (0, "")
            finally:
                waiter.close()
        finally:
            job.close()
    ended = Job("--slots", 1, lock.a, "-c", "echo has; sleep 1000")
    try:
        assert ended.line() == "has"
        os.kill(ended.process.pid, signal.SIGTERM)  # passed on to the command, which heeds it
        assert ended.over()[0] == 128 + signal.SIGTERM
    finally:
        ended.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [("--slots 0", "1 to 256"), ("--slots x", "1 to 256"), ("-s --slots 2", "goes without -s")],
)
def test_slots_that_are_none(lock: Twice, words: str, says: str) -> None:
    done = dlmfs("lock", *words.split(), str(lock.a), "true", check=False)
    assert done.returncode == 64
    assert says in done.stderr


# -- elections ------------------------------------------------------------------------------------------


def test_one_leads_and_all_know_who(kind: Kind, lock: Twice) -> None:
    first, second = kind.election(lock.a, "first"), kind.election(lock.b, "second")
    assert kind.run(first.leader()) is None
    assert kind.run(first.campaign()) is True
    assert kind.run(second.campaign(blocking=False)) is False
    with pytest.raises(TimedOut):
        kind.run(second.campaign(timeout=0.05))
    for each in (first, second):
        assert kind.run(each.leader()) == "first"
    assert first.held
    first.check()
    token = first.token
    first.resign()
    assert kind.run(second.leader()) is None
    assert kind.run(second.campaign(timeout=0)) is True
    assert kind.run(first.leader()) == "second"
    assert second.token > token
    second.resign()


def test_run_leads_for_as_long_as_the_work_takes(lock: Twice) -> None:
    other = Election(lock.b, "b")
    assert Election(lock.a, "a").run(lambda lead: (lead.token > 0, other.leader())) == (True, "a")
    assert other.leader() is None

    async def work(lead: aio.Election) -> tuple[bool, str | None]:
        return lead.held, await aio.Election(lock.b, "b").leader()

    assert asyncio.run(aio.Election(lock.a, "a").run(work)) == (True, "a")


def test_a_late_word_of_a_former_leader_is_not_believed(lock: Twice) -> None:
    """It was paused between its election and its word, and another has been elected since."""
    former, leader = Election(lock.a, "former"), Election(lock.b, "leader")
    with former.lock:
        token = former.lock.token
    with leader:
        assert former.leader() == "leader"
        with pytest.raises(UsageError):
            former._announce()
        believes = mock.Mock(spec=Lock, token=token)  # it has not heard that it is none any more
        former.lock = believes
        former._announce()
        believes.check.assert_called_once_with()
        assert leader.leader() == "leader"
        assert Election(lock.a).leader() == "leader"


def test_names_of_candidates(lock: Twice) -> None:
    assert str(os.getpid()) in Election(lock.a).name
    with pytest.raises(UsageError, match="43 bytes"):
        Election(lock.a, "n" * 44)


def test_a_leader_that_is_lost(nodes: Nodes) -> None:
    a, b = nodes.pair()
    with pytest.raises(LockLost), Election(a / "dom/x", "a") as lead:
        kill(a)
        assert lead.lock.wait_lost(PATIENCE_S)
        with pytest.raises(LockLost):
            lead.check()
        with Election(b / "dom/x", "b", timeout=PATIENCE_S) as next_one:
            assert next_one.leader() == "b"
