"""The process that was started stays in front; one behind it waits for the lock, and then has it.

What waits in open(2) cannot end while the mount's daemon stands still: once the daemon has read the
request, the kernel lets no signal end the wait, not even SIGKILL, and a process ends with its last
thread. So another process waits. The one in front keeps the time and the signals, and ends as the
one behind it ends, or before.

Rules of this file
------------------
* One byte in a pipe decides, once: the one behind takes it when it has the lock, the one in front when
  it gives up. Whoever finds it gone came too late.
* Until then the one behind dies with the one in front; what it is granted later it never uses.
* From then on the one in front only passes signals on, and the exit code back.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Final, NoReturn

from dlmfs.cli.signals import AWAITED, ENDS, SI_KERNEL, STOPS, pass_on, reap, suffer
from dlmfs.errors import DlmfsError, Unavailable

ENDS_WITHIN_S: Final = 1.0
"""How long the end of the one behind is awaited. Only a daemon that stands still leaves one longer."""
PR_SET_PDEATHSIG: Final = 1


class Chance:
    """Who takes it decides whether the lock is had."""

    def __init__(self) -> None:
        self._pipe, writing = os.pipe()
        os.write(writing, b"1")
        os.close(writing)

    def take(self) -> bool:
        return os.read(self._pipe, 1) != b""


class Behind:
    """The process behind. `wait` is for the one in front, the rest for itself."""

    def __init__(self) -> None:
        """Fork. Raises Unavailable."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._chance = Chance()
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
        front = os.getpid()
        try:
            self.pid = os.fork()
        except OSError as error:
            raise Unavailable(f"no process can be made: {error.strerror}") from None
        if self.is_here:
            self._begin(front)

    @property
    def is_here(self) -> bool:
        """Whether this process is the one behind."""
        return self.pid == 0

    # -- behind -------------------------------------------------------------------------------------

    def _begin(self, front: int) -> None:
        """While it waits any signal ends it as if it were a program in C."""
        _die_with_parent(signal.SIGKILL)
        if os.getppid() != front:
            os._exit(1)
        if not _is_ignored(signal.SIGINT):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def has_it(self) -> None:
        """The lock is granted: to be used if the one in front has not given up, else this ends here."""
        if not self._chance.take():
            os._exit(1)
        _die_with_parent(0)

    @staticmethod
    def end(code: int) -> NoReturn:
        """At once: the interpreter's own end takes long, and has nothing to do."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # started without it
                stream.flush()
        os._exit(code)

    # -- in front -----------------------------------------------------------------------------------

    def wait(self, limit_s: float | None, late: DlmfsError) -> NoReturn:
        """End as the one behind ends, by its exit code or signal, or by a signal that ends the wait.
        Raises `late` if the lock is not had within `limit_s`."""
        until = None if limit_s is None else time.monotonic() + limit_s
        while True:
            info = _next(until)
            if info is None:
                until = None
                if self._give_up():
                    raise late
                continue
            number = signal.Signals(info.si_signo)
            if number == signal.SIGCHLD:
                code = reap(self.pid)
                if code is not None and code >= 0:
                    self.end(code)
                if code is not None:
                    _end_by(signal.Signals(-code))
            elif number in ENDS and not _is_ignored(number) and self._give_up():
                _end_by(number)
            else:
                pass_on(number, self.pid, everywhere=info.si_code == SI_KERNEL)
                if number in STOPS:
                    suffer(number)

    def _give_up(self) -> bool:
        """End the wait. False if it is over: the one behind has the lock."""
        if not self._chance.take():
            return False
        os.kill(self.pid, signal.SIGKILL)
        until = time.monotonic() + ENDS_WITHIN_S
        while reap(self.pid) is None and time.monotonic() < until:
            signal.sigtimedwait([signal.SIGCHLD], max(0.0, until - time.monotonic()))
        return True


def _next(until: float | None) -> signal.struct_siginfo | None:
    """The next signal; None when it is `until`, on time.monotonic."""
    if until is None:
        return signal.sigwaitinfo(AWAITED)
    return signal.sigtimedwait(AWAITED, max(0.0, until - time.monotonic()))


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _end_by(number: signal.Signals) -> NoReturn:
    suffer(number)
    os._exit(128 + number)  # one that a process survives, or that init(1) does not get


def _die_with_parent(number: int) -> None:
    import ctypes  # the one in front can do without

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
