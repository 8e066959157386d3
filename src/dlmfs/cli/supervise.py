"""Run one command as flock(1) does, and end all its processes if a lock is lost meanwhile.

Rules of this file
------------------
* The command stays in our process group and session: the terminal, its signals and the shell's job
  control work as if we were not there.
* Signals are blocked and awaited, in the command's stead (signals.py).
* Processes are found by parentage. We are the subreaper of the tree, so whatever detaches itself,
  double fork and new session included, becomes our child; when we have no child left, none lives.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from dlmfs import proc
from dlmfs.cli.say import complain
from dlmfs.cli.signals import (
    AWAITED,
    LOST,
    SI_KERNEL,
    STOPS,
    Echo,
    become_subreaper,
    pass_on,
    reap,
    suffer,
)
from dlmfs.cli.text import plain
from dlmfs.client.logic import is_lost
from dlmfs.deadline import Deadline, boottime, sleep_until
from dlmfs.errors import DlmfsError, LockLost, Unavailable

GRACE_S: Final = 1.0
"""Between SIGTERM and SIGKILL. A fenced node's locks are granted to others after a third of the lease
time, 1.65 s at the shortest (timing.py): all must be over by then."""

WATCHDOG_GRACE_S: Final = 0.5
"""The same after the watchdog's word: with `on-lost=kill` it kills us 0.75 s later, at the shortest."""

LOOK_S: Final = 0.02
KILLING_S: Final = 10.0
"""For processes that do not even die: asleep in the kernel, or another user's."""

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127


class _Watch:
    """Waits for the loss of a lock, in threads of its own: poll(2) asks the daemon, which may stand
    still, and then the deadlines are to be looked at."""

    def __init__(self, locks: Mapping[int, str], deadlines: Mapping[str, Deadline]) -> None:
        self.lost = ""
        self.grace_s = GRACE_S
        self.locks = locks
        # The rest ends with its daemon, and poll(2) tells of that.
        self._deadlines = {path: each for path, each in deadlines.items() if each.at() < math.inf}

    def start(self) -> None:
        """Raises Unavailable."""
        try:
            threading.Thread(target=self._poll, daemon=True).start()
            if self._deadlines:
                threading.Thread(target=self._look, daemon=True).start()
        except RuntimeError as error:
            raise Unavailable(f"the locks cannot be watched: {error}") from None

    def _is_lost(self, path: str) -> None:
        self.lost = self.lost or path
        os.kill(os.getpid(), LOST)

    def _poll(self) -> None:
        poll = select.poll()
        for fd in self.locks:
            poll.register(fd, 0)
        while True:
            for fd, events in poll.poll():
                if is_lost(events):
                    self._is_lost(self.locks[fd])
                    return

    def _look(self) -> None:
        """They are moved on while the node is well; so each is looked at when the last one is there."""
        while True:
            at, path = min((each.at(), path) for path, each in self._deadlines.items())
            if boottime() >= at:
                self._is_lost(path)
                return
            sleep_until(at)


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    locks: Mapping[int, str],
    deadlines: Mapping[str, Deadline],
) -> int:
    """Run the command to its end; its exit code, or what docs/reference.md says of `dlmfs lock`.
    `locks`: open files and their paths; inheritable ones are the command's too. `deadlines`: by the
    path of a lock, of each mount that has one. Raises Unavailable before the command is started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    become_subreaper()
    watch = _Watch(locks, deadlines)
    watch.start()  # first: where no thread can be had, no command may run
    try:
        child = _spawn(command, {**os.environ, **environment}, before)
    except OSError as error:
        complain(f"{plain(command[0])}: {os.strerror(error.errno or 0)}")
        return NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
    code = _await(child, watch)
    if not watch.lost:
        return code if code is not None else 0
    complain(f"{plain(watch.lost)} was lost: the command is ended")
    end_all(watch.grace_s)
    return LockLost.exit


def _spawn(command: Sequence[str], environment: dict[str, str], mask: set[int]) -> int:
    """Start it with the signals as we got them; Python had set these two to be ignored."""
    defaults = [signal.SIGPIPE, signal.SIGXFSZ]

    def spawn(program: str, words: Sequence[str]) -> int:
        return os.posix_spawnp(
            program, list(words), environment, setsigmask=mask, setsigdef=defaults
        )

    try:
        return spawn(command[0], command)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    # A script without its first line: execvp(3), which flock(1) uses, gives it to the shell.
    return spawn("/bin/sh", ["/bin/sh", _found(command[0]), *command[1:]])


def _found(program: str) -> str:
    for folder in os.get_exec_path() if "/" not in program else []:
        path = os.path.join(folder, program)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return program


def _await(child: int, watch: _Watch) -> int | None:
    """The command's exit code when it has ended; None when a lock is lost."""
    echo = Echo(os.getppid())
    while True:
        info = signal.sigwaitinfo(AWAITED)
        number = signal.Signals(info.si_signo)
        if number == signal.SIGCHLD:
            code = reap(child)
            if code is not None:
                return code if code >= 0 else 128 - code
        elif number == LOST:
            if watch.lost:
                return None
        elif number == signal.SIGTERM and (path := _watchdogs_word(info.si_pid, watch.locks)):
            watch.lost, watch.grace_s = path, WATCHDOG_GRACE_S
            return None
        elif not echo.is_it(number, info.si_pid, time.monotonic()):
            pass_on(number, child, everywhere=info.si_code == SI_KERNEL)
            if number in STOPS:
                suffer(number)


def _watchdogs_word(sender: int, locks: Mapping[int, str]) -> str:
    """The lock that is lost, if SIGTERM comes from the watchdog of its mount (`-o on-lost=`): a
    process that the daemon has forked. It may come before we have looked at the deadline."""
    found = proc.stat(sender)
    parent = found.parent if found is not None else 0
    if parent == 0:
        # Gone; or the first process of a pid namespace: a daemon outside of that has the number 0 too.
        return ""
    from dlmfs.control import daemon_pid
    from dlmfs.fuse.mountinfo import find

    for path in locks.values():
        entry = find(path)
        with contextlib.suppress(DlmfsError):
            if entry is not None and daemon_pid(entry) == parent:
                return path
    return ""


# -- the end of all ---------------------------------------------------------------------------------


def descendants(root: int, others: frozenset[int] = frozenset()) -> Iterator[int]:
    """The processes below `root`, but for `others` and what is below those. One that is made or
    orphaned meanwhile may be missed: look again."""
    told = proc.children(root, root) is not None
    children = _children if told else _all_children().__getitem__
    below = [root]
    for pid in below:
        below += (child for child in children(pid) if child not in others)
    yield from below[1:]


def _children(pid: int) -> list[int]:
    """Of all its threads, as the kernel tells (CONFIG_PROC_CHILDREN, nearly everywhere)."""
    return [child for thread in proc.threads(pid) for child in proc.children(pid, thread) or ()]


def _all_children() -> defaultdict[int, list[int]]:
    """The same from one look at everybody: half a second on a host with many thousands."""
    children = defaultdict(list)
    for pid in proc.numbers():
        found = proc.stat(pid)
        if found is not None:
            children[found.parent].append(pid)
    return children


def _signal_all(root: int, others: frozenset[int], *numbers: int) -> None:
    for pid in descendants(root, others):
        for number in numbers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _none_left(root: int, others: frozenset[int]) -> bool:
    """Reap; whether that was the last. Exact, since orphans become our children; beside `others`, who
    live on, and below another process, as exact as the kernel's list of them."""
    if root != os.getpid():  # not ours to reap
        states = map(proc.stat, descendants(root, others))
        return all(found is None or found.state in ("Z", "X") for found in states)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return bool(others) and not any(descendants(root, others))


def end_all(grace_s: float, others: frozenset[int] = frozenset(), root: int | None = None) -> None:
    """SIGTERM to every process below us (or below `root`), SIGKILL after `grace_s` to those that are
    left and to those that they make meanwhile; not to `others`, children that are not the command's.
    One more SIGTERM for us is the watchdog's (`-o on-lost=`), or somebody's who is in a hurry, too."""
    root = root or os.getpid()
    killing_at = time.monotonic() + grace_s
    _signal_all(root, others, signal.SIGTERM, signal.SIGCONT)  # a stopped one cannot heed the first
    while not _none_left(root, others):
        now = time.monotonic()
        if now >= killing_at + KILLING_S:
            left = ", ".join(map(str, descendants(root, others)))
            complain(f"these processes cannot be ended: {left}")
            return
        if now >= killing_at:
            _signal_all(root, others, signal.SIGKILL)
        info = signal.sigtimedwait([signal.SIGCHLD, signal.SIGTERM], LOOK_S)
        if info is not None and info.si_signo == signal.SIGTERM:
            killing_at = min(killing_at, now + WATCHDOG_GRACE_S)
