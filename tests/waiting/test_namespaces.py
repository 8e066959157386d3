"""Nodes whose daemons do not see each other's process numbers: in containers, say."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.fs.nodes import DLMFS, Nodes
from tests.waiting.agents import EX, status, until, wished
from tests.waiting.conftest import MakeAgent

pytestmark = [pytest.mark.fuse, pytest.mark.root]


def test_a_daemon_in_another_pid_namespace_is_not_taken_for_dead(
    nodes: Nodes, agent: MakeAgent
) -> None:
    """The kernel tells who holds a POSIX lock by number, which is 0 for a process that the asker
    cannot see. The lock is held all the same, and its daemon alive: to bury it would give its locks
    away (promise 1)."""
    outside = nodes.mount("b")
    (outside / "dom").mkdir()
    holder, other = agent(), agent()
    token = holder.opens("h", outside / "dom/x", EX)
    inside = nodes.folder / "a"
    inside.mkdir()
    nodes.mounts.append(inside)
    unshare = ["unshare", "--pid", "--fork", "--kill-child=KILL"]
    command = [*unshare, *DLMFS, "mount", f"local:{nodes.state}", str(inside), "-o", "node=a", "-f"]
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    nodes.children.append(daemon)
    until(lambda: os.path.ismount(inside) or daemon.poll() is not None, "the mount answers")
    (inside / "dom").mkdir()
    assert status(inside)["domains"][0]["members"] == ["a", "b"]
    other.start("o", inside / "dom/x", EX)
    until(lambda: wished(outside / "dom/x") == ["a"], "it waits")
    assert status(outside)["lease"]["state"] == "HEALTHY"
    assert holder.tokens["h"] == token
    holder.close("h")
    assert other.held("o") > token
