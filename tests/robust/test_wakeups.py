"""Waiters on the embedded engine whose holder's daemon goes, or cannot tell them."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest

from tests.fs.nodes import Nodes, dlmfs
from tests.robust.helpers import daemon_pid, leaves, wanted

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]


def test_who_waits_for_an_evicted_node_has_the_lock(nodes: Nodes) -> None:
    """Its daemon lives on, fenced: no end of a process frees the lock."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        waiter = nodes.hold(b / "dom/x", os.O_RDWR | os.O_CREAT)
        wanted(fd)
        assert dlmfs("evict", "a", str(b)).returncode == 0
        assert waiter.wait() == "held"
        assert daemon_pid(a) is not None
    finally:
        os.close(fd)


def _handed_over(nodes: Nodes, a: Path, b: Path) -> None:
    """Each waits for the other in turn."""
    for holder, waiter in ((a, b), (b, a)):
        fd = os.open(holder / "dom/x", os.O_RDWR | os.O_CREAT)
        waiting = nodes.hold(waiter / "dom/x", os.O_RDWR | os.O_CREAT)
        wanted(fd)
        os.close(fd)
        assert waiting.wait() == "held"
        waiting.release()


def test_a_newcomer_after_the_folder_of_sessions_was_deleted(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    shutil.rmtree(f"{nodes.state}.d")
    b = nodes.mount("b")
    (b / "dom").mkdir()
    _handed_over(nodes, a, b)
    leaves(a)
    leaves(b)


def test_a_newcomer_to_a_daemon_that_is_out_of_descriptors(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    pid = daemon_pid(a)
    assert pid is not None
    highest = max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    try:
        b = nodes.mount("b")
        (b / "dom").mkdir()
        _handed_over(nodes, a, b)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    leaves(b)
    leaves(a)
