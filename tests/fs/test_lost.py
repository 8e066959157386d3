"""What a mount does about lock files whose locks were lost with their domain."""

from __future__ import annotations

import os
import stat

import pytest

from dlmfs.fs.tree import LockFile
from dlmfs.fuse import opcodes
from tests.fs.simulated import SOON_S, Mount


@pytest.mark.allow_warnings
def test_lost_files_get_their_successors_in_the_order_in_which_they_were_opened(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And not in a set's: the same seed of a simulation would not be the same run."""
    mount = Mount()
    directory = mount.file.domain
    names = [b"f%d" % number for number in range(20)]
    for name in names:
        mount.fs.tree.add(directory, name, stat.S_IFREG | 0o644, 0, 0)
    opened = names[1::2] + names[-2::-2]
    for name in opened:
        file = directory.children[name]
        assert isinstance(file, LockFile)
        mount.fs.open(mount.header(file.ino, opcodes.OPEN), os.O_RDWR)
        mount.loop.run_for(SOON_S)
    assert len(mount.fs.handles) == len(opened)
    mount.space.lose("a test")
    assert "(a test): dom/f1 EX pid " in caplog.text
    assert caplog.text.count(" EX pid ") == len(opened)
    successors = [directory.children[name].ino for name in opened]
    assert successors == sorted(successors)
