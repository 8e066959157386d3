"""The state of locks as attributes: told without taking a lock, and never a successor's."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.fs.nodes import Nodes

pytestmark = pytest.mark.fuse


def told(path: Path | int, name: str) -> str:
    return os.getxattr(path, f"user.dlmfs.{name}").decode()


def test_attributes_of_a_lock_are_read_without_taking_it(nodes: Nodes) -> None:
    a, b = nodes.pair()
    for node in (a, b):
        (node / "dom/x").touch()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    assert told(b / "dom/x", "mode") == "NL"
    assert told(b / "dom/x", "token") == ""
    assert json.loads(told(b / "dom/x", "holders")) == []
    assert told(a / "dom/x", "mode") == "EX"
    assert int(told(a / "dom/x", "token")) == holder.token
    (row,) = json.loads(told(a / "dom/x", "holders"))
    assert (row["node"], row["mode"], row["pid"]) == ("a", "EX", holder.process.pid)

    waiter = nodes.hold(b / "dom/x", os.O_RDONLY)
    assert waiter.waits
    (row,) = json.loads(told(b / "dom/x", "waiters"))
    assert (row["node"], row["mode"], row["pid"]) == ("b", "PR", waiter.process.pid)
    assert json.loads(told(a / "dom/x", "waiters")) == [{"node": "b", "mode": "PR"}]
    assert told(a / "dom/x", "abandoned") == ""


def test_many_holders_are_told_of_in_short(nodes: Nodes) -> None:
    where = nodes.mount("a")
    (where / "dom").mkdir()
    fds = [os.open(where / "dom/x", os.O_RDONLY | os.O_CREAT) for _ in range(900)]
    try:
        rows = json.loads(told(where / "dom/x", "holders"))
        assert len(rows) == 201
        assert rows[-1] == {"more": 700}
    finally:
        for fd in fds:
            os.close(fd)


def test_the_root_tells_capabilities_and_state(nodes: Nodes) -> None:
    where = nodes.mount("a")
    assert "bast" in told(where, "capabilities").split()
    assert told(where, "state") == "HEALTHY"
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        told(where, "nonsense")
    assert os.listxattr(where) == []


def test_a_lost_file_gets_a_new_inode(nodes: Nodes) -> None:
    """The kernel passes no handle with an attribute: the inode alone tells lost from new."""
    where = nodes.mount("a")
    (where / "dom").mkdir()
    fd = os.open(where / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        old = os.fstat(fd)
        nodes.state.unlink()
        with pytest.raises(OSError, match="Input/output"):
            os.write(fd, b"x")
        for name in ("token", "mode", "holders"):
            with pytest.raises(OSError, match="Input/output"):
                told(fd, name)
        assert told(where / "dom/x", "token") == ""
        new = os.stat(where / "dom/x")
        assert new.st_ino != old.st_ino
        assert (new.st_mode, new.st_uid) == (old.st_mode, old.st_uid)
        assert os.listdir(where / "dom") == ["x"]
        assert told(where, "state").startswith("FENCED for good: ")
        with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
            os.open(where / "dom/x", os.O_RDWR)
    finally:
        os.close(fd)
    (where / "dom/x").unlink()
    (where / "dom").rmdir()
