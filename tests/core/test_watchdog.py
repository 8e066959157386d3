"""The watchdog process: it is told what is so, and whom it cannot reach is said."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlmfs.deadline import boottime
from dlmfs.fence import MESSAGE, Watchdog
from dlmfs.model import OnLost

pytestmark = pytest.mark.allow_warnings

PATIENCE_S = 30.0
NOBODY = (
    1 << 22
) - 1  # the kernel's greatest number of a process, never given out in a test's lifetime


class Loop:
    """The event loop's part, run by hand."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[..., Any]] = {}
        self.writers: dict[int, Callable[..., Any]] = {}

    def add_reader(self, fd: int, callback: Callable[..., Any], *_args: Any) -> None:
        self.readers[fd] = callback

    def add_writer(self, fd: int, callback: Callable[..., Any], *_args: Any) -> None:
        self.writers[fd] = callback

    def remove_reader(self, fd: int) -> bool:
        return self.readers.pop(fd, None) is not None

    def remove_writer(self, fd: int) -> bool:
        return self.writers.pop(fd, None) is not None

    def run_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            readable, writable, _ = select.select([*self.readers], [*self.writers], [], 0.1)
            for fd in readable:
                self.readers[fd]()
            for fd in writable:
                self.writers[fd]()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def watchdog(loop: Loop) -> Iterator[Watchdog]:
    watchdog = Watchdog(OnLost.KILL, 1.0, loop)
    yield watchdog
    watchdog.close()


@pytest.fixture
def program() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
        started.append(subprocess.Popen(command))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


def stop(watchdog: Watchdog) -> None:
    """From here on it reads nothing."""
    os.kill(watchdog.pid, signal.SIGSTOP)
    os.waitpid(watchdog.pid, os.WUNTRACED)


def fill(watchdog: Watchdog) -> None:
    """Changes of others' until the pipe takes no more."""
    number = 0
    while not watchdog.told()["unsent"]:
        number += 1
        watchdog.holds(-number)
    assert number > 100


def test_what_a_full_pipe_did_not_take_comes_later(
    loop: Loop, watchdog: Watchdog, program: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """A holder that was not told of was not killed; one whose close was not told of was, innocently."""
    holder, innocent, late = program(), program(), program()
    watchdog.holds(innocent.pid)
    stop(watchdog)
    fill(watchdog)
    watchdog.holds(holder.pid)
    watchdog.closed(innocent.pid)
    watchdog.alive_until(boottime() + 0.5, boottime() + 0.5)
    watchdog.holds(late.pid)
    watchdog.closed(late.pid)
    os.kill(watchdog.pid, signal.SIGCONT)
    loop.run_until(lambda: holder.poll() is not None)
    assert innocent.poll() is None
    assert late.poll() is None


def test_changes_that_wait_are_one_for_each_thread(loop: Loop, watchdog: Watchdog) -> None:
    """However often a program opens and closes meanwhile."""
    stop(watchdog)
    fill(watchdog)
    before = watchdog.told()["unsent"]
    for _ in range(1000):
        watchdog.holds(os.getpid())
        watchdog.closed(os.getpid())
    assert watchdog.told()["unsent"] == before
    watchdog.holds(os.getpid())
    assert watchdog.told()["unsent"] == before + 1
    os.kill(watchdog.pid, signal.SIGCONT)
    loop.run_until(lambda: not watchdog.told()["unsent"])


def test_times_go_first(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep the innocent alive."""
    stop(watchdog)
    fill(watchdog)
    watchdog.lost()
    for seconds in (1.0, 2.0):
        watchdog.alive_until(seconds, seconds)
    sent: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda _fd, data: sent.append(data))
    watchdog._flush()
    assert sent[0] == MESSAGE.pack(b"d", 0, 2.0, 2.0)
    assert sent[-1][:1] == b"l"
    monkeypatch.undo()
    os.kill(watchdog.pid, signal.SIGCONT)


def test_one_lost_lock_signals_its_holder_alone(
    loop: Loop, watchdog: Watchdog, program: Callable[[], subprocess.Popen[bytes]]
) -> None:
    holder, other = program(), program()
    for each in (holder, other):
        watchdog.holds(each.pid)
    watchdog.lost_one(holder.pid)
    loop.run_until(lambda: holder.poll() is not None)
    assert other.poll() is None
    assert watchdog.told()["holders"] == 1


def test_a_holder_that_cannot_be_found_is_named(loop: Loop, watchdog: Watchdog) -> None:
    for thread in (NOBODY, 0):  # 0: of another pid namespace
        watchdog.holds(thread)
    loop.run_until(lambda: len(watchdog.missing) == 2)
    assert watchdog.told()["missing"] == [0, NOBODY]
    watchdog.closed(0)
    assert watchdog.told()["missing"] == [NOBODY]


def test_its_own_end_is_named(loop: Loop, watchdog: Watchdog) -> None:
    os.kill(watchdog.pid, signal.SIGKILL)
    loop.run_until(lambda: watchdog.ended)
    watchdog.holds(os.getpid())
    assert watchdog.told()["ended"]
    assert not watchdog.told()["unsent"]


def test_a_name_that_is_no_utf8_is_found(loop: Loop, watchdog: Watchdog) -> None:
    """The name of a process is cut at 15 bytes, in the middle of a letter if need be: its status was read
    as text, so it was not found, and worked on after the fence."""
    code = """
import ctypes, sys, time
name = "lock:sicherung\\u00fc".encode()
ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
print("named", flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"named\n"
        watchdog.holds(holder.pid)
        watchdog.alive_until(boottime(), boottime())
        loop.run_until(lambda: holder.poll() is not None)
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


def test_holders_of_a_daemon_that_died_are_signalled_at_once(
    loop: Loop, program: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """Not at the deadline: who takes the daemon's name gives its locks to others before.
    Who does not care is killed in half of the grace, and who has closed is left alone."""
    watchdog = Watchdog(OnLost.KILL, 1.0, loop)
    holder, innocent = program(), program()
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as deaf:
        try:
            assert deaf.stdout is not None
            assert deaf.stdout.readline() == b"1\n"
            watchdog.alive_until(boottime() + 2 * PATIENCE_S, boottime() + 2 * PATIENCE_S)
            for each in (holder, innocent, deaf):
                watchdog.holds(each.pid)
            watchdog.closed(innocent.pid)
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), watchdog._pipe)
            assert holder.wait(PATIENCE_S) == -signal.SIGTERM
            assert deaf.wait(PATIENCE_S) == -signal.SIGKILL
            assert innocent.poll() is None
        finally:
            deaf.kill()
            watchdog.close()


def test_an_end_leaves_no_process_behind_though_it_stands_still(loop: Loop) -> None:
    watchdog = Watchdog(OnLost.KILL, 1.0, loop)
    stop(watchdog)
    fill(watchdog)
    watchdog.close()
    with pytest.raises(ProcessLookupError):
        os.kill(watchdog.pid, 0)
    assert not loop.writers
    assert not loop.readers
