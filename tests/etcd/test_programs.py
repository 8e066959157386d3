"""What a fenced node means for programs: the library says so, and `dlmfs lock` has ended its command's
last process before another node is granted the lock."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dlmfs.client import Lock, LockLost, Unavailable
from tests.cli.jobs import Job
from tests.cli.test_lock_run import TREE
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
            Lock(victim / "dom/z").acquire()
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


def test_a_fenced_node_refuses_at_once_with_69(nodes: EtcdNodes, proxy: Proxy) -> None:
    victim, _ = mounts(nodes, proxy)
    (victim / "dom").mkdir()
    proxy.silence()
    until(lambda: nodes.lease(victim) == "FENCED")
    job = Job(victim / "dom/x", "true")
    try:
        code, errors = job.over()
        assert (code, "the node is fenced" in errors) == (69, True)
    finally:
        job.close()
