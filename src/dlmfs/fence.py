"""What happens at the end of a lease even if the daemon's event loop, or the daemon, stands still.

`LeaseTimer` is a thread of the daemon: it notices the deadline when the event loop is stalled.
`Watchdog` is a process of its own: a stopped daemon cannot stop it. It signals the processes that
hold locks (`-o on-lost=`), by descriptors of processes, so never one that has another's number.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import threading
from collections.abc import Callable
from typing import Final

from dlmfs import proc
from dlmfs.deadline import boottime
from dlmfs.model import OnLost
from dlmfs.timing import Clock

LOOK_S: Final = 0.5
"""The deadline is looked at this often: sleeping does not count the time of a suspended machine."""


class LeaseTimer(threading.Thread):
    """Calls `act` from its thread once for each deadline that passes. `fence_at`: the present one."""

    def __init__(
        self, fence_at: Callable[[], float | None], clock: Clock, act: Callable[[], None]
    ) -> None:
        super().__init__(name="lease-timer", daemon=True)
        self._fence_at = fence_at
        self._clock = clock
        self._act = act
        self._stop = threading.Event()

    def run(self) -> None:
        fired: float | None = None
        while not self._stop.is_set():
            at = self._fence_at()
            left = LOOK_S
            if at is not None and at != fired:
                left = at - self._clock()
                if left <= 0:
                    fired = at
                    self._act()
                    left = LOOK_S
            self._stop.wait(min(left, LOOK_S))

    def close(self) -> None:
        self._stop.set()


MESSAGE: Final = struct.Struct("=cid")
"""Kind, process (or 0), seconds: see Watchdog."""


class Watchdog:
    """The daemon's end of it. Forked before any thread is started."""

    def __init__(self, on_lost: OnLost, grace_s: float) -> None:
        """`grace_s`: what holders have where their locks do not end by a deadline."""
        self.on_lost = on_lost
        self._kill_after_s = grace_s / 2
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                _close_all_but(reading)
                _Guard(reading, on_lost).run()
            os._exit(0)
        os.close(reading)
        os.set_blocking(writing, False)
        self._pipe = writing

    def _send(self, kind: bytes, pid: int = 0, seconds: float = 0.0) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, MESSAGE.pack(kind, pid, seconds))

    def alive_until(self, fence_at: float, kill_at: float) -> None:
        """The lease is good until then; those that ignore SIGTERM are killed at `kill_at`."""
        self._send(b"d", 0, fence_at)
        self._send(b"k", 0, kill_at)

    def holds(self, pid: int) -> None:
        """A thread of this process has one more open lock file."""
        self._send(b"+", pid)

    def closed(self, pid: int) -> None:
        self._send(b"-", pid)

    def lost(self) -> None:
        """The node is fenced before its deadline, or its life ends. Those that ignore SIGTERM are killed
        when half of the grace is over. Who opens a lock later is of a new incarnation."""
        self._send(b"l", 0, boottime() + self._kill_after_s)

    def close(self) -> None:
        """A clean end: nobody is to be signalled."""
        self._send(b"q")
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _close_all_but(fd: int) -> None:
    """The daemon's files are not this process's: somebody may wait for the end of one of them."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))


class _Guard:
    """The other end. An end of the pipe without a word is the daemon's death: its locks run out at
    the deadline like those of a stopped one."""

    def __init__(self, pipe: int, on_lost: OnLost) -> None:
        self.pipe = pipe
        self.on_lost = on_lost
        self.held: dict[int, tuple[int, int]] = {}
        """By thread: a descriptor of its process, and how many locks it has open."""
        self.fence_at: float | None = None
        self.kill_at = 0.0
        self.dying: list[tuple[int, float]] = []
        """Descriptors of processes that got SIGTERM, and when they are killed."""

    def run(self) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        daemon_is_there = True
        while daemon_is_there or self.held or self.dying:
            ready, _, _ = select.select([self.pipe] if daemon_is_there else [], [], [], LOOK_S / 5)
            if ready:
                message = os.read(self.pipe, MESSAGE.size)
                if len(message) < MESSAGE.size:
                    daemon_is_there = False
                    if self.fence_at is None:
                        return
                elif not self._take(*MESSAGE.unpack(message)):
                    return
            self._look()

    def _take(self, kind: bytes, pid: int, seconds: float) -> bool:
        if kind == b"d":
            self.fence_at = seconds
        elif kind == b"k":
            self.kill_at = seconds
        elif kind == b"+":
            self._add(pid)
        elif kind == b"-" and pid in self.held:
            fd, count = self.held.pop(pid)
            if count > 1:
                self.held[pid] = (fd, count - 1)
            else:
                os.close(fd)
        elif kind == b"l":
            self._terminate(seconds)
        return kind != b"q"

    def _add(self, pid: int) -> None:
        known = self.held.get(pid)
        if known is not None:
            self.held[pid] = (known[0], known[1] + 1)
            return
        group = proc.group(pid)
        if group is not None:
            with contextlib.suppress(OSError):
                self.held[pid] = (os.pidfd_open(group), 1)

    def _look(self) -> None:
        now = boottime()
        if self.fence_at is not None and now >= self.fence_at and self.held:
            self._terminate(self.kill_at)
        for fd, _ in [each for each in self.dying if now >= each[1]]:
            if self.on_lost is OnLost.KILL:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
        self.dying = [each for each in self.dying if now < each[1]]

    def _terminate(self, kill_at: float) -> None:
        for fd, _ in self.held.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGTERM)
            self.dying.append((fd, kill_at))
        self.held.clear()
