"""`dlmfs lock` where it has not what it needs, or is not alone: nothing runs without a supervisor, and
nothing is ended that is not the command's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.jobs import locked
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes
from tests.robust.helpers import ended, watched

nodes = _nodes
pytestmark = pytest.mark.fuse

NO_THREADS = """
import sys, threading
def start(self): raise RuntimeError("can't start new thread")
threading.Thread.start = start
from dlmfs.cli import main
sys.exit(main.main())
"""


def run_by(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def test_where_no_thread_can_be_had_no_command_is_started(nodes: Nodes) -> None:
    """As at a limit on processes: the command would run on, and with `-o` without its lock."""
    x, ran = nodes.mount("a", "holder=file") / "dom/x", nodes.folder / "ran"
    done = run_by(NO_THREADS, "lock", "-o", x, "touch", ran)
    assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
    assert locked("-n", x, "true").returncode == 0
    assert not ran.exists()


SLOW_IN_FRONT = """
import os, sys, time
from dlmfs.cli import front, main
real = front.become_subreaper
def become_subreaper():
    time.sleep(1)
    real()
front.become_subreaper = become_subreaper
sys.exit(main.main())
"""


def test_the_process_behind_is_killed_at_once(nodes: Nodes) -> None:
    """The one in front may be slow, and gets the command all the same."""
    x = nodes.mount("a", "holder=file") / "dom/x"
    done = run_by(
        SLOW_IN_FRONT, "lock", x, "-c", "echo $$; kill -KILL $PPID; exec sleep 1000 >&- 2>&-"
    )
    command = int(done.stdout)
    try:
        assert done.returncode == -signal.SIGKILL
        assert not Path(f"/proc/{command}").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(command, signal.SIGKILL)


ORDER = """
import sys
from dlmfs.cli import lock, main
out = open(sys.argv.pop(), "w", buffering=1)
def told(word, function):
    def tell(*args):
        print(word, file=out)
        return function(*args)
    return tell
lock.token, lock.deadlines = told("token", lock.token), told("deadline", lock.deadlines)
sys.exit(main.main())
"""


def test_the_deadline_is_that_of_the_grant(nodes: Nodes) -> None:
    """Whoever has a token after the deadline was found was not fenced before."""
    x, words = nodes.mount("a", "holder=file") / "dom/x", nodes.folder / "words"
    assert run_by(ORDER, "lock", x, "true", words).returncode == 0
    assert words.read_text().split() == ["deadline", "token"]


def test_children_of_before_are_not_the_commands(nodes: Nodes) -> None:
    """`helper & exec dlmfs lock ...`: should the process behind be killed, the helper goes on."""
    x = nodes.mount("a", "holder=file") / "dom/x"
    script = 'sleep 1000 & echo $!; exec "$@"'
    says = "(setsid sleep 1000 & echo $!); echo $$; sleep 1000"
    front = subprocess.Popen(
        ["bash", "-c", script, "bash", *DLMFS, "lock", str(x), "-c", says],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert front.stdout is not None
        helper, detached, command = (int(front.stdout.readline()) for _ in range(3))
        children = Path(f"/proc/{front.pid}/task/{front.pid}/children").read_text().split()
        (behind,) = {int(pid) for pid in children} - {helper}
        with watched(helper) as theirs, watched(detached) as one, watched(command) as other:
            os.kill(behind, signal.SIGKILL)
            assert front.wait(PATIENCE_S) == -signal.SIGKILL
            assert ended(one)
            assert ended(other)
            assert not ended(theirs, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(front.pid, signal.SIGKILL)
        front.communicate(timeout=PATIENCE_S)
    assert locked("-n", x, "true").returncode == 0


@pytest.mark.root
def test_as_the_first_process_of_a_container_it_passes_sigterm_on(nodes: Nodes) -> None:
    """What it passes on comes from process 1, whose parent has no number here; nor has the daemon,
    which is outside: that does not make it the watchdog's word."""
    x = nodes.mount("a", "holder=file") / "dom/x"
    says = "trap 'exit 3' TERM; echo ready; sleep 1000 & wait"
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with subprocess.Popen(
        [*container, *DLMFS, "lock", str(x), "--", "sh", "-c", says],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as outside:  # fmt: skip
        try:
            assert outside.stdout is not None
            assert outside.stdout.readline() == "ready\n"
            children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text()
            os.kill(int(children), signal.SIGTERM)
            assert outside.communicate(timeout=PATIENCE_S)[1] == ""
            assert outside.returncode == 3
        finally:
            outside.kill()


@pytest.mark.root
def test_where_children_are_in_another_namespace_it_says_so(nodes: Nodes) -> None:
    """It cannot do its work there, and 1 would mean that the lock is another's."""
    x = nodes.mount("a", "holder=file") / "dom/x"
    done = subprocess.run(
        ["unshare", "--pid", *DLMFS, "lock", "-n", str(x), "true"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
