"""Daemons that are stopped for a while, and clocks that jump.

There is no lease on one host: a daemon that is stopped, not dead, keeps its locks; the others wait
for those, try them in bounded time, go on with all others, and `dlmfs status` says who it is
(design, "sqlite"). No clock of the machine is touched: a daemon gets one of its own.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes, dlmfs
from tests.robust.helpers import (
    LONG,
    Worker,
    daemon_pid,
    kill,
    remount,
    sound,
    stopped,
    use,
    wanted,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600 if LONG else 120)]

EX = os.O_RDWR | os.O_CREAT

COUNT = """
import os, sys
while True:
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0") + 1
    os.pwrite(fd, b"%d" % n, 0)
    os.write(1, b"%d\\n" % n)
    os.close(fd)
"""


def test_a_stopped_node_keeps_what_is_open_and_the_others_go_on(nodes: Nodes) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", EX)
    try:
        waiter = nodes.hold(b / "dom/x")
        wanted(fd)
        with stopped(a) as pid:
            assert use(b, "try", b / "dom/x") == (errno.ETXTBSY, "")
            assert use(b, "open", b / "dom/free") == (0, "")
            assert use(b, "mkdir", b / "more") == (0, "")
            c = nodes.mount("c")
            (c / "dom").mkdir()
            assert use(c, "open", c / "dom/free") == (0, "")
            assert f"the node a is stopped (pid {pid})" in dlmfs("status", str(b)).stdout
            there = nodes.folder / "again"
            there.mkdir()
            again = dlmfs("mount", f"local:{nodes.state}", str(there), "-o", "node=a", check=False)
            assert again.returncode == 32
            assert "node named a" in again.stderr
            assert waiter.waits, "granted although its holder may go on at any moment"
        assert os.pread(fd, 1, 0) == b"\0"
        assert os.pwrite(fd, b"mine", 0) == 4
    finally:
        os.close(fd)
    assert waiter.wait() == "held"


def test_a_lock_cached_by_a_stopped_node(nodes: Nodes) -> None:
    """Tried: refused in bounded time. Waited for: handed over when the node goes on."""
    a, b = nodes.pair()
    os.close(os.open(a / "dom/x", EX))
    with stopped(a):
        assert use(b, "try", b / "dom/x") == (errno.ETXTBSY, "")
        waiter = nodes.hold(b / "dom/x")
        assert waiter.waits
    assert waiter.wait() == "held"


def test_clients_of_a_stopped_node(nodes: Nodes) -> None:
    """Its opens wait and can be killed; what was closed meanwhile is released when it goes on."""
    a, b = nodes.pair()
    os.close(os.open(a / "dom/y", EX))
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    with stopped(a):
        waiter = nodes.hold(b / "dom/x")
        stuck, patient = nodes.hold(a / "dom/y"), nodes.hold(a / "dom/y", os.O_RDONLY)
        assert stuck.waits
        holder.process.kill()
        stuck.process.kill()
        assert waiter.waits
        assert not patient.poll(0)
    assert patient.wait() == "held"
    assert waiter.wait() == "held"
    assert stuck.process.wait(PATIENCE_S) == -signal.SIGKILL
    patient.release()
    assert use(b, "open", b / "dom/y") == (0, "")


def test_a_stopped_node_that_is_killed(nodes: Nodes) -> None:
    """Dead at once, whether or not it ever went on."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", EX)
    try:
        waiter = nodes.hold(b / "dom/x")
        wanted(fd)
        with stopped(a) as pid:
            os.kill(pid, signal.SIGKILL)
            assert waiter.wait() == "held"
    finally:
        os.close(fd)
    (remount(nodes, "a") / "dom").mkdir()


@pytest.mark.skipif(not LONG, reason="DLMFS_LONG=1: more commits than the log keeps")
def test_a_node_that_was_stopped_for_longer_than_the_log_goes_back(nodes: Nodes) -> None:
    a, b = nodes.pair()
    for where in (a, b):
        os.close(os.open(where / "dom/x", EX))
    with stopped(a):
        fd = os.open(b / "dom/own", EX)
        for n in range(12_000):
            os.pwrite(fd, b"%d" % n, 0)
        os.close(fd)
        waiter = nodes.hold(b / "dom/y")
        assert waiter.wait() == "held"
    late = nodes.hold(a / "dom/y")
    assert late.waits
    waiter.release()
    assert late.wait() == "held"
    assert nodes.status(a)["lease"]["state"] == "HEALTHY"


def test_stops_at_random_points_under_load(nodes: Nodes) -> None:
    """Either node, perhaps inside a transaction: the other answers, waits, and loses nothing."""
    rng = random.Random("stop")
    mounts = nodes.pair()
    workers = [Worker(COUNT, where / "dom/n") for where in mounts]
    try:
        for _ in range(100 if LONG else 3):
            victim, other = rng.sample(range(2), 2)
            workers[victim].wait_for(rng.randint(1, 30))
            with stopped(mounts[victim]) as pid:
                report = nodes.status(mounts[other])
                assert [s["pid"] for s in report["store"]["sessions"] if s["stopped"]] == [pid]
                assert report["lease"]["state"] == "HEALTHY"
            for worker in workers:
                worker.wait_for(10)
    finally:
        lines = [worker.stop() for worker in workers]
    values = sorted(int(line) for each in lines for line in each)
    assert len(set(values)) == len(values), "two nodes made the same increment"
    with open(mounts[0] / "dom/n", "rb", buffering=0) as file:
        last = int(file.read().rstrip(b"\0"))
    assert values[-1] <= last <= len(values) + len(workers)
    assert sound(nodes.state)


# -- clocks ----------------------------------------------------------------------------------------

OWN_CLOCK = """
import sys, time
file, src = sys.argv[1:3]
now, now_ns = time.time, time.time_ns
def shift():
    with open(file) as text:
        return int(text.read() or 0)
time.time = lambda: now() + shift()
time.time_ns = lambda: now_ns() + shift() * 10**9
sys.path.insert(0, src)
from dlmfs.cli.main import main
from dlmfs.store import highwater
highwater.ROOT = file + ".mark"  # the host's own mark would stay years ahead
sys.argv[0] = "dlmfs"
sys.exit(main(sys.argv[3:]))
"""
"""dlmfs whose wall clock is off by the seconds in a file, read at each look at the clock."""

YEAR_S = 365 * 86400


class Clock:
    def __init__(self, file: Path, shift_s: int) -> None:
        self.file = file
        self.set(shift_s)

    def set(self, shift_s: int) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(str(shift_s))
        new.replace(self.file)


def mount_with_clock(nodes: Nodes, name: str, shift_s: int) -> tuple[Path, Clock]:
    where = nodes.folder / name
    where.mkdir()
    nodes.mounts.append(where)
    clock = Clock(nodes.folder / f"clock-{name}", shift_s)
    command = [sys.executable, "-c", OWN_CLOCK, str(clock.file), str(ROOT / "src")]
    command += ["mount", f"local:{nodes.state}", str(where), "-o", f"node={name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (where / "dom").mkdir()
    return where, clock


@pytest.mark.parametrize("first", [50 * YEAR_S, -50 * YEAR_S], ids=["future", "past"])
def test_nodes_with_different_clocks(nodes: Nodes, first: int) -> None:
    """The first one makes the state, so its clock decides where revisions begin."""
    a, _ = mount_with_clock(nodes, "a", first)
    b, _ = mount_with_clock(nodes, "b", -first // 2)
    last = 0
    for where in (a, b, a, b):
        holder = nodes.hold(where / "dom/x")
        assert holder.wait() == "held"
        assert holder.token > last
        last = holder.token
        other = b if where == a else a
        assert use(other, "try", other / "dom/x") == (errno.ETXTBSY, "")
        holder.release()
    kill(a)
    assert use(b, "open", b / "dom/x") == (0, "")


def test_a_clock_that_jumps_while_locks_are_held(nodes: Nodes) -> None:
    """Waits are measured on a clock that nobody sets: no lock is lost, no try ends early or late."""
    a, clock = mount_with_clock(nodes, "a", 0)
    b, _ = mount_with_clock(nodes, "b", 0)
    fd = os.open(a / "dom/x", EX)
    try:
        waiter = nodes.hold(b / "dom/x")
        wanted(fd)
        for shift in (YEAR_S, -YEAR_S, 86400 * 3, 0):
            clock.set(shift)
            assert os.pwrite(fd, b"%d" % shift, 0)
            assert use(a, "open", a / f"dom/at{shift}") == (0, "")
            report = nodes.status(a)
            assert report["lease"]["state"] == "HEALTHY"
            (lock,) = [k for k in report["domains"][0]["locks"] if k["name"] == "x"]
            assert 0 <= lock["holders"][0]["since_s"] < 3600
            assert dlmfs("status", str(a)).returncode == 0
            assert not waiter.poll(0)
    finally:
        os.close(fd)
    assert waiter.wait() == "held"


def test_the_uptime_is_not_measured_with_a_clock_that_is_set(nodes: Nodes) -> None:
    a, clock = mount_with_clock(nodes, "a", 0)
    clock.set(-YEAR_S)
    assert 0 <= nodes.status(a)["uptime_s"] < 3600


@pytest.mark.root
def test_nodes_in_different_time_namespaces(nodes: Nodes) -> None:
    """Monotonic clocks differ too, as after a restored snapshot: no node may compare them."""
    a = nodes.mount("a")
    b = nodes.folder / "b"
    b.mkdir()
    nodes.mounts.append(b)
    space = ["unshare", "--time", "--monotonic", "1000000", "--boottime", "2000000", "--fork"]
    command = [*space, *DLMFS, "mount", f"local:{nodes.state}", str(b), "-o", "node=b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip("no time namespaces here")
    assert done.returncode == 0, done.stderr
    for where in (a, b):
        (where / "dom").mkdir()
    offsets = Path(f"/proc/{daemon_pid(b)}/timens_offsets").read_text()
    assert "1000000" in offsets
    fd = os.open(a / "dom/x", EX)
    waiter = nodes.hold(b / "dom/x")
    wanted(fd)
    assert use(b, "try", b / "dom/x") == (errno.ETXTBSY, "")
    os.close(fd)
    assert waiter.wait() == "held"
    info = json.loads(dlmfs("info", "--json", str(b / "dom/x")).stdout)
    assert 0 <= info["local_holders"][0]["since_s"] < 3600
    kill(b)
    assert use(a, "open", a / "dom/x") == (0, "")
