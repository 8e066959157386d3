"""What happens at the end of a lease even if the daemon's event loop, or the daemon, stands still.

`LeaseTimer` is a thread of the daemon: it notices the deadline when the event loop is stalled.
`Watchdog` is a process of its own: a stopped daemon cannot stop it. It signals the processes that
hold locks (`-o on-lost=`), by descriptors of processes, so never one that has another's number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from dlmfs import privileges, proc
from dlmfs.deadline import boottime
from dlmfs.model import OnLost
from dlmfs.timing import Clock

log = logging.getLogger("dlmfs.node")

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
            left = LOOK_S
            try:
                at = self._fence_at()
                if at is not None and at != fired:
                    left = at - self._clock()
                    if left <= 0:
                        fired, left = at, LOOK_S
                        self._act()
            except Exception:  # without this thread a stalled event loop would go unnoticed
                log.exception("a fault in the lease's timer")
            self._stop.wait(min(left, LOOK_S))

    def close(self) -> None:
        self._stop.set()


MESSAGE: Final = struct.Struct("=cidd")
"""Kind, thread (or 0), and two times in seconds: see `Watchdog`."""

COMPLAINT: Final = struct.Struct("=i")
"""A thread whose process the other end could not find."""

CHUNK: Final = 1 << 16

SILENT_S: Final = 60.0
"""Between two words in the log of holders that are not to be found: they may come and go."""


class Loop(Protocol):
    """What is needed of an event loop."""

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> object: ...

    def remove_reader(self, fd: int) -> bool: ...

    def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> object: ...

    def remove_writer(self, fd: int) -> bool: ...


class Watchdog:
    """The daemon's end of it. Forked before any thread is started.

    The pipe carries what is so, not what happened: which threads hold a good lock, and until when. What
    it does not take is kept, the newest of each, and sent when there is room. `missing`: threads of
    holders that could not be found, so that nobody would signal them."""

    def __init__(self, on_lost: OnLost, grace_s: float, loop: Loop) -> None:
        """`grace_s`: what holders have where their locks do not end by a deadline."""
        self.on_lost = on_lost
        self.ended = False
        """The process is gone: nobody would be signalled."""
        self.missing: set[int] = set()
        self._kill_after_s = grace_s / 2
        self._loop = loop
        self._held: dict[int, int] = {}
        """How many good locks each thread has open."""
        self._told: set[int] = set()
        """The threads that the other end is told of, when all is sent."""
        self._times: bytes | None = None
        self._orders: deque[bytes] = deque()
        self._changed: dict[int, None] = {}
        self._writing = False
        self._silent_until = 0.0
        states, self._pipe = os.pipe()
        self._complaints, complaints = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                _close_all_but(states, complaints)
                privileges.confine(privileges.WATCHDOG)
                _Guard(states, complaints, on_lost, self._kill_after_s).run()
            os._exit(0)
        os.close(states)
        os.close(complaints)
        os.set_blocking(self._pipe, False)
        os.set_blocking(self._complaints, False)
        loop.add_reader(self._complaints, self._complained)

    def alive_until(self, fence_at: float, kill_at: float) -> None:
        """The lease is good until then; those that ignore SIGTERM are killed at `kill_at`."""
        self._times = MESSAGE.pack(b"d", 0, fence_at, kill_at)
        self._flush()

    def holds(self, pid: int) -> None:
        """A thread has one more open lock file."""
        count = self._held[pid] = self._held.get(pid, 0) + 1
        if count == 1:
            self._change(pid)

    def closed(self, pid: int) -> None:
        """It has closed one that was good."""
        count = self._held.get(pid, 0) - 1
        if count > 0:
            self._held[pid] = count
        elif count == 0:
            del self._held[pid]
            self.missing.discard(pid)
            self._change(pid)

    def lost(self) -> None:
        """The node is fenced before its deadline, or its life ends. Those that ignore SIGTERM are killed
        when half of the grace is over. Who opens a lock later is of a new incarnation."""
        # In this order: the other end signals those that it was told of.
        self._orders += [self._state(pid) for pid in self._changed]
        self._orders.append(MESSAGE.pack(b"l", 0, 0.0, boottime() + self._kill_after_s))
        self._changed.clear()
        self._held.clear()
        self._told.clear()
        self.missing.clear()
        self._flush()

    def lost_one(self, pid: int) -> None:
        """One lock of this thread is lost; what else it has is good."""
        if pid in self._changed:
            del self._changed[pid]
            self._orders.append(self._state(pid))
        self._orders.append(MESSAGE.pack(b"x", pid, 0.0, boottime() + self._kill_after_s))
        self.closed(pid)
        self._flush()

    def told(self) -> dict[str, Any]:
        """For `dlmfs status`."""
        return {
            "on_lost": self.on_lost.value,
            "ended": self.ended,
            "holders": len(self._held),
            "missing": sorted(self.missing),
            "unsent": len(self._orders) + len(self._changed) + (self._times is not None),
        }

    def close(self) -> None:
        """A clean end: nobody is to be signalled."""
        self._loop.remove_reader(self._complaints)
        self._orders.append(MESSAGE.pack(b"q", 0, 0.0, 0.0))
        self._flush()
        if self._writing:
            self._loop.remove_writer(self._pipe)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # it stands still; its word would be an old one
        for fd in (self._pipe, self._complaints):
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    # -- the pipe ---------------------------------------------------------------------------------

    def _change(self, pid: int) -> None:
        """Whether this thread holds anything has changed."""
        if (pid in self._held) == (pid in self._told):
            self._changed.pop(pid, None)  # and back, before it was sent
        else:
            self._changed[pid] = None
            self._flush()

    def _state(self, pid: int) -> bytes:
        holds = pid in self._held
        (self._told.add if holds else self._told.discard)(pid)
        return MESSAGE.pack(b"+" if holds else b"-", pid, 0.0, 0.0)

    def _flush(self) -> None:
        """Send what there is room for, the times first: they keep the innocent alive."""
        full = False
        if self.ended:
            self._gone()
        try:
            while self._times or self._orders or self._changed:
                if self._times:
                    os.write(self._pipe, self._times)
                    self._times = None
                elif self._orders:
                    os.write(self._pipe, self._orders[0])
                    self._orders.popleft()
                else:
                    pid = next(iter(self._changed))
                    os.write(self._pipe, self._state(pid))
                    del self._changed[pid]
        except BlockingIOError:
            full = True
        except BrokenPipeError:
            self._gone()
        if full != self._writing:
            self._writing = full
            if full:
                self._loop.add_writer(self._pipe, self._flush)
            else:
                self._loop.remove_writer(self._pipe)

    def _gone(self) -> None:
        self._times = None
        self._orders.clear()
        self._changed.clear()
        if not self.ended:
            self.ended = True
            log.error("the watchdog process %d has ended: on-lost= is without effect", self.pid)

    def _complained(self) -> None:
        try:
            words = os.read(self._complaints, CHUNK)
        except BlockingIOError:
            return
        if not words:
            self._loop.remove_reader(self._complaints)
            self._gone()
        lost = {pid for (pid,) in COMPLAINT.iter_unpack(words) if pid in self._held} - self.missing
        self.missing |= lost
        now = boottime()
        if lost and now >= self._silent_until:
            self._silent_until = now + SILENT_S
            log.warning(
                "on-lost= cannot reach %d holders: the process of thread %d is not to be found",
                len(self.missing),
                min(lost),
            )


def _close_all_but(*kept: int) -> None:
    """The daemon's files are not this process's: somebody may wait for the end of one of them."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    start = 3
    for fd in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(start, fd)
        start = fd + 1


class _Guard:
    """The other end. An end of the pipe without a word is the daemon's death: its mount is dead, too, and
    who takes its name gives the locks to others before the deadline, after a grace."""

    def __init__(self, pipe: int, complaints: int, on_lost: OnLost, kill_after_s: float) -> None:
        self.pipe = pipe
        self.complaints = complaints
        self.on_lost = on_lost
        self.kill_after_s = kill_after_s
        self.held: dict[int, int] = {}
        """By thread: a descriptor of its process."""
        self.fence_at: float | None = None
        self.kill_at = 0.0
        self.dying: list[tuple[int, float]] = []
        """Descriptors of processes that got SIGTERM, and when they are killed."""

    def run(self) -> None:
        os.setsid()
        os.set_blocking(self.complaints, False)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        daemon_is_there = True
        while daemon_is_there or self.dying:
            ready, _, _ = select.select([self.pipe] if daemon_is_there else [], [], [], LOOK_S / 5)
            if ready:
                # Whole messages only: each is written at once, and so is a multiple of them read.
                words = os.read(self.pipe, CHUNK // MESSAGE.size * MESSAGE.size)
                if not words:
                    daemon_is_there = False
                    self._orphaned()
                if not all(self._take(*message) for message in MESSAGE.iter_unpack(words)):
                    return
            self._look()

    def _take(self, kind: bytes, pid: int, first: float, second: float) -> bool:
        if kind == b"d":
            self.fence_at, self.kill_at = first, second
        elif kind == b"+" and pid not in self.held:
            self._add(pid)
        elif kind == b"-" and pid in self.held:
            os.close(self.held.pop(pid))
        elif kind == b"l":
            self._terminate(second)
        elif kind == b"x" and pid in self.held:
            self._signal(os.dup(self.held[pid]), second)
        return kind != b"q"

    def _add(self, pid: int) -> None:
        group = proc.group(pid)
        try:
            if group is None:
                raise ProcessLookupError
            self.held[pid] = os.pidfd_open(group)
        except OSError:  # gone; of another pid namespace; or too many of them
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self.complaints, COMPLAINT.pack(pid))

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

    def _orphaned(self) -> None:
        """The daemon has died. Those that ignore SIGTERM are killed in half of the grace, or when they
        would be in any case."""
        kill_at = boottime() + self.kill_after_s
        self._terminate(kill_at if self.fence_at is None else min(kill_at, self.kill_at))

    def _terminate(self, kill_at: float) -> None:
        for fd in self.held.values():
            self._signal(fd, kill_at)
        self.held.clear()

    def _signal(self, process: int, kill_at: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGTERM)
        self.dying.append((process, kill_at))
