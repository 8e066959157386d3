"""Signals, stops and debuggers that meet a waiting open (promise 7), and the place that a retried
open keeps in the queue (docs/reference.md, "Signals").

FUSE cannot restart an open: each of them makes open(2) return EINTR, also with SA_RESTART and also
where no handler runs (fuse-notes 4). What dlmfs can do is to keep the place for a second.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from dlmfs.fs.places import KEPT_S
from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import (
    EX,
    PR,
    TRY,
    at_rest,
    holding,
    info,
    until,
    waiting,
    wanting,
    wished,
)
from tests.waiting.conftest import Cluster, MakeAgent

pytestmark = pytest.mark.fuse

PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 16, 17, 0x4206, 0x4207
WALL = 0x40000000


class Where(NamedTuple):
    """Who is where: the holder, the waiter that gets a signal, the one behind it."""

    owner: str
    holder: str
    first: str
    second: str


# Under owner=node the processes of a node do not exclude each other: there the one behind must be
# on another node than the first, and the first on another one than the holder.
PLACES = [
    Where("node", "a", "b", "c"),
    Where("node", "a", "b", "a"),
    Where("file", "a", "b", "a"),
    Where("file", "a", "b", "b"),
    Where("file", "a", "a", "a"),
    Where("file", "a", "a", "b"),
]


FEW = [PLACES[n] for n in (0, 1, 3, 5)]


class Queue:
    """A held lock and two that wait for it, in this order."""

    def __init__(
        self,
        cluster: Cluster,
        agent: MakeAgent,
        where: Where,
        *,
        how: str = "once",
        timer_s: float = 0,
    ) -> None:
        self.where = where
        self.paths = cluster.lock(where.owner, where.holder + where.first + where.second)
        self.holder, self.first, self.second = agent(), agent(), agent()
        self.holder.opens("h", self.paths[0], EX)
        if timer_s:
            self.first.tell("timer", timer_s)
            self.first.expect("set")
        self.first.waits("1", self.paths[1], EX, how=how)
        if where.first != where.holder:
            # Its node's wish must be known at the holder's before the other one comes there.
            path = self.paths[0]
            until(lambda: where.first in wanting(path), "the first's wish is known to the holder")
        self.second.waits("2", self.paths[2], EX)

    def release(self) -> None:
        self.holder.close("h")

    def in_order(self) -> None:
        """The first is granted, then the second, with a larger token."""
        self.release()
        one = self.first.held("1")
        assert self.second.said_nothing(), "the one behind was granted before"
        self.first.close("1")
        assert self.second.held("2") > one

    def order_kept(self) -> bool:
        """As `in_order`; False if the second was granted first."""
        self.release()
        deadline = time.monotonic() + PATIENCE_S
        while not (line := self.first.line(0.01)).startswith("held"):
            assert time.monotonic() < deadline, "neither was granted"
            if not line and self.second.line(0).startswith("held"):
                return False
        assert self.second.said_nothing(), "the one behind was granted too"
        self.first.close("1")
        assert self.second.held("2") > int(line.split()[2])
        return True

    def overtaken(self) -> None:
        """The second is granted; the first is no longer in the queue or comes after it."""
        self.release()
        self.second.held("2")


def keeps_its_place(
    cluster: Cluster,
    agent: MakeAgent,
    where: Where,
    disturb: Callable[[Queue], None],
    *,
    how: str = "retry",
    timer_s: float = 0,
) -> None:
    """The first is granted first although it is disturbed. A machine so busy that this took longer
    than a place is kept has shown nothing; then once more."""
    for _ in range(5):
        queue = Queue(cluster, agent, where, how=how, timer_s=timer_s)
        begin = time.monotonic()
        disturb(queue)
        if queue.order_kept():
            return
        assert time.monotonic() - begin > KEPT_S, "the one behind was granted before"
    pytest.fail("never undisturbed for a second")


def signalled(queue: Queue) -> None:
    queue.first.signal()
    queue.first.expect("signal", but="")


@pytest.fixture(params=PLACES, ids=lambda w: f"{w.owner}-{w.holder}{w.first}{w.second}")
def where(request: pytest.FixtureRequest) -> Where:
    place: Where = request.param
    return place


# -- the open that ends -------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True], ids=["plain", "SA_RESTART"])
def test_a_signal_ends_the_wait_with_eintr(
    cluster: Cluster, agent: MakeAgent, *, restart: bool
) -> None:
    """Also with SA_RESTART, where the real dlmfs would go on (but it cannot be interrupted)."""
    for places in ("ab", "aa"):
        here, there = cluster.lock("file", places)
        holder, waiter = agent(), agent()
        holder.opens("h", here, EX)
        if restart:
            waiter.tell("restart")
            waiter.expect("set")
        waiter.waits("w", there, EX)
        waiter.signal()
        assert waiter.fails("w") == errno.EINTR
        holder.close("h")


def test_an_ignored_signal_does_not_end_the_wait(cluster: Cluster, agent: MakeAgent) -> None:
    """Neither one that the program ignores nor one that is ignored by default."""
    here, there = cluster.lock("node", "ab")
    holder, waiter = agent(), agent()
    holder.opens("h", here, EX)
    waiter.tell("ignore")
    waiter.expect("set")
    waiter.waits("w", there, EX)
    for number in (signal.SIGUSR1, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT):
        waiter.signal(number)
    holder.close("h")
    waiter.held("w")


@pytest.mark.parametrize("where", FEW, indirect=True)
def test_a_killed_waiter_leaves_the_queue_at_once(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    queue = Queue(cluster, agent, where)
    queue.first.signal(signal.SIGKILL)
    assert queue.first.process.wait(PATIENCE_S) == -signal.SIGKILL
    queue.overtaken()
    queue.second.close("2")
    for path in queue.paths:
        until(partial(at_rest, path), "nothing of the killed one is left")


@pytest.mark.parametrize("owner", ["node", "file"])
@pytest.mark.parametrize("reader", "ac")
def test_who_waited_only_for_one_that_was_killed_is_granted(
    cluster: Cluster, agent: MakeAgent, owner: str, reader: str
) -> None:
    """A reader behind a writer that waits for a reader. Nobody closes anything and no grant changes:
    that the wish vanished must be enough (protocol-traps 2)."""
    paths = cluster.lock(owner, "ab" + reader)
    holder, writer, behind = agent(), agent(), agent()
    holder.opens("h", paths[0], PR)
    writer.waits("w", paths[1], EX)
    until(lambda: wanting(paths[0]) == ["b"], "the writer's wish is known to the holder")
    behind.waits("b", paths[2], PR)
    writer.kill()
    behind.held("b")
    assert holding(paths[0])[0] == holder.pid


def test_killed_waiters_keep_no_place(cluster: Cluster, agent: MakeAgent) -> None:
    """One after the other, so that the second which an interrupted open's place is kept would add up
    to more than our patience."""
    here, there = cluster.lock("file", "ab")
    agent().opens("h", here, EX)
    begin = time.monotonic()
    for number in range(int(PATIENCE_S / KEPT_S) + 5):
        waiter = agent().waits("w", (here, there)[number % 2], EX)
        waiter.kill()
        until(lambda: not waiting(here) + waiting(there), "it is gone")
    assert time.monotonic() - begin < PATIENCE_S


def test_a_wait_that_ends_by_the_default_action_of_its_signal(
    cluster: Cluster, agent: MakeAgent
) -> None:
    """SIGTERM without a handler: the process ends of it, and was never granted."""
    here, there = cluster.lock("node", "ab")
    holder, waiter = agent(), agent()
    token = holder.opens("h", here, EX)
    waiter.waits("w", there, EX)
    waiter.signal(signal.SIGTERM)
    assert waiter.process.wait(PATIENCE_S) == -signal.SIGTERM
    until(lambda: not waiting(there) and not wished(here), "the wish is withdrawn")
    assert holding(here) == [holder.pid]
    assert info(here)["token"] == token


# -- the open that is tried again ---------------------------------------------------------------


def test_a_retried_open_keeps_its_place(cluster: Cluster, agent: MakeAgent, where: Where) -> None:
    """Python tries again by itself. Its handler runs when open(2) has returned EINTR."""
    keeps_its_place(cluster, agent, where, signalled)


def test_a_program_with_a_timer_gets_its_lock(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    """Interrupted again and again, it would never come to the front without its place."""

    def disturb(queue: Queue) -> None:
        for _ in range(30):
            queue.first.expect("signal", but="")

    keeps_its_place(cluster, agent, where, disturb, timer_s=0.01)


def test_a_second_signal_at_once_costs_nothing(cluster: Cluster, agent: MakeAgent) -> None:
    """The kernel tells of one interruption per request; the retried open is another request."""

    def disturb(queue: Queue) -> None:
        for _ in range(20):
            signalled(queue)

    keeps_its_place(cluster, agent, PLACES[3], disturb)


@pytest.mark.parametrize("where", FEW, indirect=True)
def test_the_place_is_kept_for_a_program_that_tries_again_itself(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    """Not only for runtimes: a C program that loops on EINTR."""
    keeps_its_place(cluster, agent, where, signalled, how="loop")


@pytest.mark.parametrize("where", FEW[1:3], indirect=True)
def test_a_program_that_does_not_come_back_loses_its_place(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    """It lives on, but does something else. The one behind is granted when the second is over, and
    not before: the lock was granted to the one that is away."""
    queue = Queue(cluster, agent, where)
    signalled = time.monotonic()
    queue.first.signal()
    assert queue.first.fails("1") == errno.EINTR
    queue.overtaken()
    assert time.monotonic() - signalled >= KEPT_S, "the place was not kept"
    queue.second.close("2")
    queue.first.opens("1", queue.paths[1], EX)


@pytest.mark.parametrize("where", FEW[1:3], indirect=True)
def test_a_program_that_comes_back_too_late_stands_at_the_end(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    queue = Queue(cluster, agent, where)
    queue.first.signal()
    assert queue.first.fails("1") == errno.EINTR
    until(lambda: waiting(queue.paths[1])[:1] != [queue.first.pid], "the place is given up")
    if where.first not in (where.second, where.holder):
        until(lambda: where.first not in wished(queue.paths[1]), "the wish is withdrawn")
    queue.first.waits("1", queue.paths[1], EX)
    queue.release()
    token = queue.second.held("2")
    queue.second.close("2")
    assert queue.first.held("1") > token


@pytest.mark.parametrize("where", FEW, indirect=True)
def test_the_end_of_the_process_ends_its_place(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    """Interrupted, then dead before it could come back."""
    queue = Queue(cluster, agent, where)
    queue.first.signal()
    assert queue.first.fails("1") == errno.EINTR
    queue.first.kill()
    queue.overtaken()


def test_a_lock_granted_to_one_that_is_away_is_there_when_it_comes_back(
    cluster: Cluster, agent: MakeAgent
) -> None:
    """The hand-over happens between EINTR and the next open(2)."""
    for _ in range(5):
        queue = Queue(cluster, agent, PLACES[2])
        begin = time.monotonic()
        queue.first.signal()
        assert queue.first.fails("1") == errno.EINTR
        queue.release()
        granted = False
        while time.monotonic() < begin + KEPT_S / 2 and not granted:
            granted = queue.first.pid in holding(queue.paths[1])
        queue.first.start("1", queue.paths[1], EX)
        if time.monotonic() < begin + KEPT_S:  # else the machine was too busy to show anything
            assert granted
            one = queue.first.held("1")
            assert queue.second.said_nothing()
            queue.first.close("1")
            assert queue.second.held("2") > one
            return
    pytest.fail("never undisturbed for a second")


@pytest.mark.parametrize("flags", [PR, EX | TRY], ids=["shared", "trylock"])
def test_another_kind_of_open_gives_the_place_up(
    cluster: Cluster, agent: MakeAgent, flags: int
) -> None:
    """A thread that asks for something else does not come back for what it had asked for."""
    queue = Queue(cluster, agent, PLACES[3])
    queue.first.signal()
    assert queue.first.fails("1") == errno.EINTR
    queue.first.start("1", queue.paths[1], flags)
    if flags & TRY:
        assert queue.first.fails("1") == errno.ETXTBSY
    until(lambda: waiting(queue.paths[1])[:1] == [queue.second.pid], "the second is at the front")
    queue.overtaken()


def test_the_place_belongs_to_the_thread(cluster: Cluster, agent: MakeAgent) -> None:
    """Another thread of the process that opens the file comes at the end, as any other."""
    queue = Queue(cluster, agent, PLACES[3])
    queue.first.signal()
    assert queue.first.fails("1") == errno.EINTR
    other = queue.first.start("t", queue.paths[1], EX, what="thread")
    until(lambda: other in waiting(queue.paths[1]), "the other thread waits")
    assert waiting(queue.paths[1])[-2:] == [queue.second.pid, other]


# -- stops and debuggers ------------------------------------------------------------------------


def stopped(pid: int) -> None:
    """Until our child is stopped; its stop is told only once."""
    deadline = time.monotonic() + PATIENCE_S
    while os.waitpid(pid, os.WUNTRACED | os.WNOHANG | WALL) == (0, 0):
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.001)


def ptrace(request: int, pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, None, None) < 0:
        pytest.skip(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")


def stop_and_go(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    stopped(pid)
    os.kill(pid, signal.SIGCONT)


def attach(pid: int) -> None:
    ptrace(PTRACE_ATTACH, pid)
    stopped(pid)
    ptrace(PTRACE_DETACH, pid)


def seize(pid: int) -> None:
    ptrace(PTRACE_SEIZE, pid)
    ptrace(PTRACE_INTERRUPT, pid)
    stopped(pid)
    ptrace(PTRACE_DETACH, pid)


disturbance = pytest.mark.parametrize("disturb", [stop_and_go, attach, seize])


@disturbance
def test_a_stop_or_a_debugger_ends_a_wait_with_eintr(
    cluster: Cluster, agent: MakeAgent, disturb: Callable[[int], None]
) -> None:
    """No handler runs, and yet open(2) returns (fuse-notes 4). The next one has the old place."""

    def back_again(queue: Queue) -> None:
        disturb(queue.first.pid)
        assert queue.first.fails("1") == errno.EINTR
        queue.first.start("1", queue.paths[1], EX)

    keeps_its_place(cluster, agent, PLACES[3], back_again, how="once")


@disturbance
@pytest.mark.parametrize("where", FEW, indirect=True)
def test_a_wait_goes_on_after_a_stop_or_a_debugger(
    cluster: Cluster, agent: MakeAgent, where: Where, disturb: Callable[[int], None]
) -> None:
    """Three times, to show that each retry has the place of the one before."""

    def thrice(queue: Queue) -> None:
        for _ in range(3):
            disturb(queue.first.pid)

    keeps_its_place(cluster, agent, where, thrice)


@pytest.mark.parametrize("where", [PLACES[0], PLACES[4]], indirect=True)
def test_a_long_stop_loses_the_place_and_not_the_wait(
    cluster: Cluster, agent: MakeAgent, where: Where
) -> None:
    """The others do not wait for somebody who is stopped; it goes on at the end of the queue."""
    queue = Queue(cluster, agent, where, how="retry")
    queue.first.signal(signal.SIGSTOP)
    stopped(queue.first.pid)
    queue.release()
    token = queue.second.held("2")
    queue.first.signal(signal.SIGCONT)
    until(lambda: queue.first.pid in waiting(queue.paths[1]), "it waits again")
    queue.second.close("2")
    assert queue.first.held("1") > token


def test_a_stopped_holder_keeps_its_lock(cluster: Cluster, agent: MakeAgent) -> None:
    queue = Queue(cluster, agent, PLACES[0])
    queue.holder.signal(signal.SIGSTOP)
    stopped(queue.holder.pid)
    assert holding(queue.paths[0]) == [queue.holder.pid]
    queue.holder.signal(signal.SIGCONT)
    queue.in_order()
