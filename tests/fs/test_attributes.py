"""Modes, owners and times of a lock's file, as any file system has them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes

pytestmark = [pytest.mark.fuse, pytest.mark.root]

OTHER = 54321
CHANGES: dict[str, Callable[[Path], None]] = {
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, OTHER, -1),
    "utime": lambda path: os.utime(path, (1.0, 2.0)),
    "truncate": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_ctime(nodes: Nodes, change: str) -> None:
    """What looks for changed permissions goes by it (find -newerct, backups)."""
    path = nodes.mount("a") / "dom/x"
    path.parent.mkdir()
    path.touch()
    before = os.stat(path).st_ctime_ns
    CHANGES[change](path)
    assert os.stat(path).st_ctime_ns > before


def test_a_new_owner_gets_no_set_id_bits(nodes: Nodes) -> None:
    path = nodes.mount("a") / "dom/x"
    path.parent.mkdir()
    path.touch()
    for execute, left in ((0o010, 0), (0, stat.S_ISGID)):
        os.chmod(path, 0o6640 | execute)
        os.chown(path, OTHER, OTHER)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640 | execute | left
    os.chmod(path.parent, 0o2755)
    os.chown(path.parent, OTHER, OTHER)
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o2755


def test_a_shorter_value_leaves_no_tail_of_the_older_one(nodes: Nodes) -> None:
    """As for any file that the shell's > writes. Who only takes the lock so changes nothing."""
    a, b = (node / "dom/x" for node in nodes.pair())
    shell = (
        "touch {1}; echo a-longer-value >{0}; exec 9>{0}; exec 9>&-; "
        "cat {0} | tr -d '\\0'; echo ok >{0}; cat {1}"
    )
    done = subprocess.run(
        ["sh", "-c", shell.format(a, b)], capture_output=True, check=True, timeout=PATIENCE_S
    )
    assert done.stdout == b"a-longer-value\nok\n".ljust(15 + 64, b"\0")
    with open(b, "r+b", buffering=0) as file:
        file.write(b"in two ")
        file.write(b"parts")
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), b"I", 1)
        assert os.pread(file.fileno(), 64, 0).rstrip(b"\0") == b"\0I"
