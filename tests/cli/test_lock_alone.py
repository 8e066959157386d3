"""`dlmfs lock` where it has not what it needs, or is not alone: nothing runs without a supervisor, and
nothing is ended that is not the command's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.jobs import Start, locked, until
from tests.cli.jobs import start as _start
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes

nodes = _nodes
start = _start
pytestmark = pytest.mark.fuse

NO_THREADS = """
import sys, threading
def start(self): raise RuntimeError("can't start new thread")
threading.Thread.start = start
from dlmfs.cli import main
sys.exit(main.main())
"""


def test_where_no_thread_can_be_had_no_command_is_started(nodes: Nodes) -> None:
    """As at a limit on processes: the command would run on, and with `-o` without its lock."""
    x, ran = nodes.mount("a", "owner=file") / "dom/x", nodes.folder / "ran"
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS, "lock", "-o", str(x), "touch", str(ran)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
    assert locked("-n", x, "true").returncode == 0
    assert not ran.exists()
