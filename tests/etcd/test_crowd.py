"""More shared waiters at one lock than a transaction of etcd may grant (`bench/crowd.py`: 500)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.etcd.server import Etcd

BENCH = Path(__file__).resolve().parents[2] / "bench" / "crowd.py"
COUNT = 70
"""More than the 62 that fit into one commit."""


def test_all_shared_waiters_behind_a_writer_are_granted(shared_etcd: Etcd) -> None:
    command = [sys.executable, str(BENCH), str(COUNT), "--processes", "1"]
    done = subprocess.run(
        [*command, "--endpoint", shared_etcd.endpoints],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert figures["waiters"] == COUNT
    assert figures["commits"] == 2
    shared_etcd.wait_for_no_key("dlmfs/crowd/")
