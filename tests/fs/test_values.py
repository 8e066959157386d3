"""The life of a value on real mounts: files only made, dead holders' marks, dead-value= (promise 4)."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from dlmfs.client import Lock
from tests.fs.nodes import Nodes, dlmfs
from tests.tools.bench import until

pytestmark = pytest.mark.fuse


def info(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(dlmfs("info", "--json", str(path)).stdout)
    return told


def heads(nodes: Nodes) -> list[bytes]:
    conn = sqlite3.connect(f"file:{nodes.state}?mode=ro", uri=True)
    try:
        return [key for (key,) in conn.execute("SELECT key FROM kv WHERE substr(key, 1, 2) = 'h/'")]
    finally:
        conn.close()


def write(path: Path, value: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, value)
    os.close(fd)


def read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT)
    try:
        return os.pread(fd, 64, 0)
    finally:
        os.close(fd)


def places(path: Path) -> set[str]:
    """Who has a place in the lock's head."""
    return {member["node"] for member in info(path)["members"]}


@pytest.mark.parametrize("when", ["before it is written", "after it was written"])
def test_a_file_that_is_only_made_keeps_the_value(nodes: Nodes, when: str) -> None:
    a, b = nodes.pair()
    if when == "before it is written":
        (b / "dom/x").touch()
    write(a / "dom/x", b"precious")
    if when == "after it was written":
        (b / "dom/x").touch()
    until("b has a place", lambda: "b" in places(b / "dom/x"))
    dlmfs("umount", str(a))
    assert read(b / "dom/x").rstrip(b"\0") == b"precious"


def test_a_refused_trylock_that_made_the_file_keeps_it(nodes: Nodes) -> None:
    a, b = nodes.pair()
    write(a / "dom/x", b"precious")
    fd = os.open(a / "dom/x", os.O_RDWR)
    with pytest.raises(OSError, match="Text file busy"):
        os.open(b / "dom/x", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    until("b has a place", lambda: "b" in places(b / "dom/x"))
    os.close(fd)
    (a / "dom/x").unlink()
    assert read(b / "dom/x").rstrip(b"\0") == b"precious"


def test_no_key_is_left_of_a_lock_whose_holder_died(nodes: Nodes) -> None:
    """The next one has it, sees it, and unlinks it; nobody has written a value."""
    a, b = nodes.pair("lock-delay=0")
    for lock in ("job1", "job2"):
        assert nodes.hold(a / "dom" / lock).wait() == "held"
    nodes.kill(a)
    for lock in ("job1", "job2"):
        path = b / "dom" / lock
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        assert json.loads(os.getxattr(path, "user.dlmfs.abandoned"))["node"] == "a"
        os.close(fd)
        path.unlink()
    assert heads(nodes) == []


def test_a_value_that_a_dead_holder_left_is_none_if_so_mounted(nodes: Nodes) -> None:
    """dead-value=invalid: 0 bytes are read until somebody writes; other nodes may see it otherwise."""
    a = nodes.mount("a", "lock-delay=0")
    b = nodes.mount("b", "lock-delay=0", "dead-value=invalid")
    c = nodes.mount("c", "lock-delay=0", "dead-value=keep")
    for node in (a, b, c):
        (node / "dom").mkdir()
    write(a / "dom/x", b"version 1, of many words")
    assert read(b / "dom/x").startswith(b"version 1")
    assert nodes.hold(a / "dom/x").wait() == "held"
    nodes.kill(a)
    assert read(b / "dom/x") == b""
    assert os.stat(b / "dom/x").st_size == 64
    assert read(c / "dom/x").startswith(b"version 1")
    shown = dlmfs("value", "get", str(b / "dom/x"))
    assert shown.stdout == "\n"
    assert "doubtful" in shown.stderr
    refused = dlmfs("value", "set", "--expect", "version 1", str(b / "dom/x"), "2", check=False)
    assert refused.returncode == 1
    with Lock(b / "dom/x") as lock:
        assert lock.get_value() == b""
        mark = lock.abandoned()
    assert mark is not None
    assert mark.node == "a"
    fd = os.open(b / "dom/x", os.O_RDWR)
    assert os.pread(fd, 64, 0) == b""
    os.pwrite(fd, b"new", 0)
    os.close(fd)
    assert read(b / "dom/x") == read(c / "dom/x") == b"new".ljust(64, b"\0")
