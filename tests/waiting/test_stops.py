"""Stops, debuggers and freezers that meet a waiting open (docs/reference.md, "Signals").

None of them is a signal to the program, and a program without handlers does not expect EINTR from
open(2): so a stop and a debugger end no wait. A control group can be frozen only when its waiters have
their answers: a freezer does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmfs.fuse import mountinfo
from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import EX, Agent, holding, until, waiting, wished
from tests.waiting.conftest import Cluster, MakeAgent
from tests.waiting.test_signals import FEW, PLACES, Queue, Where

pytestmark = pytest.mark.fuse

PTRACE_DETACH, PTRACE_ATTACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 16, 0x4206, 0x4207
WALL = 0x40000000


def state(pid: int) -> str:
    """Its letter as in ps(1)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def interrupted(pid: int) -> None:
    """Until it has noticed whatever came in its wait: from then on it heeds the answer alone."""
    until(lambda: state(pid) == "D", "its wait is interrupted")


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


# -- stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP], ids=lambda n: n.name)
@pytest.mark.parametrize("where", FEW, ids=lambda w: f"{w.rule}-{w.holder}{w.first}{w.second}")
def test_a_stop_ends_no_wait(
    cluster: Cluster, agent: MakeAgent, where: Where, number: signal.Signals
) -> None:
    """A program in C without handlers: stopped and continued three times, it keeps its place."""
    queue = Queue(cluster, agent, where)
    for _ in range(3):
        queue.first.signal(number)
        interrupted(queue.first.pid)
        queue.first.signal(signal.SIGCONT)
    queue.in_order()


def test_who_is_granted_while_it_is_stopped_has_the_lock(
    cluster: Cluster, agent: MakeAgent
) -> None:
    """As in the kernel: it stops when open(2) returns, and goes on with the lock (Ctrl-Z, fg)."""
    queue = Queue(cluster, agent, PLACES[3])
    queue.first.signal(signal.SIGTSTP)
    interrupted(queue.first.pid)
    queue.release()
    stopped(queue.first.pid)
    assert holding(queue.paths[1]) == [queue.first.pid]
    queue.first.signal(signal.SIGCONT)
    queue.first.held("1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGTSTP])
def test_a_signal_ends_one_that_was_stopped(
    cluster: Cluster, agent: MakeAgent, stop: signal.Signals, number: signal.Signals
) -> None:
    """The kernel tells of no second signal, and lets not even SIGKILL through without an answer."""
    here, there = cluster.lock("node", "ab")
    holder, waiter = agent(), agent()
    holder.opens("h", here, EX)
    waiter.waits("w", there, EX)
    waiter.signal(stop)
    interrupted(waiter.pid)
    waiter.signal(number)
    if number != signal.SIGKILL and stop == signal.SIGSTOP:
        waiter.signal(signal.SIGCONT)
    assert waiter.process.wait(PATIENCE_S) == -number
    until(lambda: not waiting(there) and not wished(here), "the wish is withdrawn")


def test_a_handler_runs_in_one_that_was_stopped_and_continued(
    cluster: Cluster, agent: MakeAgent
) -> None:
    here, there = cluster.lock("node", "ab")
    holder, waiter = agent(), agent()
    holder.opens("h", here, EX)
    waiter.waits("w", there, EX)
    waiter.signal(signal.SIGSTOP)
    interrupted(waiter.pid)
    waiter.signal(signal.SIGCONT)
    waiter.signal(signal.SIGUSR1)
    assert waiter.fails("w") == errno.EINTR
    assert waiter.process.poll() is None


def test_a_stopped_holder_keeps_its_lock(cluster: Cluster, agent: MakeAgent) -> None:
    queue = Queue(cluster, agent, PLACES[0])
    queue.holder.signal(signal.SIGSTOP)
    stopped(queue.holder.pid)
    assert holding(queue.paths[0]) == [queue.holder.pid]
    queue.holder.signal(signal.SIGCONT)
    queue.in_order()


# -- debuggers ----------------------------------------------------------------------------------


def attach(pid: int) -> None:
    """As gdb."""
    ptrace(PTRACE_ATTACH, pid)


def seize(pid: int) -> None:
    """As strace."""
    ptrace(PTRACE_SEIZE, pid)
    ptrace(PTRACE_INTERRUPT, pid)


@pytest.mark.parametrize("begin", [attach, seize])
def test_a_debugger_ends_no_wait(
    cluster: Cluster, agent: MakeAgent, begin: Callable[[int], None]
) -> None:
    """It waits itself until the lock is granted; then the program has the lock."""
    queue = Queue(cluster, agent, PLACES[3])
    begin(queue.first.pid)
    interrupted(queue.first.pid)
    queue.release()
    stopped(queue.first.pid)
    ptrace(PTRACE_DETACH, queue.first.pid)
    queue.first.held("1")


def test_a_debugger_that_gives_up_leaves_the_wait_as_it_was(
    cluster: Cluster, agent: MakeAgent
) -> None:
    """`strace -p`, ended before the lock was granted."""
    queue = Queue(cluster, agent, PLACES[3])
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            seize(queue.first.pid)
            signal.pause()
        os._exit(1)
    try:
        status = Path(f"/proc/{queue.first.pid}/status")
        until(lambda: f"TracerPid:\t{child}\n" in status.read_text(), "it is traced")
        interrupted(queue.first.pid)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    queue.in_order()


def test_a_traced_waiter_can_be_ended(cluster: Cluster, agent: MakeAgent) -> None:
    """The kernel does not turn a traced program's fatal signals into SIGKILL."""
    here, there = cluster.lock("node", "ab")
    holder, waiter = agent(), agent()
    holder.opens("h", here, EX)
    waiter.waits("w", there, EX)
    seize(waiter.pid)
    interrupted(waiter.pid)
    waiter.signal(signal.SIGKILL)
    assert waiter.process.wait(PATIENCE_S) == -signal.SIGKILL


# -- freezers -----------------------------------------------------------------------------------


class Group:
    """A control group that can be frozen."""

    def __init__(self, parent: Path, *, v2: bool) -> None:
        self.parent = parent
        self.v2 = v2
        self.path = parent / f"dlmfs-test-{os.getpid()}"
        self.inner = self.path / "inner"
        self.inner.mkdir(parents=True)

    def add(self, pid: int, folder: Path) -> None:
        (folder / "cgroup.procs").write_text(str(pid))

    def freeze(self, on: bool) -> None:
        name, words = (
            ("cgroup.freeze", "01") if self.v2 else ("freezer.state", ["THAWED", "FROZEN"])
        )
        (self.path / name).write_text(words[on])

    def frozen(self) -> bool:
        if self.v2:
            return "frozen 1" in (self.path / "cgroup.events").read_text()
        return (self.path / "freezer.state").read_text() == "FROZEN\n"

    def close(self) -> None:
        self.freeze(on=False)
        for folder in (self.inner, self.path):
            for pid in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    self.add(int(pid), self.parent)
            until(lambda folder=folder: _removed(folder), "the group is removed")  # type: ignore[misc]


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # a process in it is still ending
        folder.rmdir()
    return not folder.exists()


def _parent(version: str) -> Path | None:
    for entry in mountinfo.mounts():
        v1 = entry.fstype == "cgroup" and "freezer" in entry.super_options
        if (version == "v1" and v1) or (version == "v2" and entry.fstype == "cgroup2"):
            return Path(entry.mountpoint)
    return None


@pytest.fixture(params=["v1", "v2"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    parent = _parent(request.param)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip(f"no control groups of {request.param} can be made here")
    made = Group(parent, v2=request.param == "v2")
    try:
        yield made
    finally:
        made.close()


def frozen_with(group: Group, waiter: Agent) -> None:
    """The waiter alone in the group above, or below it."""
    group.add(waiter.pid, group.inner)
    group.freeze(on=True)
    until(group.frozen, "the group is frozen")
    group.freeze(on=False)


def test_a_group_with_a_waiter_is_frozen(cluster: Cluster, agent: MakeAgent, group: Group) -> None:
    """Its open ends with EINTR: FUSE cannot start it again. Nobody else's does."""
    queue = Queue(cluster, agent, PLACES[4])
    frozen_with(group, queue.first)
    assert queue.first.fails("1") == errno.EINTR
    queue.overtaken()


def test_one_that_was_stopped_before_is_frozen_too(
    cluster: Cluster, agent: MakeAgent, group: Group
) -> None:
    """The kernel does not interrupt it once more."""
    queue = Queue(cluster, agent, PLACES[4])
    queue.first.signal(signal.SIGSTOP)
    interrupted(queue.first.pid)
    queue.first.signal(signal.SIGCONT)
    frozen_with(group, queue.first)
    assert queue.first.fails("1") == errno.EINTR
    queue.overtaken()


def test_a_frozen_program_that_tries_again_gets_its_lock(
    cluster: Cluster, agent: MakeAgent, group: Group
) -> None:
    queue = Queue(cluster, agent, PLACES[4], how="loop")
    frozen_with(group, queue.first)
    until(lambda: queue.first.pid in waiting(queue.paths[1]), "it waits again")
    queue.second.kill()
    queue.release()
    queue.first.held("1")


# -- whole commands -----------------------------------------------------------------------------


def test_programs_that_know_nothing_of_eintr(cluster: Cluster, agent: MakeAgent) -> None:
    """cat dies of EINTR. Stopped and continued, it does not get any."""
    (path,) = cluster.lock("file", "a")
    holder = agent()
    holder.opens("h", path, EX)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as cat:
        try:
            until(lambda: cat.pid in waiting(path), "cat waits")
            cat.send_signal(signal.SIGSTOP)
            interrupted(cat.pid)
            cat.send_signal(signal.SIGCONT)
            holder.close("h")
            out, err = cat.communicate(timeout=PATIENCE_S)
        finally:
            cat.kill()
    assert (cat.returncode, len(out), err) == (0, 64, b"")
