"""Logs of real daemons: in a container, in a file, on standard error; and what a loss tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.containers.inside import inside
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes
from tests.tools.bench import until

pytestmark = [pytest.mark.fuse, pytest.mark.root]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_eviction_names_the_locks_and_processes_that_it_hit(nodes: Nodes) -> None:
    log = nodes.folder / "a.log"
    a = nodes.mount("a", "holder=file", f"log={log}", "log-format=json", "grace=0")
    b = nodes.mount("b", "holder=file")
    for node in (a, b):
        (node / "dom").mkdir()
    holder = nodes.hold(a / "dom/x\n")
    assert holder.wait() == "held"
    subprocess.run([*DLMFS, "evict", "a", str(b)], check=True, capture_output=True, timeout=120)
    hit = [line for line in lines(log) if "locks" in line]
    assert hit, log.read_text()
    row = {"lock": "dom/x\\n", "mode": "EX", "pid": holder.process.pid, "command": "python"}
    (found,) = hit[0]["locks"]
    assert found | {"command": "python"} == row
    assert "evicted" in str(hit[0]["message"])
    assert hit[0]["mountpoint"] == str(a)


def test_an_end_with_holders_names_them(nodes: Nodes) -> None:
    log = nodes.folder / "a.log"
    a = nodes.mount("a", "holder=file", f"log={log}", "grace=0")
    (a / "dom").mkdir()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    os.kill(nodes.pid(a), signal.SIGTERM)
    until("it says so", lambda: "holders are to close" in log.read_text())
    assert f"dom/x EX pid {holder.process.pid} " in log.read_text()


def test_a_daemon_without_a_log_tells_status_of_it(nodes: Nodes) -> None:
    """There is no /dev/log in a container, and nobody reads the standard error of a daemon."""
    if os.path.exists("/dev/log"):
        pytest.skip("there is a system log here")
    a, b = nodes.mount("a", "holder=file"), nodes.mount("b", "holder=file")
    for node in (a, b):
        (node / "dom").mkdir()
    assert nodes.hold(a / "dom/x").wait() == "held"
    subprocess.run([*DLMFS, "evict", "a", str(b)], check=True, capture_output=True, timeout=120)
    told = nodes.status(a)["log"]
    assert told["to"] == "nowhere"
    assert any("dom/x EX pid" in line["message"] for line in told["lately"])
    said = subprocess.run(
        [*DLMFS, "status", str(a)], check=False, capture_output=True, text=True, timeout=60
    ).stdout
    assert "its log goes nowhere (log= names a place)" in said
    assert "dom/x EX pid" in said


def test_log_stderr_is_what_a_container_collects(nodes: Nodes) -> None:
    """The daemon in the background keeps it, past its start."""
    where = nodes.folder / "a"
    where.mkdir()
    nodes.mounts.append(where)
    script = (
        f"{' '.join(DLMFS)} mount local:{nodes.state} {where} --log stderr --log-level info "
        "--log-format json -o node=a,holder=file && "
        f"{' '.join(DLMFS)} umount {where}"
    )
    done = inside("sh", "-c", script)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0
    assert any("node a ends: " in line["message"] for line in told), done.stderr


def test_the_usual_log_keeps_no_pipe_open(nodes: Nodes) -> None:
    """`x=$(dlmfs mount ... 2>&1)` returns."""
    where = nodes.folder / "a"
    where.mkdir()
    nodes.mounts.append(where)
    command = [*DLMFS, "mount", f"local:{nodes.state}", str(where), "--log", f"{nodes.folder}/l"]
    command += ["-o", "holder=file"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("word", ["log=syslog", "log=/nowhere/x", "log=/dev/full"])
def test_a_log_that_cannot_be_is_a_sentence(nodes: Nodes, word: str) -> None:
    where = nodes.folder / "a"
    where.mkdir()
    command = [*DLMFS, "mount", f"local:{nodes.state}", str(where), "-o", word]
    done = inside(*command)
    assert done.returncode in (1, 32), done.stderr
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert not os.path.ismount(where)
