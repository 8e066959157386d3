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
from dlmfs.errors import StoreFull
from dlmfs.fuse import opcodes
from tests.fs.simulated import DOMAIN, Mount

LONG_S = 60.0
"""Longer than any request is left without an answer."""


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


def test_a_removal_that_goes_on_after_its_answer_is_not_begun_again() -> None:
    """A second one would leave by a membership that the first one's end takes away, or after a fence a
    later one that nobody asked to leave; and a file that is made meanwhile would vanish."""
    mount = Mount()
    assert mount.unlink() == b""
    first, reply = mount.rmdir()
    assert reply is None
    mount.loop.run_for(LONG_S)
    assert mount.kernel.said[first] == errno.ENOLCK
    directory = mount.fs.tree.root.children[DOMAIN]
    _, reply = mount.rmdir()
    assert reply == errno.ENOLCK
    header = mount.header(directory.ino, opcodes.MKNOD)
    assert mount.fs.mknod(header, b"new", stat.S_IFREG | 0o644, 0, 0) == errno.ENOLCK
    (left,) = mount.domains.leaving

    left(StoreFull("the store is full"))  # it came to nothing: all is as before
    again, reply = mount.rmdir()
    assert reply is None
    _, left = mount.domains.leaving
    left(None)
    assert mount.kernel.said[again] == b""
    assert DOMAIN not in mount.fs.tree.root.children
