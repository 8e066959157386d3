"""`dlmfs why` on a real etcd: the same as on one host, and leases that still run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.programs import Opener, run
from tests.etcd.mounts import TTL, EtcdNodes, until
from tests.fs.nodes import DLMFS
from tests.waiting.agents import wanting

pytestmark = pytest.mark.fuse


def why(path: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*DLMFS, "why", "--json", str(path)], capture_output=True, timeout=60, check=False
    )
    return done.returncode, json.loads(done.stdout)


def letters(nodes: EtcdNodes) -> list[str]:
    return [key for key in nodes.all_keys() if "/ask/" in key or "/answer/" in key]


def deadlocked(path: Path) -> bool:
    return bool(why(path)[1]["deadlocks"])


def test_a_deadlock_across_two_nodes_and_nothing_left_behind(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    one = Opener(nodes, ("x", a / "dom/x"), ("x", a / "dom/y")).has(1)
    two = Opener(nodes, ("x", b / "dom/y"), ("x", b / "dom/x")).has(1)
    one.go()
    two.go()
    until(lambda: deadlocked(a / "dom/x"), "no deadlock is found")
    text = run("why", b / "dom/y")
    assert text.startswith("DEADLOCK: 2 processes wait for each other")
    assert f"pid {one.pid} python" in text
    assert f"pid {two.pid} python" in text
    assert letters(nodes) == []
    two.end()
    one.has(2)
    assert not deadlocked(a / "dom/x")


def test_a_dead_daemon_whose_lease_still_runs(nodes: EtcdNodes) -> None:
    """On a cluster its locks are not free before that; it is said for how long."""
    a, b = nodes.pair("ttl=30")
    Opener(nodes, ("x", b / "dom/x")).has(1)
    nodes.queue(a / "dom/x")
    pid = nodes.pid(b)
    nodes.kill(b)
    code, report = why(a / "dom/x")
    silent = report["nodes"]["b"]["silent"]
    assert code == 69
    assert (silent["why"], silent["pid"]) == ("dead", pid)
    assert 0 < silent["left_s"] <= 30
    text = run("why", a / "dom/x", code=69)
    assert f"its daemon (pid {pid}) is dead" in text
    assert "unless it comes back, the lock is free in" in text
    assert f"1. pid {nodes.children[-1].pid} python" in text
    assert letters(nodes) == []


def test_a_stopped_daemon_and_its_lease(nodes: EtcdNodes) -> None:
    a, b = nodes.pair("ttl=60")
    Opener(nodes, ("x", b / "dom/x")).has(1)
    nodes.queue(a / "dom/x")
    nodes.stop(b)
    try:
        code, report = why(a / "dom/x")
        assert (code, report["nodes"]["b"]["silent"]["why"]) == (69, "stopped")
        assert letters(nodes) == []
    finally:
        nodes.cont(b)
    until(lambda: why(a / "dom/x")[0] == 0, "b does not answer")


def test_a_store_that_does_not_answer(start: Any) -> None:
    """What this node knows is told, and that it is no more than that."""
    nodes: EtcdNodes = start(1)
    a, b = nodes.pair(f"ttl={TTL * 12:g}")
    holder = Opener(nodes, ("x", a / "dom/x")).has(1)
    nodes.queue(b / "dom/x")
    until(lambda: bool(wanting(a / "dom/x")), "the holder's node has heard of it")
    member = nodes.etcd.members[0]
    assert member.process is not None
    os.kill(member.process.pid, 19)
    try:
        code, report = why(a / "dom/x")
        assert code == 69
        assert report["trouble"]
        text = run("why", a / "dom/x", code=69)
        assert text.startswith("THE STORE DOES NOT ANSWER: ")
        assert f"pid {holder.pid} python" in text
        assert "node b" in text
    finally:
        os.kill(member.process.pid, 18)
