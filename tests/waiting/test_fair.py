"""Local and remote waiters of one lock: the order of arrival is kept between them, and however many
come on one side, the other has its turn (promise 5)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import EX, PR, Agent, until, waiting, wanting, wished
from tests.waiting.conftest import Cluster, MakeAgent

pytestmark = pytest.mark.fuse

both_rules = pytest.mark.parametrize("rule", ["node", "file"])

STREAM = """
import os, sys
path, log, me = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND), sys.argv[3].encode()
print("ready", flush=True)
sys.stdin.readline()
while True:
    fd = os.open(path, os.O_RDWR)
    os.write(log, me)
    os.close(fd)
"""


class Line:
    """Waiters of one lock, in the order of their arrival."""

    def __init__(self, cluster: Cluster, agent: MakeAgent, rule: str, nodes: str) -> None:
        self.paths = dict(zip(nodes, cluster.lock(rule, nodes), strict=True))
        self.agent = agent
        self.waiters: list[Agent] = []
        self.at: list[str] = []
        for path in self.paths.values():
            os.mknod(path)  # so that each node's daemon can be asked about the lock

    def holds(self, node: str) -> Agent:
        holder = self.agent()
        holder.opens("x", self.paths[node], EX)
        return holder

    def comes(self, node: str, flags: int = EX) -> Agent:
        """One more waits; all nodes that have to do with the lock know of its node's wish."""
        waiter = self.agent()
        waiter.waits("x", self.paths[node], flags)
        self.waiters.append(waiter)
        self.at.append(node)
        return waiter

    def wish_known(self, of: str, at: str) -> None:
        until(lambda: of in wanting(self.paths[at]), f"{at} knows of the wish of {of}")


def one_by_one(waiters: list[Agent], token: int) -> int:
    """Each is granted in this order, alone, with a growing token; it closes."""
    left = list(enumerate(waiters))
    order: list[int] = []
    while left:
        # Whoever comes, so that a failure can tell the whole order.
        until(lambda: any(waiter.spoke() for _, waiter in left), f"the next one after {order}")
        n, waiter = next((n, waiter) for n, waiter in left if waiter.spoke())
        left.remove((n, waiter))
        order.append(n)
        assert waiter.held("x") > token, f"waiter {n}"
        token = waiter.tokens["x"]
        assert all(later.said_nothing() for _, later in left), f"beside waiter {n}"
        waiter.close("x")
    assert order == sorted(order), f"granted in the order {order}"
    return token


@pytest.mark.parametrize("order", ["ab", "ba", "aba", "aabba", "bbaa", "bca", "abca", "aabbcca"])
def test_the_order_of_arrival_is_kept(cluster: Cluster, agent: MakeAgent, order: str) -> None:
    """holder=file, the lock held at a. "aba": one that waits at a, one at b, another at a."""
    line = Line(cluster, agent, "file", "abc")
    holder = line.holds("a")
    for node in order:
        line.comes(node)
        if node != "a":
            line.wish_known(node, "a")
    holder.close("x")
    one_by_one(line.waiters, holder.tokens["x"])


def test_the_order_of_arrival_is_kept_between_nodes(cluster: Cluster, agent: MakeAgent) -> None:
    """holder=node: each of the nodes has the lock in its turn, also the holder's for newcomers."""
    line = Line(cluster, agent, "node", "abc")
    holder = line.holds("a")
    for node in "bca":
        line.comes(node)
        if node != "a":
            line.wish_known(node, "a")
    holder.close("x")
    one_by_one(line.waiters, holder.tokens["x"])


@both_rules
def test_who_waits_behind_one_that_was_killed_keeps_the_turn(
    cluster: Cluster, agent: MakeAgent, rule: str
) -> None:
    """The node's wish stands in the queue for whoever waits there, not for the one that came first:
    when it is granted, the one behind is served, and not sent to the end of the queue."""
    line = Line(cluster, agent, rule, "abc")
    holder = line.holds("a")
    line.comes("b")
    line.wish_known("b", "a")
    line.comes("c")
    line.wish_known("c", "a")
    line.comes("c")
    line.comes("a")
    victim = line.waiters.pop(1)
    victim.kill()
    until(lambda: victim.pid not in waiting(line.paths["c"]), "the killed one is gone")
    holder.close("x")
    one_by_one(line.waiters, holder.tokens["x"])


@both_rules
def test_many_on_one_side_do_not_keep_one_on_the_other_waiting(
    cluster: Cluster, agent: MakeAgent, rule: str
) -> None:
    """Turn by turn: those who came after the other node's wish come after that node."""
    line = Line(cluster, agent, rule, "ab")
    holder = line.holds("a")
    remote = line.comes("b")
    line.wish_known("b", "a")
    local = [line.comes("a") for _ in range(5)]
    holder.close("x")
    remote.held("x")
    assert all(one.said_nothing() for one in local), "a local one overtook the other node"
    line.wish_known("a", "b")
    late = [line.comes("b") for _ in range(5)]
    remote.close("x")
    token = remote.tokens["x"]
    for group in (local, late):
        if rule == "file":
            token = one_by_one(group, token)
            continue
        # The node has its turn: all of them hold together, and the others wait for the last.
        assert all(one.held("x") > token for one in group)
        token = group[0].tokens["x"]
        assert group is late or all(one.said_nothing() for one in late)
        for one in group:
            one.close("x")


@both_rules
def test_readers_on_both_sides_do_not_starve_a_writer(
    cluster: Cluster, agent: MakeAgent, rule: str
) -> None:
    """In the kernel a new reader overtakes a writer that waits (kernel-behaviour)."""
    line = Line(cluster, agent, rule, "abc")
    readers = [agent(), agent()]
    for reader, node in zip(readers, "ab", strict=True):
        reader.opens("x", line.paths[node], PR)
    writer = line.comes("c")
    for node in "ab":
        line.wish_known("c", node)
    late = [line.comes(node, PR) for node in "ab"]
    readers[0].close("x")
    assert writer.said_nothing()
    readers[1].close("x")
    token = writer.held("x")
    assert all(one.said_nothing() for one in late), "a reader overtook the writer"
    writer.close("x")
    assert all(one.held("x") > token for one in late)


@both_rules
def test_a_writer_does_not_starve_readers(cluster: Cluster, agent: MakeAgent, rule: str) -> None:
    """Two writers in turn at one node, while a reader of the other waits."""
    line = Line(cluster, agent, rule, "ab")
    writer = line.holds("a")
    reader = line.comes("b", PR)
    line.wish_known("b", "a")
    second = line.comes("a")
    writer.close("x")
    token = reader.held("x")
    assert second.said_nothing(), "the second writer overtook the reader"
    assert wished(line.paths["b"]) in (["a"], [])
    reader.close("x")
    assert second.held("x") > token


@both_rules
def test_two_busy_nodes_have_a_fair_share_each(
    cluster: Cluster, agent: MakeAgent, tmp_path: Path, rule: str
) -> None:
    """Two processes at a and one at b open and close without a pause, and all make progress, though
    local grants cost a tenth of a hand-over. How many each has depends on the machine's scheduler;
    that nobody is passed over is for the simulation to say."""
    paths = cluster.lock(rule, "ab")
    for path in paths:
        os.mknod(path)
    log = tmp_path / "log"
    log.touch()
    children = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", STREAM, str(path), str(log), letter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for path, letter in ((paths[0], "a"), (paths[0], "c"), (paths[1], "b"))
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"go\n")
            child.stdin.flush()
        until(lambda: min(map(log.read_text().count, "abc")) >= 100, "all make progress")
    finally:
        for child in children:
            child.kill()
            child.wait(PATIENCE_S)
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()
