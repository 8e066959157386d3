"""Exceptions that nobody expected: each costs one request, or one lock, and is named to people."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmfs.engine.value import Value
from dlmfs.fs.openfiles import POLLGONE
from dlmfs.fuse import opcodes, wire
from dlmfs.timing import GRACE_S
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes, dlmfs
from tests.fs.simulated import Mount

pytestmark = pytest.mark.allow_warnings


@pytest.fixture
def mount() -> Mount:
    return Mount()


def break_lock(mount: Mount) -> None:
    """The next event at the lock finds that its core is wrong."""
    mount.space.lock(mount.file.name).res.pr += 1
    assert mount.open()[1] == errno.ENOLCK


def ask(mount: Mount, opcode: int, call: Callable[..., object], *args: int | bytes) -> object:
    header = mount.header(mount.file.ino, opcode)
    reply = call(header, *args)
    mount.loop.run_for(0.01)
    return mount.kernel.said.get(header.unique) if reply is None else reply


def test_a_broken_lock_is_lost_to_who_has_it_open(mount: Mount) -> None:
    fs = mount.fs
    fh = mount.hold()
    file = mount.file
    break_lock(mount)
    with pytest.raises(OSError, match="was lost") as caught:
        fs.read(mount.header(file.ino, opcodes.READ), fh, 0, 64)
    assert caught.value.errno == errno.EIO
    polled = fs.poll(mount.header(file.ino, opcodes.POLL), fh, 1, 0, 0)
    assert polled == wire.polled(POLLGONE)
    assert file.lost, "what it tells is never its successor's"
    (successor,) = (child for child in file.domain.children.values() if child.name == file.name)
    assert successor is not file
    assert fs.faults.count == 1
    told = fs.faults.told()["last"][0]
    assert (told["where"], told["times"]) == ("lock dom/x", 1)
    mount.close(fh)
    mount.loop.run_for(GRACE_S)
    mount.file = successor  # type: ignore[assignment]
    mount.close(mount.hold())
    assert mount.counts() == (0, 0)


def test_who_waits_for_a_broken_lock_is_answered(mount: Mount) -> None:
    fh = mount.hold()
    unique, reply = mount.open()
    assert reply is None
    break_lock(mount)
    assert mount.kernel.said[unique] == errno.ENOLCK
    mount.close(fh)
    assert mount.counts() == (0, 0)


def test_a_kept_place_ends_with_a_broken_lock(mount: Mount) -> None:
    fh = mount.hold()
    mount.interrupted()
    mount.space.lock(mount.file.name).res.pr += 1
    mount.close(fh)
    mount.loop.run_for(2 * GRACE_S)
    assert mount.counts() == (0, 0)
    assert not mount.fs.places


def test_a_read_and_a_write_that_wait_end_with_the_lock(mount: Mount) -> None:
    """Promise 3, and nothing is left unanswered: neither a write under way nor a read behind it."""
    fs, file = mount.fs, mount.file
    fh = mount.hold()
    lock = mount.space.lock(file.name)
    write, read = mount.header(file.ino, opcodes.WRITE), mount.header(file.ino, opcodes.READ)
    assert fs.write(write, fh, 0, b"new") is None
    lock.reread()  # the write's outcome is unknown: a read waits
    assert fs.read(read, fh, 0, 64) is None
    lock.value.writes.clear()  # what it knows of them may be what is broken
    lock.wreck(KeyError("a bug"))
    assert mount.kernel.said[write.unique] == errno.EIO
    assert mount.kernel.said[read.unique] == errno.EIO
    assert not fs.pending


def test_they_end_also_if_what_is_broken_knows_them_no_more(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, file = mount.fs, mount.file
    fh = mount.hold()
    lock = mount.space.lock(file.name)
    write = mount.header(file.ino, opcodes.WRITE)
    assert fs.write(write, fh, 0, b"new") is None
    monkeypatch.setattr(Value, "lose", lambda _value, _error: None)
    lock.wreck(KeyError("a bug"))
    assert mount.kernel.said[write.unique] == errno.EIO


def test_a_read_that_waits_when_the_domain_is_lost_is_answered(mount: Mount) -> None:
    fs, file = mount.fs, mount.file
    fh = mount.hold()
    write, read = mount.header(file.ino, opcodes.WRITE), mount.header(file.ino, opcodes.READ)
    assert fs.write(write, fh, 0, b"new") is None
    mount.space.lock(file.name).reread()
    assert fs.read(read, fh, 0, 64) is None
    mount.space.lose("taken away")
    assert mount.kernel.said[write.unique] == errno.EIO
    assert mount.kernel.said[read.unique] == errno.EIO


class Watchdog:
    """Fails, as a bug in it might."""

    def holds(self, pid: int) -> None:
        raise KeyError(pid)

    def closed(self, pid: int) -> None:
        """Not known, not missed."""

    def lost(self) -> None:
        """Not called."""

    def lost_one(self, pid: int) -> None:
        """Not called."""


def test_an_open_that_fails_in_the_middle_keeps_nothing(mount: Mount) -> None:
    """It is answered EIO: nobody will ever close what it had been granted already."""
    mount.close(mount.hold())
    mount.fs.watchdog = Watchdog()
    with pytest.raises(KeyError):
        mount.open()
    mount.fs.watchdog = None
    assert mount.counts() == (0, 0)
    mount.close(mount.hold())
    assert mount.counts() == (0, 0)


class Account(Watchdog):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def holds(self, pid: int) -> None:
        del pid
        self.said.append("holds")

    def closed(self, pid: int) -> None:
        del pid
        self.said.append("closed")

    def lost_one(self, pid: int) -> None:
        del pid
        self.said.append("lost")


def test_the_watchdog_is_told_of_each_holder_once(mount: Mount) -> None:
    """The close of a lost lock must take nothing from what its thread has opened since."""
    account = mount.fs.watchdog = Account()
    mount.close(mount.hold())
    assert account.said == ["holds", "closed"]
    account.said.clear()
    lost = mount.hold()
    break_lock(mount)
    assert account.said == ["holds", "lost"]
    mount.close(lost)
    mount.loop.run_for(2 * GRACE_S)
    mount.file = mount.file.domain.children[mount.file.name]  # type: ignore[assignment]
    mount.hold()
    mount.space.lose("taken away")
    assert account.said == ["holds", "lost", "holds"]


# -- a real mount -------------------------------------------------------------------------------------

FAULTY = """
import sys
from dlmfs.core.lockres import Lockres
from dlmfs.fs.filesystem import FileSystem

waits, looks = Lockres.wait, FileSystem.getxattr

def wait(res, claim):
    if claim.file.name == b"bad" and claim.trying:
        raise KeyError("a bug in one lock")
    return waits(res, claim)

def getxattr(fs, h, name, size):
    if name == b"user.dlmfs.bad":
        raise ZeroDivisionError("a bug in one request")
    if name == b"user.dlmfs.timer":
        fs.loop.call_soon(lambda: {}["a bug in a callback"])
    return looks(fs, h, name, size)

Lockres.wait, FileSystem.getxattr = wait, getxattr
from dlmfs.cli.main import main
sys.exit(main())
"""
"""A daemon with three bugs, each of which comes out when it is asked to."""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(DLMFS[-1]).parents[1] / "src"))
    try:
        yield nodes
    finally:
        nodes.close()


@pytest.mark.fuse
@pytest.mark.root
def test_a_daemon_with_bugs_loses_what_they_touch_and_says_so(faulty: Nodes) -> None:
    where = faulty.folder / "m"
    where.mkdir()
    faulty.mounts.append(where)
    mount = [sys.executable, "-c", FAULTY, "mount", f"local:{faulty.state}", str(where)]
    subprocess.run([*mount, "-o", "holder=file"], check=True, timeout=PATIENCE_S)
    (where / "dom").mkdir()
    bad, good = where / "dom" / "bad", where / "dom" / "good"
    held, other = (os.open(path, os.O_RDWR | os.O_CREAT) for path in (bad, good))
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is looked at
            os.open(bad, os.O_RDWR | os.O_NONBLOCK)
        assert caught.value.errno == errno.ENOLCK
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.getxattr(where, "user.dlmfs.bad")
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.getxattr(where, "user.dlmfs.timer")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.pwrite(held, b"x", 0)
        assert caught.value.errno == errno.EIO
        assert os.pwrite(other, b"x", 0) == 1
        os.close(held)
        held = os.open(bad, os.O_RDWR)
        assert os.pwrite(held, b"x", 0) == 1
        report = faulty.status(where)
        assert report["lease"]["state"] == "HEALTHY"
        assert report["lease"]["fences"] == 0
        assert report["faults"]["count"] == 3
        places = [fault["where"] for fault in report["faults"]["last"]]
        assert places[1:] == ["request GETXATTR", "lock dom/bad"]
        assert places[0].startswith("callback ")
        shown = dlmfs("status", str(where)).stdout
        assert "fault in lock dom/bad: KeyError: 'a bug in one lock' (1 times, " in shown
        assert "fault in request GETXATTR" in dlmfs("doctor", str(where), check=False).stdout
    finally:
        os.close(held)
        os.close(other)
