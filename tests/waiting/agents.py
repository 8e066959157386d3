"""Programs that open locks on command, and ways to see what the daemons think of them.

An agent is a process of its own that is told, line by line, what to open and close, and says line
by line what came of it: so that a test can order events exactly without waiting for time to pass.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dlmfs import control
from dlmfs.fuse import mount as fuse_mount
from tests.fs.nodes import PATIENCE_S

EX: Final = os.O_RDWR
PR: Final = os.O_RDONLY
TRY: Final = os.O_NONBLOCK
LONG: Final = bool(os.environ.get("DLMFS_LONG"))

AGENT = """
import ctypes, os, signal, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
fds = {}

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def attempt(name, how, flags, path):
    say("start", name, threading.get_native_id())
    try:
        if how == "retry":  # Python tries again after EINTR (PEP 475)
            fds[name] = os.open(path, flags)
        else:  # "once": as a C program that does not; "loop": as one that does so itself
            fds[name] = libc.open(os.fsencode(path), flags, 0o644)
            while fds[name] < 0 and how == "loop" and ctypes.get_errno() == 4:
                fds[name] = libc.open(os.fsencode(path), flags, 0o644)
            if fds[name] < 0:
                raise OSError(ctypes.get_errno(), "open")
        token = os.getxattr(fds[name], "user.dlmfs.token").decode()
        say("held", name, token)
    except OSError as error:
        say("error", name, error.errno)

def in_child(what, name, how, flags, path):
    if os.fork() == 0:
        if what == "child":
            for fd in fds.values():
                os.close(fd)
        attempt(name, how, flags, path)
        os._exit(0)

signal.signal(signal.SIGUSR1, lambda *_: say("signal"))
for line in sys.stdin:
    what, *words = line.rstrip("\\n").split(" ", 4)
    if what in ("open", "thread", "heir", "child"):
        name, how, flags, path = words
        do = (name, how, int(flags) | os.O_CREAT, path)
        if what == "open":
            attempt(*do)
        elif what == "thread":
            threading.Thread(target=attempt, args=do, daemon=True).start()
        else:
            in_child(what, *do)
    elif what == "close":
        os.close(fds.pop(words[0]))
        say("closed", words[0])
    elif what == "read":
        try:
            say("read", words[0], os.pread(fds[words[0]], 64, 0).rstrip(b"\\0").decode())
        except OSError as error:
            say("read", words[0], error)
    elif what == "write":
        say("wrote", words[0], os.pwrite(fds[words[0]], words[1].encode(), 0))
    elif what == "restart":  # SA_RESTART
        signal.siginterrupt(signal.SIGUSR1, False)
        say("set")
    elif what == "ignore":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        say("set")
    elif what == "timer":
        signal.signal(signal.SIGALRM, lambda *_: say("signal"))
        signal.setitimer(signal.ITIMER_REAL, float(words[0]), float(words[0]))
        say("set")
os._exit(0)
"""


def until(true: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
    """Look until it is true: for what a daemon can be asked for but does not announce."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.002)


def stood_in_line_for(file: int | str) -> bool:
    """Whether somebody waits for a file lock (flock(2), fcntl(2)) on this open file or path."""
    mark = f":{os.stat(file).st_ino} "
    return any(
        "->" in line and mark in line for line in Path("/proc/locks").read_text().splitlines()
    )


def prefix(command: Sequence[str]) -> list[str]:
    return [*command, sys.executable, "-I", "-S", "-c", AGENT]


class Agent:
    """See AGENT for what it can be told."""

    def __init__(self, *within: str) -> None:
        """`within`: a command to run it under."""
        # In a group of its own, whose parent is here: SIGTSTP stops nobody in an orphaned group, as
        # that of tests which were started in the background may be.
        self.process = subprocess.Popen(
            prefix(within),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,
        )
        self._text = b""
        self._early: list[str] = []
        self.tids: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")

    def line(self, within_s: float = PATIENCE_S) -> str:
        """The next line that it says; empty if none comes in that time, or it ended."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + within_s
        while b"\n" not in self._text:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return ""
            more = os.read(fd, 65536)
            if not more:
                return ""
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def expect(self, *words: object, but: str = "signal") -> str:
        """The rest of the next line that begins with these words. What its other threads say in
        between is kept for later; `but` is dropped, and the opposite outcome fails at once."""
        wanted = " ".join(map(str, words)) + " "
        opposite = wanted.replace("held ", "error ") if wanted.startswith("held ") else "\0"
        for n, line in enumerate(self._early):
            if (line + " ").startswith(wanted):
                del self._early[n]
                return line[len(wanted) :].strip()
        while line := self.line():
            if (line + " ").startswith(wanted):
                return line[len(wanted) :].strip()
            assert not line.startswith(opposite), f"{wanted!r} should come, {line!r} came"
            if line != but:
                self._early.append(line)
        raise AssertionError(f"{wanted!r} did not come; before it: {self._early}")

    def start(
        self, name: str, path: Path, flags: int, *, how: str = "once", what: str = "open"
    ) -> int:
        """Have it open a lock file; returns the opening thread's id before the open is over."""
        self.tell(what, name, how, flags, path)
        self.tids[name] = int(self.expect("start", name))
        return self.tids[name]

    def waits(
        self, name: str, path: Path, flags: int, *, how: str = "once", what: str = "open"
    ) -> Agent:
        """`start`, and wait until it stands in the queue."""
        tid = self.start(name, path, flags, how=how, what=what)
        until(lambda: tid in waiting(path), f"{name} waits for {path}")
        return self

    def held(self, name: str) -> int:
        """It has the lock; the token."""
        self.tokens[name] = int(self.expect("held", name))
        return self.tokens[name]

    def opens(
        self, name: str, path: Path, flags: int, *, how: str = "once", what: str = "open"
    ) -> int:
        """Open without having to wait for anybody."""
        self.start(name, path, flags, how=how, what=what)
        return self.held(name)

    def fails(self, name: str) -> int:
        return int(self.expect("error", name))

    def close(self, name: str) -> None:
        self.tell("close", name)
        self.expect("closed", name)

    def signal(self, number: int = signal.SIGUSR1) -> None:
        self.process.send_signal(number)

    def spoke(self) -> bool:
        """There is something to read."""
        if self._early:
            return True
        assert self.process.stdout is not None
        return bool(self._text or select.select([self.process.stdout], [], [], 0)[0])

    def said_nothing(self) -> bool:
        """Nothing is waiting to be read. Only of use after an event that would have come later."""
        return not self._early and self.line(0.0) == ""

    def kill(self) -> None:
        """End it, and wait for its end. May be repeated."""
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def info(path: Path) -> dict[str, Any]:
    """What the daemon of its mount says of one lock, as `dlmfs info`."""
    entry = fuse_mount.find(str(path.parent.parent))
    assert entry is not None
    question: dict[str, object] = {"cmd": "info", "domain": path.parent.name, "lock": path.name}
    answer: dict[str, Any] = control.ask(entry, question, PATIENCE_S)
    return answer


def status(where: Path) -> dict[str, Any]:
    entry = fuse_mount.find(str(where))
    assert entry is not None
    answer: dict[str, Any] = control.ask(entry, {"cmd": "status"}, PATIENCE_S)
    return answer


def waiting(path: Path) -> list[int]:
    """The threads that wait for the lock at this mount, in their order."""
    return [claim["pid"] for claim in info(path)["local_waiters"]]


def holding(path: Path) -> list[int]:
    return [claim["pid"] for claim in info(path)["local_holders"]]


def wished(path: Path) -> list[str]:
    """The nodes that stand in the lock's queue, in their order."""
    return [wish["node"] for wish in info(path)["waiters"]]


def wanting(path: Path) -> list[str]:
    """The other nodes that wish for the lock, as this mount's daemon has been told by its watch."""
    for domain in status(path.parent.parent)["domains"]:
        for lock in domain["locks"]:
            if (domain["name"], lock["name"]) == (path.parent.name, path.name):
                return [wish["node"] for wish in lock["wanted_by"]]
    return []


def at_rest(path: Path) -> bool:
    """Nobody holds or awaits the lock at this mount, and no node stands in the queue."""
    told = info(path)
    return not (told["local_holders"] or told["local_waiters"] or told["waiters"])
