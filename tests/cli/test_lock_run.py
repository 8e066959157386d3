"""`dlmfs lock` while its command runs: signals, the terminal, the loss of a lock."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlmfs.cli.signals import ECHO_S, Echo, pass_on
from tests.cli.jobs import Start, locked, until
from tests.cli.jobs import start as _start
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes

nodes = _nodes
start = _start
fuse = pytest.mark.fuse


# -- signals and the terminal ---------------------------------------------------------------------------

TELL = """
trap 'echo TERM; exit 3' TERM; trap 'echo USR1' USR1; trap 'echo HUP; exit 4' HUP
trap 'echo INT' INT
echo "ready $$"; while :; do sleep 1000 & wait; done
"""


@fuse
def test_signals_are_passed_on(nodes: Nodes, start: Start) -> None:
    job = start(nodes.mount("a") / "dom/x", "--", "bash", "-c", TELL)
    assert job.line().startswith("ready")
    for number, says in (
        (signal.SIGUSR1, "USR1"),
        (signal.SIGINT, "INT"),
        (signal.SIGUSR1, "USR1"),
    ):
        job.process.send_signal(number)
        assert job.line() == says
    job.process.send_signal(signal.SIGTERM)
    assert job.line() == "TERM"
    assert job.over()[0] == 3


def test_the_process_in_front_and_the_one_behind_are_told_the_same_once() -> None:
    front, sender = 10, 20
    echo = Echo(front)
    assert not echo.is_it(signal.SIGTERM, sender, 0.0)
    assert echo.is_it(signal.SIGTERM, front, 0.1)
    assert not echo.is_it(signal.SIGTERM, front, 0.2)
    assert not echo.is_it(signal.SIGTERM, front, 0.3)  # twice by somebody who means it
    assert not echo.is_it(signal.SIGINT, sender, 0.4)
    assert echo.is_it(signal.SIGINT, front, 0.5)
    assert not echo.is_it(signal.SIGTERM, sender, 1.0)
    assert not echo.is_it(signal.SIGTERM, front, 1.1 + ECHO_S)


@fuse
def test_a_signal_to_all_reaches_the_command_by_itself_and_passed_on(
    nodes: Nodes, start: Start
) -> None:
    """Many programs take a third as haste."""
    job = start(nodes.mount("a") / "dom/x", "--", sys.executable, "-c", EACH)
    assert job.line() == "ready"
    job.process.send_signal(signal.SIGUSR1)
    os.kill(job.behind(), signal.SIGUSR1)
    assert job.line() == "USR1"
    job.process.send_signal(signal.SIGUSR2)  # the same way as the one that must not come
    assert job.line() == "USR2"


EACH = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
print("ready", flush=True)
while True:
    print(signal.Signals(signal.sigwait([signal.SIGUSR1, signal.SIGUSR2])).name[3:], flush=True)
"""


def test_what_the_kernel_told_the_whole_group_is_not_told_twice() -> None:
    """Standard signals merge while they are pending, so that the terminal's test may miss it."""
    for own_group in (False, True):
        child = subprocess.Popen(["sleep", "1000"], process_group=0 if own_group else None)
        try:
            pass_on(signal.SIGTERM, child.pid, everywhere=True)
            pass_on(signal.SIGKILL, child.pid, everywhere=False)
            assert child.wait(PATIENCE_S) == (-signal.SIGTERM if own_group else -signal.SIGKILL)
            pass_on(signal.SIGTERM, child.pid, everywhere=False)  # it is gone
        finally:
            child.kill()


class Terminal:
    """A session on a terminal of its own, in whose foreground a command runs."""

    def __init__(self, *command: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", SHELL, *command])
        self.text = b""

    def expect(self, words: bytes) -> bytes:
        """Wait for these words; gives what came before them."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.text:
            left = deadline - time.monotonic()
            assert left > 0, self.text
            if select.select([self.master], [], [], left)[0]:
                self.text += os.read(self.master, 4096)
        before, _, self.text = self.text.partition(words)
        return before

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # the terminal hangs up
        os.waitpid(self.pid, 0)
        os.close(self.master)


SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = subprocess.Popen(sys.argv[1:], process_group=0)
os.tcsetpgrp(0, child.pid)
while True:
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    os.tcsetpgrp(0, os.getpgrp())
    print("stopped", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, child.pid)
    os.killpg(child.pid, signal.SIGCONT)
print("code", os.waitstatus_to_exitcode(status), flush=True)
sys.stdin.readline()
"""
"""What a shell with job control does about one job."""

COUNT = """
import os, signal, sys
count = 0
def interrupted(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
print("ready", os.getpid(), ".", flush=True)
for word in sys.stdin:
    print("read", word.strip(), count, flush=True)
    if word == "end\\n":
        sys.exit(6)
"""


@fuse
def test_the_terminal_is_the_commands(nodes: Nodes) -> None:
    """Ctrl-C reaches it once, Ctrl-Z stops the whole job, what is typed is its input."""
    terminal = Terminal(
        *DLMFS, "lock", str(nodes.mount("a") / "dom/x"), "--", sys.executable, "-c", COUNT
    )
    try:
        terminal.expect(b"ready ")
        pid = int(terminal.expect(b"."))
        terminal.type(b"one\r")
        terminal.expect(b"read one 0")
        terminal.type(b"\x03")
        terminal.expect(b"^C")
        terminal.type(b"two\r")
        terminal.expect(b"read two 1")
        terminal.type(b"\x1a")
        terminal.expect(b"stopped")
        # Until it has stopped as well, its read(2) under way might take what is meant for the shell.
        until(lambda: b") T " in Path(f"/proc/{pid}/stat").read_bytes())
        terminal.type(b"on\r")
        terminal.type(b"three\r")
        terminal.expect(b"read three 1")
        terminal.type(b"end\r")
        terminal.expect(b"code 6")
    finally:
        terminal.close()


# -- the loss -------------------------------------------------------------------------------------------

TREE = """
import os, signal, sys, time
def say(what): os.write(1, f"{what} {os.getpid()}\\n".encode())
def term(*_): say("TERM"); sys.exit(0)
signal.signal(signal.SIGTERM, term)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:  # the parent ends: what is left is a daemon that heeds no SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while os.getppid() == int(sys.argv[1]): time.sleep(0.001)
        say("daemon")
        time.sleep(1000)
    os._exit(0)
os.wait()
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("stubborn")
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)
say("main")
while True: time.sleep(1000)
"""


def lose_state(nodes: Nodes, _where: Path) -> None:
    nodes.state.unlink()


def lose_daemon(nodes: Nodes, where: Path) -> None:
    nodes.kill(where)


@fuse
@pytest.mark.parametrize("lose", [lose_state, lose_daemon])
def test_when_the_lock_is_lost_the_whole_tree_is_ended(
    nodes: Nodes, start: Start, lose: Callable[[Nodes, Path], None]
) -> None:
    """TERM first; then KILL, for a double fork in a session of its own that ignores TERM too."""
    a = nodes.mount("a")
    job = start(a / "dom/x", "--", sys.executable, "-c", TREE, "0")
    told = dict(job.line().split() for _ in range(3))
    handles = [os.pidfd_open(int(pid)) for pid in told.values()]
    try:
        assert set(told) == {"daemon", "stubborn", "main"}
        lose(nodes, a)
        assert job.line() == f"TERM {told['main']}"
        code, errors = job.over()
        assert code == 75
        assert f"{a}/dom/x was lost" in errors
        for handle in handles:
            assert select.select([handle], [], [], 0)[0], "a process of the command lives on"
    finally:
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


@fuse
def test_the_last_of_several_locks_is_lost(nodes: Nodes, start: Start) -> None:
    a = nodes.mount("a")
    other = Nodes(nodes.folder / "other")
    other.folder.mkdir()
    try:
        b = other.mount("b")
        job = start(a / "dom/x", b / "zzz/x", "--", "sh", "-c", "echo $$; exec sleep 1000")
        assert int(job.line()) > 0
        other.kill(b)
        code, errors = job.over()
        assert (code, f"{b}/zzz/x was lost" in errors) == (75, True)
        assert locked("-n", a / "dom/x", "true").returncode == 0
    finally:
        other.close()


@fuse
def test_a_mount_that_is_out_of_order(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    nodes.kill(a)
    done = locked(a / "dom/x", "true")
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert "daemon is gone" in done.stderr
