"""Locks and processes: fork, exec, death, signals."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlmfs.client import (
    Cancelled,
    Lock,
    LockLost,
    TimedOut,
    UsageError,
)
from tests.client.conftest import Twice
from tests.client.threads import begin, free, join
from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import holding, until, waiting

pytestmark = pytest.mark.fuse


def in_child(what: Callable[[], object]) -> tuple[int, int]:
    """Fork; the child does it, says whether it went well, and lives until its pipe is closed."""
    reading, writing = os.pipe()
    answer, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        try:
            what()
            os.write(telling, b"y")
            os.read(reading, 1)
        finally:
            os._exit(0)
    os.close(reading)
    os.close(telling)
    assert os.read(answer, 1) == b"y", "it failed in the child"
    os.close(answer)
    return pid, writing


def test_a_forked_child_neither_has_nor_keeps_the_lock(lock: Twice) -> None:
    mine = Lock(lock.a)

    def in_the_child() -> None:
        assert not mine.held
        with pytest.raises(LockLost, match="forked"):
            mine.check()
        with pytest.raises(LockLost):
            mine.get_value()
        mine.release()
        assert not Lock(lock.a).try_acquire()

    with mine:
        mine.set_value(b"x")
        pid, pipe = in_child(in_the_child)
        mine.check()
    try:
        assert free(lock.b), "the child keeps what its parent had"
        with Lock(lock.a):
            pass
    finally:
        os.close(pipe)
        os.waitpid(pid, 0)


def test_a_wait_of_the_parent_is_nothing_to_a_forked_child(lock: Twice) -> None:
    """It neither waits for the parent's mutexes nor begins threads to end the parent's wait."""
    waiter = Lock(lock.b)

    def in_vain() -> None:
        with pytest.raises(Cancelled):
            waiter.acquire()

    with Lock(lock.a):
        thread = begin(in_vain)
        until(lambda: waiting(lock.b), "it waits")
        keeper = waiter._keeper
        assert keeper is not None

        def in_the_child() -> None:
            waiter.cancel()
            waiter.__del__()
            assert threading.active_count() == 1
            assert not waiter.held

        with keeper._mutex:
            pid, pipe = in_child(in_the_child)
        os.close(pipe)
        os.waitpid(pid, 0)
        waiter.cancel()
        join(thread)


def test_a_forked_child_can_use_the_library(lock: Twice) -> None:
    """Its parent's watching thread does not run in it."""
    with Lock(lock.a):
        pass

    def in_the_child() -> None:
        with Lock(lock.b) as mine:
            with pytest.raises(TimedOut):
                Lock(lock.a).acquire(timeout=0.05)
            assert mine.wait_wanted(PATIENCE_S)

    pid, pipe = in_child(in_the_child)
    os.close(pipe)
    os.waitpid(pid, 0)


def test_what_is_opened_in_the_instant_of_a_fork_is_closed_in_the_child(lock: Twice) -> None:
    """In the parent it is opened, and not yet noted."""
    from dlmfs.client import keeper

    with Lock(lock.a) as mine:
        kept = mine._keeper
        assert kept is not None
        fd = kept._fd
        kept.settled.clear()
        kept._fd = -1

        def in_the_child() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

        try:
            pid, pipe = in_child(in_the_child)
        finally:
            kept._fd = fd
            kept.settled.set()
        os.close(pipe)
        os.waitpid(pid, 0)
        assert keeper._keepers


def test_a_forked_child_keeps_no_lock_whatever_its_file_is_called(
    lock: Twice, tmp_path: Path
) -> None:
    """By its name it is a deleted file's; or its mount was detached, which shortens its path."""
    a, b = (path.with_name(f"{path.name} (deleted)") for path in lock)
    seen = tmp_path / "seen"
    seen.mkdir()
    subprocess.run(["mount", "--bind", lock.a.parent.parent, seen], check=True)
    attached = True
    try:
        with Lock(a), Lock(seen / "dom" / f"{lock.a.name}-2") as other:
            subprocess.run(["umount", "--lazy", seen], check=True)
            attached = False
            assert other.held
            pid, pipe = in_child(lambda: None)
        try:
            assert free(b)
            assert free(lock.b.with_name(f"{lock.b.name}-2"))
        finally:
            os.close(pipe)
            os.waitpid(pid, 0)
    finally:
        if attached:
            subprocess.run(["umount", "--lazy", seen], check=True)


FIRST = """
import ctypes, os, sys
from dlmfs.client import Lock
assert os.getpid() == 1
lock = Lock(sys.argv[1])
lock.acquire()
fd = lock.fileno()
assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID
if os.fork() == 0:
    assert os.getpid() == 1
    assert not lock.held
    os.dup2(2, fd)  # the child's own file at that number
    lock.release() if lock.held else lock.__del__()
    os.fstat(fd)
    os.write(1, b"well")
    os._exit(0)
os.wait()
"""


def test_a_forked_child_of_the_same_number_does_not_take_itself_for_the_holder(
    lock: Twice,
) -> None:
    """The first process of a pid namespace may fork the first of another."""
    done = subprocess.run(
        [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            "-c",
            FIRST,
            lock.a,
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdout=subprocess.PIPE,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == b"well"


def test_a_program_that_is_started_does_not_inherit_the_lock(lock: Twice) -> None:
    with Lock(lock.a):
        child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    try:
        assert free(lock.b)
    finally:
        child.kill()
        child.wait()


def test_who_dies_lets_go(lock: Twice) -> None:
    code = "import sys; from dlmfs.client import Lock; lock = Lock(sys.argv[1]); lock.acquire(); "
    code += "print('has', flush=True); sys.stdin.read()"
    source = str(Path(__file__).parents[2] / "src")
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(lock.a)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdout, child.stdin:
        assert select.select([child.stdout], [], [], PATIENCE_S)[0]
        assert child.stdout.readline() == b"has\n"
        assert not free(lock.b)
        child.kill()
        child.wait()
    assert free(lock.b)


def test_an_object_that_nobody_has_any_more_lets_go(lock: Twice) -> None:
    Lock(lock.a).acquire()
    gc.collect()
    assert free(lock.b)


def test_the_programs_signals_are_its_own(lock: Twice) -> None:
    """A signal for the process goes to a thread of its own, and its handlers stay."""
    with Lock(lock.a) as mine:
        (thread,) = holding(lock.a)
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        blocked = int(next(x for x in status.splitlines() if x.startswith("SigBlk")).split()[1], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1):
            assert blocked >> (number - 1) & 1
        assert mine.held
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL


def test_the_file_stays_open_while_it_is_used(lock: Twice) -> None:
    mine = Lock(lock.a)
    mine.acquire()
    keeper = mine._keeper
    assert keeper is not None
    with keeper.using() as fd:
        mine.release()
        os.fstat(fd)
        with pytest.raises(LockLost), keeper.using():
            pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_use_and_release_by_different_threads(lock: Twice) -> None:
    """A descriptor's number may be another file's a moment after it is closed: no use of it comes
    through then."""
    mine = Lock(lock.a)
    stop = threading.Event()
    other = lock.a.parent.parent.parent / "ordinary"
    wrong: list[bytes] = []

    def use() -> None:
        while not stop.is_set():
            try:
                mine.set_value(b"lock's")
            except (LockLost, UsageError):
                continue

    def churn() -> None:
        while not stop.is_set():
            with open(other, "w+b", buffering=0) as file:
                wrong.extend(filter(None, (os.pread(file.fileno(), 64, 0) for _ in range(3))))

    threads = [begin(use), begin(churn)]
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with mine:
            pass
    stop.set()
    join(*threads)
    assert not wrong
