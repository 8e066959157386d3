"""The promises of the README, on etcd: the same as on one host, with the lease's time added."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys

import pytest

from tests.etcd.mounts import EtcdNodes, errno_of, trylock
from tests.etcd.server import PATIENCE_S

pytestmark = pytest.mark.fuse

COUNT = """
import os, sys
for _ in range(int(sys.argv[2])):
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0")
    os.pwrite(fd, b"%d" % (n + 1), 0)
    os.close(fd)
"""


def test_promise_exclusion(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    first = nodes.hold(a / "dom/x")
    assert first.wait() == "held"
    second = nodes.queue(b / "dom/x")
    first.release()
    assert second.wait() == "held"
    assert second.token > first.token


def test_promise_exclusion_a_counter_in_the_value_loses_nothing(nodes: EtcdNodes) -> None:
    """Three nodes with two processes each, which exclude each other as well."""
    mounts = [nodes.mount(name, "holder=file") for name in "abc"]
    for where in mounts:
        (where / "dom").mkdir()
    each, rounds = 2, 25
    children = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(where / "dom/n"), str(rounds)])
        for where in mounts
        for _ in range(each)
    ]
    nodes.children += children
    for child in children:
        assert child.wait(90) == 0
    with open(mounts[0] / "dom/n", "rb") as file:
        assert int(file.read().rstrip(b"\0")) == rounds * len(children)


def test_promise_tokens_grow(nodes: EtcdNodes) -> None:
    a, b = nodes.pair("holder=file")
    last = 0
    for where in (a, a, b, a, b, b):
        holder = nodes.hold(where / "dom/x")
        assert holder.wait() == "held"
        assert holder.token > last
        last = holder.token
        holder.release()


def test_promise_value_is_carried(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    said = b""
    for where, word in ((a, b"from a"), (b, b"then b"), (a, b"a again")):
        fd = os.open(where / "dom/x", os.O_RDWR | os.O_CREAT)
        assert os.pread(fd, 64, 0).rstrip(b"\0") == said
        os.pwrite(fd, bytes(64), 0)
        assert os.pwrite(fd, word, 0) == len(word)
        said = word
        os.close(fd)


def test_promise_trylock(nodes: EtcdNodes) -> None:
    """Refused while used, handed over while merely cached; either without waiting for a user."""
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    assert trylock(b / "dom/x") == errno.ETXTBSY
    assert trylock(b / "dom/x", os.O_RDONLY) == errno.ETXTBSY
    holder.release()
    assert trylock(b / "dom/x") == 0
    assert trylock(a / "dom/x") == 0


def test_promise_interruptible(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    first, second = nodes.queue(b / "dom/x"), nodes.queue(b / "dom/x")
    first.process.send_signal(signal.SIGUSR1)
    assert first.wait() == f"error {errno.EINTR}"
    holder.release()
    assert second.wait() == "held"


def test_promise_progress_a_dead_process_frees_its_lock(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.queue(b / "dom/x")
    holder.process.kill()
    assert waiter.wait() == "held"


def test_poll_tells_the_holder_that_another_node_waits(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == []
    waiter = nodes.hold(b / "dom/x")
    assert poll.poll(PATIENCE_S * 1000) == [(fd, select.POLLIN)]
    os.close(fd)
    assert waiter.wait() == "held"


def test_shared_readers_hold_together(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    assert nodes.hold(a / "dom/x", os.O_RDONLY).wait() == "held"
    assert nodes.hold(b / "dom/x", os.O_RDONLY).wait() == "held"
    assert trylock(a / "dom/x") == errno.ETXTBSY


def test_promise_no_silent_state(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    nodes.queue(b / "dom/x")
    info = nodes.info(b / "dom/x")
    assert [(m["node"], m["level"]) for m in info["members"]] == [("a", "EX")]
    assert [w["node"] for w in info["waiters"]] == ["b"]
    listed = {row["node"]: row for row in nodes.ask(a, "nodes")}
    assert sorted(listed) == ["a", "b"]
    assert listed["b"]["domains"] == ["dom"]
    assert listed["b"]["pid"] == nodes.pid(b)
    assert listed["a"]["own"]
    assert not listed["b"]["own"]


def test_reopening_a_cached_lock_commits_nothing(nodes: EtcdNodes) -> None:
    """dlmfs.txt: a request for an already acquired lock will not generate another DLM call."""
    a, _ = nodes.pair()
    assert errno_of(a / "dom/x") == 0
    before = nodes.status(a)["store"]["commits"]
    for _ in range(20):
        assert errno_of(a / "dom/x") == 0
    assert nodes.status(a)["store"]["commits"] == before


def test_two_lock_spaces_of_one_etcd_know_nothing_of_each_other(nodes: EtcdNodes) -> None:
    a = nodes.mount("a")
    other = nodes.mount("b", "node=a", source=nodes.etcd.source(f"{nodes.cluster}-2"))
    for where in (a, other):
        (where / "dom").mkdir()
    assert nodes.hold(a / "dom/x").wait() == "held"
    assert nodes.hold(other / "dom/x").wait() == "held"
    assert [row["node"] for row in nodes.ask(other, "nodes")] == ["a"]
