"""`dlmfs lock` at a mount whose daemon is stopped: before it reads the request of the open, and after.

After is the harder one: the kernel then lets no signal end the wait, and a process ends with its last
thread only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.jobs import Job, Start, locked, until
from tests.cli.jobs import start as _start
from tests.cli.test_lock import in_a_wait
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import PATIENCE_S, ROOT, Nodes
from tests.robust.helpers import stopped

nodes = _nodes
start = _start
pytestmark = pytest.mark.fuse


def at_the_daemon(nodes: Nodes, where: Path) -> bool:
    """Whether it has heard of somebody who waits."""
    (domain,) = nodes.status(where)["domains"]
    return any(lock["waiters"] for lock in domain["locks"])


def nothing_is_left(nodes: Nodes, x: Path) -> None:
    """Of a wait that was over, once the daemon has gone on."""
    words = os.fsencode(x)

    def in_use() -> bool:
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if words in Path("/proc", name, "cmdline").read_bytes().split(b"\0"):
                        return True
                except OSError:
                    pass
        return False

    until(lambda: not in_use())
    assert locked("-n", x, "true").returncode == 0


@pytest.mark.parametrize("read", [False, True], ids=["not read", "read"])
@pytest.mark.parametrize("end", [0, signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_wait_ends_all_the_same(nodes: Nodes, start: Start, read: bool, end: int) -> None:
    """By its time or by a signal; what it is granted later is never used."""
    a = nodes.mount("a", "holder=file")
    x = a / "dom/x"
    holder = start(x, "-c", "echo has; read _")
    assert holder.line() == "has"
    used = nodes.folder / "used"

    def begin() -> Job:
        return start(*([] if end else ["-w", "3", "-E", "9"]), x, "touch", used)

    waiter = begin() if read else None
    if waiter is not None:
        until(lambda: at_the_daemon(nodes, a))
    with stopped(a):
        waiter = waiter or begin()
        behind = waiter.behind()
        if end:
            until(lambda: in_a_wait(behind))
            waiter.process.send_signal(end)
        assert waiter.process.wait(PATIENCE_S) == (-end if end else 9)
        for pipe in (waiter.process.stdout, waiter.process.stderr):
            assert pipe is not None
            assert select.select([pipe], [], [], PATIENCE_S)[0], "a shell at $(...) goes on waiting"
            assert pipe.read() == b""
        holder.let_go()
    holder.over()
    nothing_is_left(nodes, x)
    assert not used.exists()


def test_who_would_not_wait_is_told(nodes: Nodes) -> None:
    """With a shorter time than the real one."""
    a = nodes.mount("a", "holder=file")
    x = a / "dom/x"
    assert locked(x, "true").returncode == 0
    hasty = (
        "import sys; from dlmfs.cli import lock, main; lock.ANSWER_S = 0.5; sys.exit(main.main())"
    )
    with stopped(a):
        done = subprocess.run(
            [sys.executable, "-c", hasty, "lock", "-n", str(x), "true"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert f"the daemon of {a} has not answered" in done.stderr
    nothing_is_left(nodes, x)
