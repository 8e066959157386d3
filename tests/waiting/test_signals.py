"""Signals that meet a waiting open (promise 7), and the place that a retried open keeps in the queue
(docs/reference.md, "Signals"); and calls that wait for the store alone, which no signal makes fail.

FUSE cannot restart an open: a signal that is caught makes open(2) return EINTR, also with SA_RESTART.
What dlmfs can do is to keep the place for a second.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
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


class Where(NamedTuple):
    """Who is where: the holder, the waiter that gets a signal, the one behind it."""

    rule: str
    holder: str
    first: str
    second: str


# Under holder=node the processes of a node do not exclude each other: there the one behind must be
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
        self.paths = cluster.lock(where.rule, where.holder + where.first + where.second)
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


@pytest.fixture(params=PLACES, ids=lambda w: f"{w.rule}-{w.holder}{w.first}{w.second}")
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


@pytest.mark.parametrize("rule", ["node", "file"])
@pytest.mark.parametrize("reader", "ac")
def test_who_waited_only_for_one_that_was_killed_is_granted(
    cluster: Cluster, agent: MakeAgent, rule: str, reader: str
) -> None:
    """A reader behind a writer that waits for a reader. Nobody closes anything and no grant changes:
    that the wish vanished must be enough (protocol-traps 2)."""
    paths = cluster.lock(rule, "ab" + reader)
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


# -- calls that wait for the store alone --------------------------------------------------------

STORM = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
caught = 0
def catch(*_):
    global caught
    caught += 1
signal.signal(signal.SIGALRM, catch)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
bad, done = [], 0
while done < 60 or caught < 200:
    done += 1
    name = f"{sys.argv[1]}-{done}".encode()
    fd = libc.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    if fd < 0:
        bad.append(f"open: {ctypes.get_errno()}")
        continue
    for n in range(5):
        if libc.pwrite(fd, b"%d" % (done * 5 + n + 10**7), 8, 0) != 8:
            bad.append(f"pwrite: {ctypes.get_errno()}")
    libc.close(fd)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.unlink(name)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
print(bad)
"""


@pytest.mark.parametrize("rule", ["node", "file"])
def test_no_signal_makes_a_write_or_a_first_open_fail(cluster: Cluster, rule: str) -> None:
    """As in the kernel, where a write is a copy in memory. Calls of C, which try nothing again."""
    (path,) = cluster.lock(rule, "a")
    command = [sys.executable, "-I", "-S", "-c", STORM, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_shell_writes_a_value_while_its_children_end(cluster: Cluster) -> None:
    """bash catches SIGCHLD, and does not write again."""
    (path,) = cluster.lock("node", "a")
    script = 'for i in $(seq 40); do sleep 0.00$((i % 4)) & echo progress-$i >"$0" || exit 1; done'
    subprocess.run(["bash", "-c", script, str(path)], timeout=4 * PATIENCE_S, check=True)
    assert path.read_bytes().startswith(b"progress-40\n")
