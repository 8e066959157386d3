"""Thousands of waiting opens: granted in order, none lost.

Each waiter is a thread of one of many processes. It opens the lock, notes its thread id and token
in a common record, notes its end there, and closes. So the record shows the order of grants and
that no two overlapped. The order of arrival is known from outside by batches (one begins when the
one before stands in the queue) and, within a batch, from the daemon, whose list must agree with
the batches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import EX, LONG, PR, TRY, at_rest, until, waiting
from tests.waiting.conftest import Cluster, MakeAgent

pytestmark = pytest.mark.fuse

THOUSANDS = 5000
MANY = THOUSANDS if LONG else 1000
EACH = 100
"""Waiters of one process, which are one batch."""
GRANTED_S = 300.0 if LONG else 60.0

CROWD = """
import os, sys, threading
path, record, flags, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
threading.stack_size(128 * 1024)
log = os.open(record, os.O_WRONLY | os.O_APPEND)
failed = []

def wait():
    tid = threading.get_native_id()
    try:
        fd = os.open(path, flags)
        token = int(os.getxattr(fd, "user.dlmfs.token"))
        os.write(log, b"in %d %d\\n" % (tid, token))
        os.write(log, b"out %d %d\\n" % (tid, token))
        os.close(fd)
    except OSError as error:
        failed.append(error)

print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=wait) for _ in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"failed {failed}" if failed else "done", flush=True)
"""


class Grant(NamedTuple):
    tid: int
    token: int


class Crowd:
    """Processes with many waiters each, and the record that they write."""

    def __init__(self, record: Path) -> None:
        self.record = record
        record.touch()
        self.children: list[subprocess.Popen[str]] = []
        self._expected: dict[Path, int] = {}

    def prepare(self, path: Path, flags: int = EX, each: int = EACH) -> Callable[[], None]:
        """A process that is ready to wait; call the result to let it."""
        words = [str(path), str(self.record), str(flags | os.O_CREAT), str(each)]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CROWD, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)

        def go() -> None:
            assert child.stdout is not None
            assert child.stdin is not None
            assert child.stdout.readline() == "ready\n"
            self._expected[path] = self._expected.get(path, 0) + each
            child.stdin.write("go\n")
            child.stdin.flush()
            until(lambda: count(path) >= self._expected[path], "the batch stands in the queue")

        return go

    def grants(self) -> list[Grant]:
        """What happened, in order, once all of the living are through."""
        for child in self.children:
            if child.poll() is None:
                out, _ = child.communicate(timeout=GRANTED_S)
                assert out == "done\n", out
        return [Grant(tid, token) for what, tid, token in self._lines() if what == "in"]

    def _lines(self) -> Iterator[tuple[str, int, int]]:
        for line in self.record.read_text().splitlines():
            what, tid, token = line.split()
            yield what, int(tid), int(token)

    def overlaps(self) -> int:
        """How many were granted while another had not ended. For exclusive crowds."""
        lines = list(self._lines())
        return sum(
            begin[0] != "in" or end[0] != "out" or begin[1] != end[1]
            for begin, end in zip(lines[::2], lines[1::2], strict=True)
        )

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait(PATIENCE_S)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    made = Crowd(tmp_path / "record")
    try:
        yield made
    finally:
        made.end()


def count(path: Path) -> int:
    """Local waiters, counted without a report on each of them."""
    if not path.exists():  # files are per node
        return 0
    rows = json.loads(os.getxattr(path, "user.dlmfs.waiters"))
    more = rows.pop()["more"] if rows and "more" in rows[-1] else 0
    return sum("pid" in row for row in rows) + more


def process_of(tid: int) -> int:
    for line in Path(f"/proc/{tid}/status").read_text().splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise AssertionError(f"no thread {tid}")


@pytest.mark.timeout(600 if LONG else 120)
def test_thousands_on_one_node_are_granted_in_order(
    cluster: Cluster, agent: MakeAgent, crowd: Crowd
) -> None:
    """holder=file: each is an owner of its own, and all are local."""
    (path,) = cluster.lock("file", "a")
    holder = agent()
    holder.opens("h", path, EX)
    for go in [crowd.prepare(path) for _ in range(THOUSANDS // EACH)]:
        go()
    queue = waiting(path)
    assert len(queue) == THOUSANDS
    # The daemon's list agrees with the order in which the batches began.
    assert [process_of(tid) for tid in queue] == [
        c.pid for c in crowd.children for _ in range(EACH)
    ]
    holder.close("h")
    grants = crowd.grants()
    assert [g.tid for g in grants] == queue
    assert crowd.overlaps() == 0
    assert [g.token for g in grants] == sorted({g.token for g in grants}), "each token is larger"
    assert at_rest(path)


@pytest.mark.timeout(600 if LONG else 120)
def test_thousands_on_two_nodes_are_granted_in_order(
    cluster: Cluster, agent: MakeAgent, crowd: Crowd
) -> None:
    """Batches at the holder's node, the other, and the holder's again: the last came after the
    other node's wish, so it is served after that node (engine rule 8)."""
    here, there = cluster.lock("file", "ab")
    holder = agent()
    holder.opens("h", here, EX)
    third = MANY // EACH // 3
    batches = [[crowd.prepare(path) for _ in range(third)] for path in (here, there, here)]
    for batch in batches:
        for go in batch:
            go()
    size = third * EACH
    local, remote = waiting(here), waiting(there)
    assert (len(local), len(remote)) == (2 * size, size)
    holder.close("h")
    grants = crowd.grants()
    assert [g.tid for g in grants] == local[:size] + remote + local[size:]
    assert crowd.overlaps() == 0
    assert [g.token for g in grants] == sorted({g.token for g in grants}), "each token is larger"


@pytest.mark.timeout(600 if LONG else 120)
def test_thousands_on_a_node_that_shares_its_lock_are_granted_together(
    cluster: Cluster, agent: MakeAgent, crowd: Crowd
) -> None:
    """holder=node: the lock comes to the node once, for all of them."""
    here, there = cluster.lock("node", "ab")
    holder = agent()
    token = holder.opens("h", here, EX)
    for go in [crowd.prepare(there) for _ in range(MANY // EACH)]:
        go()
    queue = waiting(there)
    holder.close("h")
    grants = crowd.grants()
    assert sorted(g.tid for g in grants) == sorted(queue)
    assert len({g.token for g in grants}) == 1
    assert grants[0].token > token


def test_readers_between_writers_go_in_together_and_in_order(
    cluster: Cluster, agent: MakeAgent, crowd: Crowd
) -> None:
    """Runs of readers and writers: a run of readers shares a token, later ones have larger."""
    (path,) = cluster.lock("file", "a")
    holder = agent()
    holder.opens("h", path, EX)
    runs = [PR, EX, PR, PR, EX, EX, PR]
    for go in [crowd.prepare(path, flags, 20) for flags in runs]:
        go()
    queue = waiting(path)
    holder.close("h")
    tokens = dict(crowd.grants())
    assert sorted(tokens) == sorted(queue)
    by_run = [[tokens[tid] for tid in queue[n * 20 : n * 20 + 20]] for n in range(len(runs))]
    for flags, run in zip(runs, by_run, strict=True):
        assert len(set(run)) == (20 if flags == EX else 1)
        assert run == sorted(run)
    assert by_run[2] == by_run[3], "two neighbouring runs of readers are one"
    for n in (1, 2, 4, 5, 6):
        assert by_run[n - 1][-1] < by_run[n][0]


def test_processes_that_are_killed_in_the_crowd_are_stepped_over(
    cluster: Cluster, agent: MakeAgent, crowd: Crowd
) -> None:
    """Each second batch dies: at the front, in the middle, at the end; on both nodes."""
    here, there = cluster.lock("file", "ab")
    holder = agent()
    holder.opens("h", here, EX)
    paths = [here, here, here, there, there, there]
    for go in [crowd.prepare(path, EX, 30) for path in paths]:
        go()
    queue = waiting(here) + waiting(there)
    victims = crowd.children[::2]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(PATIENCE_S) == -signal.SIGKILL
    holder.close("h")
    alive = [tid for n, tid in enumerate(queue) if n // 30 % 2 == 1]
    assert [g.tid for g in crowd.grants()] == alive
    assert crowd.overlaps() == 0


def test_a_trylock_in_front_of_a_crowd_is_refused_at_once(
    cluster: Cluster, agent: MakeAgent, crowd: Crowd
) -> None:
    """It neither waits behind them nor disturbs their order."""
    here, there = cluster.lock("file", "ab")
    holder, trying = agent(), agent()
    holder.opens("h", here, EX)
    for go in [crowd.prepare(path, EX, 50) for path in (here, there)]:
        go()
    queue = waiting(here) + waiting(there)
    for path in (here, there):
        trying.start("t", path, EX | TRY)
        assert trying.fails("t") == 26  # ETXTBSY
    holder.close("h")
    assert [g.tid for g in crowd.grants()] == queue
