"""`dlmfs lock PATH... -- COMMAND`: run a command while it has a lock, after flock(1).

Starts quickly: what takes long to import is left out (argparse), or imported when it is needed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getopt
import itertools
import os
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn

from dlmfs.cli.front import ANSWER_S, Behind, no_answer
from dlmfs.cli.say import complain, say
from dlmfs.cli.text import plain
from dlmfs.client import calls, logic
from dlmfs.client.place import Place, place
from dlmfs.deadline import Deadline
from dlmfs.errors import (
    Deadlock,
    DlmfsError,
    LockLost,
    NotGranted,
    TimedOut,
    Unavailable,
    UsageError,
)

USAGE_EXIT: Final = 64
"""As flock(1), which takes its codes from sysexits.h: 2 may well be the command's own."""

LOOK_S: Final = 0.5

HELP: Final = """\
usage: dlmfs lock [OPTIONS] PATH... -- COMMAND [ARG...]
       dlmfs lock [OPTIONS] PATH COMMAND [ARG...]
       dlmfs lock [OPTIONS] PATH -c 'SHELL COMMAND'

Run a command while it has the locks PATH... (MOUNTPOINT/DOMAIN/LOCK, or DOMAIN/LOCK below the only
mount); made if they are missing. If a lock is lost the command and all its processes are ended.

  -x, -e, --exclusive   alone (the default)
  -s, --shared          together with others who hold it shared
  -n, --nonblock        do not wait
  -w, --wait SECONDS    wait so long at most
  -E, --conflict-exit-code NUMBER
                        exit code if the lock was not granted (default 1)
  -c, --command         COMMAND is one word, for the shell
      --slots N         have one of N slots of PATH, made of the locks PATH.1 to PATH.N
  -o, --close           the command does not inherit the lock's open file
      --verbose         say how long the wait was, or that it was in vain

Exit code: the command's own, or 128+n if signal n ended it; 1 (-E) not granted; 64 wrong arguments;
69 unavailable; 75 a lock was lost while the command ran; 77 not permitted; 126 the command cannot be
executed; 127 it was not found. In its environment: DLMFS_LOCK, DLMFS_MODE (EX, PR), DLMFS_TOKEN,
DLMFS_SLOT.
"""

SHORT: Final = "sxenw:E:coh"
LONG: Final = [
    "shared",
    "exclusive",
    "nonblock",
    "nb",
    "wait=",
    "timeout=",
    "conflict-exit-code=",
    "command",
    "slots=",
    "close",
    "verbose",
    "help",
]


class Order:
    """What the command line asks for."""

    def __init__(self) -> None:
        self.shared = False
        self.trying = False
        self.wait_s: float | None = None
        self.conflict_exit = NotGranted.exit
        self.shell = False
        self.slots = 0
        self.close = False
        self.verbose = False
        self.help = False
        self.paths: list[str] = []
        self.command: list[str] = []


def parse(args: list[str]) -> Order:
    """The order that a command line gives. Raises UsageError."""
    order = Order()
    try:
        options, words = getopt.getopt(args, SHORT, LONG)
    except getopt.GetoptError as error:
        _refuse(error.msg)
    for name, value in options:
        _set(order, name, value)
    if order.help:
        return order
    _split(order, words)
    if order.slots and order.shared:
        _refuse("a slot is nobody else's: --slots goes without -s")
    if order.shell:
        if len(order.command) != 1:
            _refuse("-c takes the command as one word")
        order.command = [os.environ.get("SHELL") or "/bin/sh", "-c", *order.command]
    if not order.command:
        _refuse("no command is given")
    return order


def _set(order: Order, name: str, value: str) -> None:
    match name:
        case "-s" | "--shared":
            order.shared = True
        case "-x" | "-e" | "--exclusive":
            order.shared = False
        case "-n" | "--nonblock" | "--nb":
            order.trying = True
        case "-w" | "--wait" | "--timeout":
            order.wait_s = _seconds(value)
            order.trying = order.trying or order.wait_s == 0
        case "-E" | "--conflict-exit-code":
            if not (value.isascii() and value.isdigit() and int(value) <= 255):
                _refuse(f"-E takes a number from 0 to 255, not '{value}'")
            order.conflict_exit = int(value)
        case "-c" | "--command":
            order.shell = True
        case "--slots":
            if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 256):
                _refuse(f"--slots takes a number from 1 to 256, not '{value}'")
            order.slots = int(value)
        case "-o" | "--close":
            order.close = True
        case "--verbose":
            order.verbose = True
        case _:
            order.help = True


def _seconds(text: str) -> float:
    plain = text.isascii() and text.replace(".", "", 1).isdigit()
    if not plain or float(text) > 1e8:
        _refuse(f"-w takes seconds, not '{text}'")
    return float(text)


def _split(order: Order, words: list[str]) -> None:
    """The words after the options: PATH... -- COMMAND; or PATH COMMAND as flock(1) has it, with its
    -c after the PATH."""
    at = words.index("--") if "--" in words else 1
    order.paths, order.command = words[:at], words[at:]
    if order.command[:1] == ["--"]:
        del order.command[0]
    if not order.shell and order.command[:1] in (["-c"], ["--command"]):
        order.shell = True
        del order.command[0]
    if not order.paths:
        _refuse("no PATH is given")


def _refuse(what: str) -> NoReturn:
    raise UsageError(f"{what} (see `dlmfs lock --help`)")


def arrange(paths: list[str]) -> list[Place]:
    """The locks in the order in which they are taken, each once. Raises UsageError."""
    places = sorted({place(path, near=True) for path in paths}, key=lambda p: p.order)
    for one, other in itertools.pairwise(places):
        if one.order[:3] == other.order[:3]:
            raise UsageError(f"{one.path} and {other.path} are one lock by two mounts: name one")
    if len(places) > 1 and any("\n" in p.path for p in places):
        raise UsageError("a path with a newline in it cannot be one of several")
    return places


def run(args: list[str]) -> int:
    """Take the locks, run the command; see HELP for the exit codes."""
    places: list[Place] = []
    try:
        order = parse(args)
        if order.help:
            say(*HELP.splitlines())
            return 0
        places = arrange(order.paths)
        if order.slots and len(places) > 1:
            _refuse("--slots takes one PATH")
        if "DLMFS_LOCK" in os.environ and not order.slots:
            from dlmfs.cli import nested

            nested.refuse(places, dict(os.environ), shared=order.shared)
        _call_oneself(order.command[0])
        begun = time.monotonic()
        behind = Behind()
        if not behind.is_here:
            behind.wait(*limit(places, order))
        until: dict[str, Deadline] = {}
        try:
            fds, until, tokens = take(places, order, behind.away)
        finally:
            behind.over(until.values())
    except UsageError as error:
        complain(str(error))
        return USAGE_EXIT if error.exit == UsageError.exit else error.exit
    except (TimedOut, Unavailable) as error:
        return _in_vain(error, order, places)
    except NotGranted as error:
        return _refused(error, order, places)
    if order.verbose:
        waited = time.monotonic() - begun
        complain(f"having the lock took {waited:.6f} s")
    environment = {
        "DLMFS_LOCK": "\n".join(p.path for p in fds),
        "DLMFS_MODE": "PR" if order.shared else "EX",
        "DLMFS_TOKEN": "\n".join(map(str, tokens)),
    }
    from dlmfs.cli.supervise import supervise

    if not order.close:
        for fd in fds.values():
            os.set_inheritable(fd, True)
    locks = {fd: p.path for p, fd in fds.items()}
    return behind.end(supervise(order.command, environment, locks, until))


def _refused(error: NotGranted, order: Order, places: list[Place]) -> int:
    if order.verbose or isinstance(error, Deadlock):
        alone = len(places) == 1 and not order.slots
        which = f" {plain(places[0].path)}" if alone else ""
        complain(f"{error} (`dlmfs why{which}` says who is in the way)")
    return order.conflict_exit


def _in_vain(error: TimedOut | Unavailable, order: Order, places: list[Place]) -> int:
    """A lock that nobody has, and that the store does not give, is not a busy one."""
    from dlmfs.cli.hindrance import hindrance

    why = hindrance(places)
    if why is None and isinstance(error, TimedOut):
        return _refused(error, order, places)
    complain(f"{error}: {why}" if why is not None else str(error))
    return Unavailable.exit if isinstance(error, TimedOut) else error.exit


def _call_oneself(command: str) -> None:
    """Where processes are told by name (status, why, top, ps) all holders would be one `dlmfs`."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb", buffering=0) as file:
        file.write(b"lock:" + os.fsencode(os.path.basename(command)))  # the kernel cuts it at 15


def take(
    places: list[Place], order: Order, away: Callable[[str], None]
) -> tuple[dict[Place, int], dict[str, Deadline], list[int]]:
    """The open files of the locks, all of them granted; the deadlines that they are good until, and their
    tokens. What was lost again before all were there is taken anew: nothing has run yet."""
    do = partial(_do, away)
    while True:
        fds: dict[Place, int] = {}
        until: dict[str, Deadline] = {}
        try:
            if order.slots:
                from dlmfs.cli import slots

                fds = slots.take(places[0], order.slots, trying=order.trying)
            else:
                for each in places:
                    request = logic.Request(each, order.shared, order.trying)
                    fds[each] = logic.drive(logic.taking(request), do)
            until = deadlines(list(fds))
            # Asked after that: so it is the session of these grants whose deadline was found.
            return fds, until, [token(fd, where) for where, fd in fds.items()]
        except LockLost as lost:
            if order.trying or order.slots:
                raise
            for fd in fds.values():
                os.close(fd)
            for each_until in until.values():
                each_until.close()
            do(logic.Pause(logic.PAUSES_S[0], str(lost)))


def deadlines(places: list[Place]) -> dict[str, Deadline]:
    """That of each mount that has one, by the path of a lock there. To be found after the grant."""
    one_each = {p.dev: p for p in places}
    found = {p.path: Deadline.find(p.dev, p.uid) for p in one_each.values()}
    return {path: deadline for path, deadline in found.items() if deadline is not None}


def limit(places: list[Place], order: Order) -> tuple[float | None, DlmfsError]:
    """How many seconds the locks are waited for, all together, and what it means if they are not had
    by then."""
    if order.trying:
        wait_s = ANSWER_S * len(places)
        return wait_s, no_answer(" or ".join(sorted({p.mountpoint for p in places})), wait_s)
    return order.wait_s, TimedOut("the lock could not be had in that time")


def _do(away: Callable[[str], None], step: logic.Step) -> object:
    """One step. Python's calls go on after a signal."""
    match step:
        case logic.Open(path, flags):
            fd = os.open(path, flags)
            if fd > 2:
                return fd
            # Started without standard streams: the lock must not become the command's input.
            high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(fd)
            return high
        case logic.MakeLock(path):
            os.mknod(path, logic.MODE)
        case logic.MakeDomain(path):
            os.mkdir(path)
        case logic.Device(fd):
            return os.fstat(fd).st_dev
        case logic.Exclude(fd, operation):
            _exclude(fd, operation)
        case logic.Token(fd):
            calls.token(fd)
        case logic.Close(fd):
            os.close(fd)
        case logic.Pause(seconds, why):
            away(why)
            time.sleep(calls.spread(seconds))
        case logic.State(mountpoint):
            return calls.state(mountpoint)
        case logic.Waiters(path):
            return calls.waiters(path)
    return 0


def _exclude(fd: int, operation: int) -> None:
    """flock(2), which waits for whoever has the file locked and not for the mount: one that does not
    notice a loss would keep us waiting for nothing. So we look at our own file meanwhile."""

    def look(*_: object) -> None:
        poll = select.poll()
        poll.register(fd, 0)
        if any(logic.is_lost(events) for _, events in poll.poll(0)):
            os.getxattr(fd, logic.TOKEN)  # raises what is the matter
            raise OSError(errno.EIO, "lost")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
    try:
        fcntl.flock(fd, operation)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def token(fd: int, where: Place) -> int:
    """The fencing token of an open lock. Raises LockLost."""
    try:
        return calls.token(fd)
    except OSError as error:
        raise logic.failure(error, where.path) from None
