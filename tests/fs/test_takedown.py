"""A process whose node is over ends, whatever goes on in it."""

from __future__ import annotations

import subprocess
import sys

from tests.fs.nodes import PATIENCE_S, ROOT

STUCK = """
import asyncio, logging, sys, threading
sys.path.insert(0, sys.argv[1])
from dlmfs import takedown

logging.basicConfig()

async def main():
    takedown.begin(0.2)
    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)

asyncio.run(main())
"""


def test_a_thread_that_never_ends_keeps_no_process() -> None:
    """asyncio's own end waits for its threads."""
    command = [sys.executable, "-c", STUCK, str(ROOT / "src")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    assert "taken down after 0.2 s" in done.stderr
    assert "asyncio_0 in threading.py:wait" in done.stderr
