"""`dlmfs value get|set|watch PATH`: the 64 bytes that travel with a lock.

`get` takes the lock shared, `set` exclusively; both for no longer than it takes. `watch` keeps it
shared and lets go whenever somebody wants it exclusively: a write then costs its writer one more
hand-over, and this node one commit to come back. What was overwritten before it came back is not
seen.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from dlmfs.cli.choice import ask, lock_at
from dlmfs.cli.front import ANSWER_S, Behind, no_answer
from dlmfs.cli.hindrance import hindrance
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import complain, say_bytes
from dlmfs.cli.text import plain
from dlmfs.client import logic
from dlmfs.client.place import Place
from dlmfs.errors import DlmfsError, LockLost, NotPermitted, StoreFull, Unavailable, UsageError
from dlmfs.model import EMPTY_LVB, LVB_SIZE
from dlmfs.rundir import owner_of

T = TypeVar("T")

LOOK_S: Final = 1.0
"""How often `watch` looks at a value that it holds: under holder=node a writer of the same node need
not wait for it, and wakes nobody."""
BACK_S: Final = 1.0
"""Between two attempts to come back after a loss."""
EPILOG: Final = """\
exit codes: 0 done; 1 (or CODE) the lock is busy, or the value or token is not the expected one;
otherwise as every command (docs/reference.md)
"""


class Conflict(Exception):
    """The lock could not be had in time, or is not as expected: in words."""


def run(args: list[str]) -> int:
    parser = Parser(prog="dlmfs value", description="Read, write or follow a lock's value.")
    verbs = parser.add_subparsers(dest="verb", metavar="get|set|watch", required=True)
    for verb, what in (
        ("get", "take the lock shared, print its value, give it back"),
        ("set", "take the lock exclusively, write its value, give it back"),
        ("watch", "print the value, and again whenever it has changed"),
    ):
        _options(verb, verbs.add_parser(verb, help=what, description=what, epilog=EPILOG))
    parsed = parser.parse_args(args)
    if parsed.wait is not None and not 0 <= parsed.wait < math.inf:
        raise UsageError("-w SECS: give seconds, 0 or more")
    if not 0 <= parsed.conflict_exit_code <= 255:
        raise UsageError("-E CODE: give a number from 0 to 255")
    entry, domain, lock = lock_at(parsed.path)
    parsed.path = os.path.join(entry.mountpoint, domain, lock)
    parsed.place = Place(entry.mountpoint, entry.dev, entry.source, domain, lock, owner_of(entry))
    if parsed.verb == "get" and parsed.stale:
        report = ask(entry, {"cmd": "info", "domain": domain, "lock": lock})
        _print(parsed, bytes.fromhex(report["lvb_hex"]), None, report["abandoned"], stale=True)
        return 0
    try:
        if parsed.verb == "watch":
            _watch(parsed)
        elif parsed.verb == "get":
            _get(parsed)
        else:
            _set(parsed)
    except Conflict as conflict:
        complain(str(conflict))
        return int(parsed.conflict_exit_code)
    return 0


def _options(verb: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    if verb != "watch":
        add("-n", "--nonblock", action="store_true", help="fail instead of waiting for the lock")
    add("-w", "--wait", metavar="SECS", type=float, help="take no longer than so in all")
    add(
        "-E", "--conflict-exit-code", metavar="CODE", type=int, default=1,
        help="the exit code where the lock, or the expected value, cannot be had (1)",
    )  # fmt: skip
    add("path", metavar="PATH", help="DOMAIN/LOCK, or /dlm/DOMAIN/LOCK; made if missing")
    add("--hex", action="store_true", help="the bytes in hexadecimal, all 64 of them when printed")
    if verb == "set":
        add("value", metavar="VALUE", nargs="?", help="up to 64 bytes; left out: standard input")
        add("--expect", metavar="VALUE", help="only if this is the value now")
        add(
            "--token", metavar="TOKEN", type=int,
            help="only if the lock is still held here under this token ($DLMFS_TOKEN)",
        )  # fmt: skip
        return
    add(
        "--json", action="store_true", help="for programs: one object" + " a line" * (verb != "get")
    )
    if verb == "get":
        add(
            "--stale", action="store_true",
            help="what the store has, without taking the lock: its holder may be changing it",
        )  # fmt: skip
    else:
        add("--count", metavar="N", type=int, help="end after N values")


# -- taking the lock ----------------------------------------------------------------------------------


def _take(parsed: argparse.Namespace, flags: int) -> int:
    """Open the lock. Raises Conflict if it cannot be had in time, DlmfsError."""
    wait: float | None = 0 if getattr(parsed, "nonblock", False) else parsed.wait
    flags |= os.O_NONBLOCK if wait == 0 else 0
    try:
        if parsed.verb == "watch" and wait:  # it may take it many times, and waits in this process
            return _open_within(parsed.path, flags, wait)
        return _open(parsed.path, flags)
    except OSError as error:
        if error.errno == errno.ETXTBSY:
            raise Conflict(f"{parsed.path} is busy (`dlmfs why` says by whom)") from None
        raise _refusal(parsed.path, error) from None


def _open(path: str, flags: int) -> int:
    """Under holder=node all processes of a node share its lock, and two could both find the expected
    value before either writes. So those who write also exclude each other by a POSIX lock: not by
    flock(2), as `dlmfs lock` does, whose command may set the value."""
    fd = _opened(path, flags)
    try:
        if flags & os.O_ACCMODE == os.O_RDWR:
            fcntl.lockf(fd, fcntl.LOCK_EX | (fcntl.LOCK_NB if flags & os.O_NONBLOCK else 0))
    except BlockingIOError:
        os.close(fd)
        raise OSError(errno.ETXTBSY, "another one sets it") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _opened(path: str, flags: int) -> int:
    """The lock's file, made as `dlmfs lock` does if it is missing. Raises OSError."""
    for _ in range(logic.RETRIES):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):
            os.mknod(path, logic.MODE)
    return os.open(path, flags)


def _apart(parsed: argparse.Namespace, work: Callable[[Callable[[], None]], T]) -> T:
    """Do `work` in the process behind this one, which goes on with the command (front.py): `-w` is for
    all of it. It says when it has the lock."""
    wait: float | None = 0 if parsed.nonblock else parsed.wait
    has_it = mmap.mmap(-1, 1)  # shared by both
    behind = Behind()
    try:
        if behind.is_here:
            try:
                return work(lambda: has_it.write_byte(1))
            finally:
                behind.over()
        if wait == 0:
            behind.wait(ANSWER_S, no_answer(parsed.path, ANSWER_S))
        behind.wait(wait, _not_free(parsed.path, wait or 0))
    except (Conflict, Unavailable) as error:
        if isinstance(error, Conflict) and behind.is_here:
            raise
        raise _in_vain(parsed, error, has_it=not behind.is_here and has_it[0] == 1) from None


def _in_vain(
    parsed: argparse.Namespace, error: Conflict | Unavailable, *, has_it: bool
) -> Conflict | Unavailable:
    """What it means that nothing came of it: a store that takes no writes makes no lock busy."""
    why = hindrance([parsed.place])
    because = f": {why}" if why else ""
    if has_it:
        may = "; the value may still be written" if parsed.verb == "set" else ""
        return Unavailable(f"{parsed.path} was had, but not answered in time{may}{because}")
    if isinstance(error, Conflict) and why is None:
        return error
    return Unavailable(f"{error}{because}")


def _not_free(path: str, wait: float) -> Conflict:
    return Conflict(f"{path} was not free within {wait:g} s (`dlmfs why` says by whom)")


def _open_within(path: str, flags: int, wait: float) -> int:
    """In a thread of its own, which ends with the process: where a daemon is stopped no signal ends an
    open(2), short of the process's death, and not even that if the daemon had read the request."""
    outcome: list[int | OSError] = []

    def attempt() -> None:
        try:
            outcome.append(_open(path, flags))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(wait)
    if not outcome:
        raise _not_free(path, wait)
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


def _refusal(path: str, error: OSError) -> DlmfsError:
    shown = plain(path)
    match error.errno:
        case errno.ENOENT:
            return UsageError(f"{shown}: this node is not in that domain: mkdir it first")
        case errno.EISDIR | errno.EINVAL | errno.ENAMETOOLONG:
            return UsageError(f"{shown} cannot be a lock: {error.strerror}")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return NotPermitted(f"{shown}: {error.strerror}")
        case errno.EIO:
            return LockLost(f"{shown}: the lock was lost (`dlmfs status` says why)")
        case errno.ENOLCK:
            return Unavailable(f"{shown}: this node cannot get locks now (`dlmfs status` says why)")
        case errno.ENOSPC:
            return StoreFull(
                f"{shown}: nothing was written: the state is full, or a limit is reached (`dlmfs doctor` "
                "says where)"
            )
        case errno.ENOTCONN:
            return Unavailable(
                f"{shown}: the daemon of this mount is gone: `dlmfs umount` clears it"
            )
        case _:
            return Unavailable(f"{shown}: {error.strerror}")


def _attribute(fd: int, name: str) -> str:
    return os.getxattr(fd, f"user.dlmfs.{name}").decode()


# -- get and set -----------------------------------------------------------------------------------------


def _get(parsed: argparse.Namespace) -> None:
    def read(has_it: Callable[[], None]) -> tuple[bytes, str, str]:
        fd = _take(parsed, os.O_RDONLY)
        has_it()
        try:
            value, token = os.pread(fd, LVB_SIZE, 0), _attribute(fd, "token")
            return value, token, _attribute(fd, "abandoned")
        except OSError as error:
            raise _refusal(parsed.path, error) from None
        finally:
            os.close(fd)

    value, token, mark = _apart(parsed, read)
    _print(parsed, value, int(token or 0), json.loads(mark) if mark else None)


def _print(
    parsed: argparse.Namespace,
    value: bytes,
    token: int | None,
    abandoned: dict[str, Any] | None,
    *,
    stale: bool = False,
) -> None:
    if parsed.json:
        text = value.rstrip(b"\0").decode("utf-8", "replace")
        shown: dict[str, Any] = {"hex": value.hex(), "text": text}
        shown["text"] = text if text.encode() == value.rstrip(b"\0") else None
        shown |= {"token": token, "abandoned": abandoned, "stale": stale}
        line = json.dumps(shown).encode()
    else:
        line = value.hex().encode() if parsed.hex else value.rstrip(b"\0")
        if abandoned:
            node = abandoned["node"]
            complain(f"doubtful: node {node} died having the lock exclusively")
    say_bytes(line)


def _bytes(parsed: argparse.Namespace, text: str, what: str) -> bytes:
    """A value as given on the command line, filled up to 64 bytes. Raises UsageError."""
    value = os.fsencode(text)
    if parsed.hex:
        try:
            value = bytes.fromhex(text)
        except ValueError:
            raise UsageError(f"{what} is not hexadecimal") from None
    return _filled(value, what)


def _filled(value: bytes, what: str) -> bytes:
    if len(value) > LVB_SIZE:
        raise UsageError(f"{what} is too long: {LVB_SIZE} bytes travel with a lock")
    return value + EMPTY_LVB[len(value) :]


def _new_value(parsed: argparse.Namespace) -> bytes:
    if parsed.value is not None:
        return _bytes(parsed, parsed.value, "the value")
    given = sys.stdin.buffer.read(4 * LVB_SIZE)
    if parsed.hex:
        return _bytes(parsed, given.decode("ascii", "replace"), "the value")
    return _filled(given.removesuffix(b"\n"), "the value")  # echo(1) ends it with one


def _set(parsed: argparse.Namespace) -> None:
    value = _new_value(parsed)
    expected = None if parsed.expect is None else _bytes(parsed, parsed.expect, "--expect")

    def write(has_it: Callable[[], None]) -> None:
        fd = _take(parsed, os.O_RDWR)
        has_it()
        try:
            _demand(parsed, fd, expected)
            written = os.pwrite(fd, value, 0)
            assert written == LVB_SIZE
        except OSError as error:
            raise _refusal(parsed.path, error) from None
        finally:
            os.close(fd)

    _apart(parsed, write)


def _demand(parsed: argparse.Namespace, fd: int, expected: bytes | None) -> None:
    """Raises Conflict if value or token are not as expected."""
    if expected is not None and _filled(now := os.pread(fd, LVB_SIZE, 0), "") != expected:
        found = now.hex() if parsed.hex else repr(os.fsdecode(now.rstrip(b"\0")))
        raise Conflict(f"{parsed.path} has the value {found}: nothing was written")
    if parsed.token is not None and (token := int(_attribute(fd, "token"))) != parsed.token:
        raise Conflict(
            f"{parsed.path} was granted anew since token {parsed.token} (now {token}): nothing was "
            "written"
        )


# -- watch ----------------------------------------------------------------------------------------------


def _watch(parsed: argparse.Namespace) -> None:
    if parsed.count is not None and parsed.count < 1:
        raise UsageError("--count N: give a number from 1")
    follower = _Follower(parsed)
    complained = False
    while True:
        try:
            if follower.follow():
                return
            complained = False
        except DlmfsError as error:
            if not follower.printed:
                raise
            # No silent state: it may have missed values, and does not know the present one. The
            # mount may be made anew, and be without the domain for a while.
            if not complained:
                complain(f"{error}; trying again")
            complained = True
            time.sleep(BACK_S)


class _Follower:
    """The value as it was printed last."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self.parsed = parsed
        self.last: bytes | None = None
        self.printed = 0

    def follow(self) -> bool:
        """Hold the lock until somebody wants it. True: enough was printed."""
        parsed = self.parsed
        fd = _take(parsed, os.O_RDONLY)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(1, 0)  # a reader that goes away
            while True:
                value = os.pread(fd, LVB_SIZE, 0)
                if value != self.last:
                    mark = _attribute(fd, "abandoned")
                    token = int(_attribute(fd, "token") or 0)
                    _print(parsed, value, token, json.loads(mark) if mark else None)
                    self.last = value
                    self.printed += 1
                if self.printed == parsed.count:
                    return True
                ready = dict(poll.poll(LOOK_S * 1000))
                if ready.get(1, 0) & (select.POLLERR | select.POLLHUP):
                    raise BrokenPipeError
                if fd in ready:
                    return False
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refusal(parsed.path, error) from None
        finally:
            os.close(fd)
