"""What a fenced node means for programs: the library says so, and `dlmfs lock` has ended its command's
last process before another node is granted the lock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dlmfs.client import Cancelled, Lock, LockLost, Unavailable, aio
from dlmfs.client.keeper import _keepers as keepers
from tests.cli.jobs import Job
from tests.cli.test_lock_run import TREE
from tests.client.threads import begin, join
from tests.etcd.mounts import TTL, EtcdNodes, take, until
from tests.etcd.proxy import Proxy
from tests.etcd.server import PATIENCE_S

pytestmark = pytest.mark.fuse


@pytest.fixture
def proxy(nodes: EtcdNodes) -> Iterator[Proxy]:
    with closing(Proxy(nodes.etcd.members[0].endpoint)) as made:
        yield made


def mounts(nodes: EtcdNodes, proxy: Proxy, *options: str) -> tuple[Path, Path]:
    """A node that can be cut off, and one that cannot."""
    victim = nodes.mount("victim", *options, source=f"etcd://{proxy.endpoint}/{nodes.cluster}")
    return victim, nodes.mount("safe")


@pytest.mark.parametrize(("on_lost", "ttl"), [("none", 9), ("kill", 6)])
@pytest.mark.parametrize("how", ["cut off", "stopped"])
def test_the_commands_tree_is_ended_before_another_is_granted_the_lock(
    nodes: EtcdNodes, proxy: Proxy, how: str, on_lost: str, ttl: int
) -> None:
    """A stopped daemon says nothing, but its deadline is known. With `on-lost=kill` its watchdog
    kills `dlmfs lock` itself 0.9 s later."""
    victim, safe = mounts(nodes, proxy, f"on-lost={on_lost}", f"ttl={ttl}")
    job = Job(victim / "dom/x", "--", sys.executable, "-c", TREE, "0")
    handles: list[int] = []
    try:
        told = dict(job.line().split() for _ in range(3))
        handles += [os.pidfd_open(int(pid)) for pid in told.values()]
        alive: list[int] = []
        other = Lock(safe / "dom/x")

        def acquire() -> None:
            other.acquire()
            alive.extend(fd for fd in handles if not select.select([fd], [], [], 0)[0])

        taker = threading.Thread(target=acquire, daemon=True)
        taker.start()
        until(lambda: bool(nodes.info(victim / "dom/x")["waiters"]))
        if how == "stopped":
            nodes.stop(victim)
        else:
            proxy.silence()
        assert job.over()[0] == 75
        assert not other.held, "the lock is another's already"
        taker.join(PATIENCE_S)
        assert other.held
        assert alive == []
        other.release()
    finally:
        if how == "stopped":
            nodes.cont(victim)
        job.close()
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


def test_the_library_says_that_the_lock_is_lost_and_works_again_later(
    nodes: EtcdNodes, proxy: Proxy
) -> None:
    victim, safe = mounts(nodes, proxy)
    mine, shared = Lock(victim / "dom/x"), Lock(victim / "dom/y", shared=True)
    with pytest.raises(LockLost), mine:
        shared.acquire()
        mine.set_value(b"before")
        token = mine.token
        proxy.silence()
        assert mine.wait_lost(PATIENCE_S)
        assert shared.wait_lost(PATIENCE_S)
        with pytest.raises(LockLost):
            mine.get_value()
        with pytest.raises(Unavailable, match="fenced"):
            Lock(victim / "dom/z").try_acquire()
        other = Lock(safe / "dom/x", timeout=PATIENCE_S)
        with other:
            assert other.token > token
            assert other.get_value() == b"before"
            mark = other.abandoned()
            assert mark is not None
            assert mark.node == "victim"
            assert mark.token <= token
        assert not mine.held
    shared.release()
    proxy.heal()
    take(victim / "dom/x")
    with mine:
        assert mine.token > token
        assert mine.held


def test_the_library_says_so_though_the_daemon_is_stopped(nodes: EtcdNodes) -> None:
    """Before another is granted the lock; and what is granted later is of another session."""
    a, b = nodes.pair()
    mine, other = Lock(a / "dom/x"), Lock(a / "dom/y")
    given_back = Lock(a / "dom/z")
    theirs = nodes.hold(b / "dom/w")
    assert theirs.wait() == "held"
    for lock in (mine, other, given_back):
        lock.acquire()
    given_back.release()
    taker = nodes.queue(b / "dom/x")
    nodes.stop(a)
    try:
        assert mine.wait_lost(PATIENCE_S)
        assert not taker.poll(0), "the lock is another's already"
        assert other.wait_lost(PATIENCE_S)
        assert not given_back.lost.is_set()
        for lock in (mine, other):
            with pytest.raises(LockLost):
                lock.get_value()  # does not ask the daemon
            lock.release()
        assert taker.wait() == "held"
    finally:
        nodes.cont(a)
    take(a / "dom/y")
    with other:
        assert not other.wait_lost(TTL)  # longer than the first deadline of its session
        assert other.held


@pytest.mark.allow_warnings
def test_who_waits_for_a_lock_waits_through_a_fence_too(nodes: EtcdNodes, proxy: Proxy) -> None:
    """All of them: who waited when it came and who came later; with a time-out or without. Who would
    not wait is refused at once, who has waited long enough is told for what."""
    victim, safe = mounts(nodes, proxy)
    held, busy = Lock(victim / "dom/held"), Lock(safe / "dom/busy")
    held.acquire()
    busy.acquire()
    marker = nodes.folder / "ran"
    jobs = [Job(victim / "dom/busy", "--", "touch", f"{marker}1")]
    outcomes: list[object] = []

    async def wait() -> None:
        async with aio.Lock(victim / "dom/awaited", timeout=2 * PATIENCE_S) as lock:
            outcomes.append(lock.token)

    def waits(lock: Lock, timeout: float | None) -> threading.Thread:
        return begin(lambda: outcomes.append(lock.acquire(timeout=timeout)))

    try:
        until(lambda: bool(nodes.info(safe / "dom/busy")["waiters"]))
        threads = [waits(Lock(victim / "dom/busy", shared=True), None)]
        proxy.silence()
        assert held.wait_lost(PATIENCE_S)
        threads.append(waits(Lock(victim / "dom/free", shared=True), -1))
        threads.append(begin(lambda: asyncio.run(wait())))
        jobs.append(
            Job("-s", "-w", 2 * PATIENCE_S, victim / "dom/free", "--", "touch", f"{marker}2")
        )
        until(lambda: sum(bool(keeper.away) for keeper in [*keepers.values()]) == 3)
        for words in (["-n"], ["-w", "1"]):
            jobs.append(Job(*words, victim / "dom/free", "true"))
            code, errors = jobs[-1].over()
            assert (code, "fenced" in errors.lower() or "REJOINING" in errors) == (69, True), errors
        late, none = Lock(victim / "dom/free", timeout=1), Lock(victim / "dom/free", timeout=0)
        for refused in (late, none):
            with pytest.raises(Unavailable, match=r"fenced|FENCED|REJOINING"):
                refused.acquire()
        cancelled = Lock(victim / "dom/given-up")
        ended = begin(lambda: outcomes.append(_raised(cancelled.acquire)))
        until(lambda: bool(cancelled._keeper and cancelled._keeper.away))
        cancelled.cancel()
        join(ended)
        assert outcomes == [Cancelled]
        with pytest.raises(LockLost):
            held.check()
        proxy.heal()
        busy.release()
        for job in (jobs[0], jobs[1]):
            assert job.over()[0] == 0
        join(*threads)
        assert sorted(map(bool, outcomes)) == [True] * 4
        assert {path.name for path in nodes.folder.glob("ran*")} == {"ran1", "ran2"}
        assert held.lost.is_set(), "what was lost stays lost"
    finally:
        proxy.heal()
        for job in jobs:
            job.close()


def _raised(what: Callable[[], object]) -> type[BaseException] | None:
    try:
        what()
    except BaseException as error:
        return type(error)
    return None


def test_of_several_locks_those_that_a_fence_took_are_taken_anew(
    nodes: EtcdNodes, proxy: Proxy
) -> None:
    """The command has not begun: nothing that it does is behind any of them."""
    victim, safe = mounts(nodes, proxy)
    first, second = (Lock(safe / f"dom/{name}") for name in "ab")
    second.acquire()
    job = Job(victim / "dom/a", victim / "dom/b", "--", "printenv", "DLMFS_TOKEN")
    try:
        until(lambda: bool(nodes.info(safe / "dom/b")["waiters"]))
        proxy.silence()
        first.acquire(timeout=2 * PATIENCE_S)  # its first one is lost, and another's meanwhile
        proxy.heal()
        between = first.token
        first.release()
        second.release()
        assert job.over()[0] == 0
        tokens = [int(job.line()) for _ in range(2)]
        assert min(tokens) > between
    finally:
        job.close()
