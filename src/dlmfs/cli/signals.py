"""Signals that are awaited in another process's stead, and passed on to it.

They are blocked first, so that nothing comes between the start of that process and our being ready
for it. A signal that the kernel sent to the whole group (the terminal's) has reached it already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Final

SI_KERNEL: Final = 0x80
PR_SET_CHILD_SUBREAPER: Final = 36

STOPS: Final = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
ENDS: Final = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
    }
)
"""What ends a process that does nothing about it."""
LOST: Final = signal.SIGIO
"""A watching thread's word to the main one."""

ECHO_S: Final = 1.0
"""Somebody who sends a signal to both of our processes by hand means no more by it."""

AWAITED: Final = ENDS | STOPS | {signal.SIGCONT, signal.SIGWINCH, signal.SIGCHLD, LOST}


def pass_on(number: signal.Signals, child: int, *, everywhere: bool) -> None:
    """`everywhere`: the kernel has sent it to our whole process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not everywhere or os.getpgid(child) != os.getpgrp():
            os.kill(child, number)


def suffer(number: signal.Signals) -> None:
    """Let it do to us what it does by default. Returns when a stopped process is continued."""
    if number not in STOPS | {signal.SIGKILL}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_kill(threading.get_ident(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})


class Echo:
    """A signal to a whole group or control group comes by itself, and from the process in front, too."""

    def __init__(self, front: int) -> None:
        self._front = front
        self._last: tuple[int, bool, float] | None = None

    def is_it(self, number: int, sender: int, now: float) -> bool:
        """Whether this signal (from a process, at `now` seconds) is the one before once more."""
        passed_on, before = sender == self._front, self._last
        again = (
            before is not None
            and before[0] == number
            and before[1] != passed_on
            and now < before[2] + ECHO_S
        )
        self._last = None if again else (number, passed_on, now)
        return again


def become_subreaper() -> None:
    """From now on orphans below this process become its children (prctl(2))."""
    import ctypes  # takes long, and who only waits can do without

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(child: int) -> int | None:
    """Take the status of whatever has ended; that of `child` if it is among that: its exit code, or
    -n if signal n ended it."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
    return code
