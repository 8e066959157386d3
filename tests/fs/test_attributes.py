"""Modes, owners and times of a lock's file, as any file system has them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fs.nodes import Nodes

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
