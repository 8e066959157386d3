"""Kept places and the counts of users.

An interrupted open keeps its place for a second, for the case that its thread comes back. Whoever does
not come back must leave nothing behind: no waiter, no holder, and no lock that nobody can close.
"""

from __future__ import annotations

import errno
import os

import pytest

from dlmfs.fs.places import KEPT_S
from dlmfs.model import Mode
from tests.fs.simulated import LOCK, SOON_S, Mount


@pytest.fixture
def mount() -> Mount:
    return Mount()


@pytest.mark.parametrize(
    "flags", [os.O_RDWR | os.O_NONBLOCK, os.O_RDONLY, os.O_RDONLY | os.O_NONBLOCK]
)
def test_a_thread_that_turns_to_another_open_gives_its_place_up(mount: Mount, flags: int) -> None:
    """An interrupted open is granted while its place is kept. Its thread does not come back for it but
    opens the file in another way, which its own forgotten grant refused, for a second (promise 6).
    """
    fh = mount.hold()
    mount.interrupted()
    assert len(mount.fs.places) == 1
    mount.close(fh)  # the kept claim gets the lock now
    _, reply = mount.open(flags)
    assert isinstance(reply, bytes), reply
    assert len(mount.fs.places) == 0
    assert mount.counts() == (1, 0)


def test_an_open_that_is_refused_gives_the_place_up_and_takes_nothing(mount: Mount) -> None:
    """How a program lets go of its place when it has stopped waiting."""
    fh = mount.hold()
    mount.interrupted()
    assert mount.counts() == (1, 1)
    _, reply = mount.open(os.O_RDONLY | os.O_DIRECT)
    assert reply == errno.EINVAL
    assert len(mount.fs.places) == 0
    assert mount.counts() == (1, 0)
    mount.close(fh)
    assert not mount.space.locks[LOCK].res.in_use


def test_a_place_goes_on_where_it_was(mount: Mount) -> None:
    """What the place is kept for: the same open, tried again, has the lock at once."""
    fh = mount.hold()
    mount.interrupted()
    mount.close(fh)
    again = mount.hold()
    assert mount.counts() == (1, 0)
    mount.close(again)
    assert mount.counts() == (0, 0)


def test_a_kept_place_that_runs_out_is_no_longer_counted(mount: Mount) -> None:
    """Nobody comes back in time: neither the claim nor its share of the user's waiters stays."""
    fh = mount.hold()
    mount.interrupted()
    assert mount.counts() == (1, 1)
    mount.loop.run_for(KEPT_S + SOON_S)
    assert mount.counts() == (1, 0)
    mount.close(fh)
    assert not mount.space.locks[LOCK].res.in_use


def test_a_kept_place_that_an_unlink_clears_is_no_longer_counted(mount: Mount) -> None:
    """An unlink that is refused because of a holder has cleared the places all the same."""
    mount.hold()
    mount.interrupted()
    assert mount.unlink() == errno.EBUSY
    assert mount.counts() == (1, 0)


def test_a_place_kept_twice_is_counted_once(mount: Mount) -> None:
    """The open comes back, waits on, and is interrupted again."""
    mount.hold()
    mount.interrupted()
    mount.interrupted()
    assert mount.counts() == (1, 1)
    assert len(mount.fs.places) == 1
    mount.loop.run_for(KEPT_S + SOON_S)
    assert mount.counts() == (1, 0)


@pytest.mark.allow_warnings
def test_a_kept_place_in_a_lost_domain_is_no_longer_counted(mount: Mount) -> None:
    """The membership ends while the place is kept, for a claim that still waits."""
    mount.hold()
    mount.interrupted()
    mount.space.lose("a test")
    mount.loop.run_for(KEPT_S + SOON_S)
    assert mount.user.waiters == 0
    assert len(mount.fs.places) == 0


def test_a_granted_place_in_a_lost_domain_is_no_longer_counted(mount: Mount) -> None:
    """The same of a claim that had been granted while nobody was there."""
    fh = mount.hold()
    mount.interrupted()
    mount.close(fh)
    assert mount.space.locks[LOCK].res.level is Mode.EX
    mount.space.lose("a test")
    mount.loop.run_for(KEPT_S + SOON_S)
    assert mount.counts() == (0, 0)
    assert len(mount.fs.places) == 0
