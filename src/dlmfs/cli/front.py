"""The process that was started stays in front; one behind it waits for the lock, and then has it.

What waits in open(2) cannot end while the mount's daemon stands still: once the daemon has read the
request, the kernel lets no signal end the wait, not even SIGKILL, and a process ends with its last
thread. So another process waits. The one in front keeps the time and the signals, and ends as the
one behind it ends, or before.

Rules of this file
------------------
* The one in front decides, once: it answers the one behind, whose wait is over, or it has given up.
* Until then the one behind dies with the one in front. What it is granted later it never uses.
* Until then it has none of the standard streams either: somebody may wait for the end of one of them,
  as a shell does at `$(...)`.
* From then on the one in front only passes signals on, and the exit code back. Should the one behind be
  killed, nobody would look after its command: the one in front, which gets its orphans, ends them. Not
  the children that it had before, as of a shell that started something and then became this program.
* Nor does the one behind hear of a loss while it stands still: the one in front looks at the deadlines
  then. It must not ask the daemon: what waits for that one cannot end.
"""

from __future__ import annotations

import _socket  # what `socket` adds takes long to import
import contextlib
import os
import signal
import struct
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NoReturn

from dlmfs import proc
from dlmfs.cli.say import complain
from dlmfs.cli.signals import (
    AWAITED,
    ENDS,
    LOST,
    SI_KERNEL,
    STOPS,
    become_subreaper,
    pass_on,
    reap,
    suffer,
)
from dlmfs.errors import LockLost, Unavailable

if TYPE_CHECKING:
    from dlmfs.deadline import Deadline

ENDS_WITHIN_S: Final = 1.0
"""How long the end of the one behind is awaited. Only a daemon that stands still leaves one longer."""
ANSWER_S: Final = 15.0
"""Whoever would not wait is answered within this for each lock, unless the daemon stands still: 5 s at
most where the store does not answer, for domain and lock, and 3 s for another node that is silent."""
LOOK_S: Final = 0.1
"""How often the deadlines are looked at in the stead of one that stands still."""
DEADLINES_MAX: Final = 250
"""Descriptors that one message takes (SCM_MAX_FD is 253): of so many mounts."""
WORDS_MAX: Final = 1 + DEADLINES_MAX * 8
PR_SET_PDEATHSIG: Final = 1
STREAMS_SIZE: Final = struct.calcsize("3i")


def no_answer(where: str, wait_s: float) -> Unavailable:
    return Unavailable(
        f"the daemon of {where} has not answered for {wait_s:g} s: it is stopped, or hangs "
        "(`dlmfs status` says which)"
    )


class Behind:
    """The process behind. `wait` is for the one in front, the rest for itself."""

    def __init__(self) -> None:
        """Fork. Raises Unavailable."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._streams = [fd for fd in (0, 1, 2) if _is_open(fd)]
        # Each word is a message of its own: the last two may come together.
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self._front = os.getpid()
        self._others = _children()
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
        self._has_it = False
        self._away = ""
        self._deadlines: list[Deadline] = []
        try:
            self.pid = os.fork()
        except OSError as error:
            raise Unavailable(f"no process can be made: {error.strerror}") from None
        self._socket, other = (theirs, ours) if self.is_here else (ours, theirs)
        other.close()
        if self.is_here:
            self._begin()

    @property
    def is_here(self) -> bool:
        """Whether this process is the one behind."""
        return self.pid == 0

    # -- behind -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """While it waits any signal ends it as if it were a program in C."""
        _die_with_parent(signal.SIGKILL)
        if os.getppid() == 0:
            raise Unavailable("children are in another pid namespace than this (`unshare --fork`)")
        if os.getppid() != self._front:
            os._exit(1)  # it is gone, and nobody asks
        null = os.open(os.devnull, os.O_RDWR)
        for fd in self._streams:
            os.dup2(null, fd)
        os.close(null)
        if not _is_ignored(signal.SIGINT):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number in STOPS:
            if not _is_ignored(number):
                signal.signal(number, _stand_still)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def away(self, why: str) -> None:
        """The node cannot serve, and is waited for; empty: it is asked again. It is told in front, where
        the standard streams are."""
        if why != self._away:
            self._away = why
            with contextlib.suppress(
                BlockingIOError
            ):  # one that is stopped has much to read already
                self._socket.send(b"!" + os.fsencode(why)[:WORDS_MAX], _socket.MSG_DONTWAIT)
            os.kill(self._front, LOST)

    def over(self, deadlines: Iterable[Deadline] = ()) -> None:
        """The wait is over, whatever came of it: until when it is good. Ends here if the one in front
        has given up."""
        passed_on = [each.pass_on() for each in deadlines]
        sessions = struct.pack(f"{len(passed_on)}Q", *(session for _, session in passed_on))
        fds = struct.pack(f"{len(passed_on)}i", *(fd for fd, _ in passed_on))
        message = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)] if fds else []
        self._socket.sendmsg([b"?" + sessions], message)
        os.kill(self._front, LOST)
        space = _socket.CMSG_SPACE(STREAMS_SIZE)
        word, messages, _, _ = self._socket.recvmsg(1, space, _socket.MSG_CMSG_CLOEXEC)
        if not word:
            os._exit(1)
        self._socket.close()
        for number in STOPS:
            if not _is_ignored(number):
                signal.signal(number, signal.SIG_DFL)
        for _, _, data in messages:
            for fd, copy in zip(self._streams, struct.iter_unpack("i", data), strict=True):
                os.dup2(copy[0], fd)
                os.close(copy[0])
        _die_with_parent(0)

    @staticmethod
    def end(code: int) -> NoReturn:
        """At once: the interpreter's own end takes long, and has nothing to do."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # started without it
                stream.flush()
        os._exit(code)

    # -- in front -----------------------------------------------------------------------------------

    def wait(self, limit_s: float | None, late: Exception) -> NoReturn:
        """End as the one behind ends, by its exit code or signal, or by a signal that ends the wait.
        Raises `late` if the wait is not over within `limit_s`; Unavailable if it was for the node."""
        until = None if limit_s is None else time.monotonic() + limit_s
        while True:
            if self._has_it:
                until = self._look_after()
            info = _next(until)
            if info is None and self._has_it:
                continue
            if info is None:
                self._give_up()
                raise self._missed(late)
            number = signal.Signals(info.si_signo)
            if number == signal.SIGCHLD:
                code = reap(self.pid)
                if code is not None and code >= 0:
                    self.end(code)
                if code is not None:
                    self._end_orphans()
                    _end_by(signal.Signals(-code))
            elif number == LOST:
                if not self._has_it and self._is_asked():
                    self._has_it = True
                    become_subreaper()  # first: there must be no command yet that is another's orphan
                    self._answer()
            elif number in ENDS and not self._has_it and not _is_ignored(number):
                self._give_up()
                _end_by(number)
            else:
                pass_on(number, self.pid, everywhere=info.si_code == SI_KERNEL)
                if number in STOPS:
                    suffer(number)

    def _missed(self, late: Exception) -> Exception:
        """What it means that the time is over."""
        return Unavailable(f"{self._away}, and was not back in time") if self._away else late

    def _is_asked(self) -> bool:
        """Read what the one behind has said since; whether it was that its wait is over."""
        while True:
            word, messages = self._heard()
            if word[:1] != b"!":
                break
            why = os.fsdecode(word[1:])
            if why and not self._away:
                complain(f"waiting: {why}")
            self._away = why
        sessions = struct.iter_unpack("Q", word[1:])
        for data in messages:
            from dlmfs.deadline import Deadline

            for fd, session in zip(struct.iter_unpack("i", data), sessions, strict=True):
                self._deadlines.append(Deadline(fd[0], session[0]))
        return word != b""

    def _heard(self) -> tuple[bytes, list[bytes]]:
        """The next word of the one behind, and the descriptors that came with it; nothing: none came."""
        space = _socket.CMSG_SPACE(DEADLINES_MAX * 4)
        flags = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
        try:
            word, messages, _, _ = self._socket.recvmsg(WORDS_MAX, space, flags)
        except BlockingIOError:
            return b"", []
        return word, [data for _, _, data in messages]

    def _look_after(self) -> float | None:
        """Should the one behind stand still and a lock be lost, end the command in its stead: it heeds
        nothing now. When to look again, on time.monotonic; None: when something happens."""
        if not proc.is_stopped(self.pid):
            return None  # one that stops tells us, as it would of its end (SIGCHLD)
        if any(each.passed() for each in self._deadlines):
            self._end_command()
        return time.monotonic() + LOOK_S

    def _end_command(self) -> NoReturn:
        from dlmfs.cli.supervise import GRACE_S, end_all

        complain(
            f"a lock was lost, and pid {self.pid}, which looks after it, is stopped: the command is ended"
        )
        end_all(GRACE_S, root=self.pid)
        os.kill(self.pid, signal.SIGKILL)  # last: with it may go the open file, and so the lock
        self.end(LockLost.exit)

    def _answer(self) -> None:
        """Give the one behind the standard streams."""
        streams = struct.pack(f"{len(self._streams)}i", *self._streams)
        message = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)] if streams else []
        with contextlib.suppress(ConnectionError):  # it has ended meanwhile
            self._socket.sendmsg([b"1"], message)
        self._socket.close()

    def _end_orphans(self) -> None:
        """What was killed behind us may have left."""
        if self._has_it:
            from dlmfs.cli.supervise import GRACE_S, end_all

            others = (pid for pid, fd in self._others.items() if _is_there(fd))
            end_all(GRACE_S, frozenset(others))

    def _give_up(self) -> None:
        """End the wait."""
        os.kill(self.pid, signal.SIGKILL)
        until = time.monotonic() + ENDS_WITHIN_S
        while reap(self.pid) is None and time.monotonic() < until:
            signal.sigtimedwait([signal.SIGCHLD], max(0.0, until - time.monotonic()))


def _next(until: float | None) -> signal.struct_siginfo | None:
    """The next signal; None when it is `until`, on time.monotonic."""
    if until is None:
        return signal.sigwaitinfo(AWAITED)
    return signal.sigtimedwait(AWAITED, max(0.0, until - time.monotonic()))


def _children() -> dict[int, int]:
    """Those of this process, which has one thread, each with a descriptor: its number may be another's
    later."""
    found = {}
    with contextlib.suppress(OSError):
        for pid in proc.children("self", os.getpid()) or ():  # not told (supervise.descendants)
            found[pid] = os.pidfd_open(pid)
    return found


def _is_there(process: int) -> bool:
    """Whether its number is still its own."""
    try:
        signal.pidfd_send_signal(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _stand_still(number: int, _frame: object) -> None:
    """Stop, as it does by default. A signal that is caught ends open(2), which a stop alone does not: so
    the lock is not granted to one that is stopped, and the others wait for nobody (Python opens again
    when it goes on)."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.signal(number, _stand_still)


def _end_by(number: signal.Signals) -> NoReturn:
    suffer(number)
    os._exit(128 + number)  # one that a process survives, or that init(1) does not get


def _die_with_parent(number: int) -> None:
    import ctypes  # the one in front can do without

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
