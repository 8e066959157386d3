"""What a domain still takes while it is being left: nothing (promise 1).

The removal of its directory may have been answered ENOLCK, by a silent store, and still go on. Whoever
opens or makes a lock there meanwhile would have it in a membership that ends under it.
"""

from __future__ import annotations

import errno
import os
import stat

import pytest

from dlmfs.engine.lockspace import Life
from dlmfs.fuse import opcodes
from tests.fs.simulated import Mount


@pytest.fixture
def leaving() -> Mount:
    mount = Mount()
    mount.space.leave(lambda _error: None)
    assert mount.space.life is Life.LEAVING
    return mount


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_NONBLOCK])
def test_an_open_in_a_domain_that_is_being_left_is_refused(leaving: Mount, flags: int) -> None:
    header = leaving.header(leaving.file.ino, opcodes.OPEN)
    assert leaving.fs.open(header, flags) == errno.ENOLCK
    assert leaving.counts() == (0, 0)


def test_no_lock_is_made_in_a_domain_that_is_being_left(leaving: Mount) -> None:
    header = leaving.header(leaving.file.domain.ino, opcodes.MKNOD)
    reply = leaving.fs.mknod(header, b"new", stat.S_IFREG | 0o644, 0, 0)
    assert reply == errno.ENOLCK
