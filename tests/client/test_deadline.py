"""The file that tells until when locks are good: who believes it, and when."""

from __future__ import annotations

import fcntl
import math
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs import deadline, rundir
from dlmfs.client import deadlines, keeper, logic
from dlmfs.client.logic import is_lost
from dlmfs.client.place import Place
from dlmfs.deadline import Deadline, Published, boottime, sleep_until
from tests.fs.nodes import PATIENCE_S

DEV = "0:77"
UID = os.getuid()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr(rundir, "places", lambda _uid: (str(tmp_path / "none"), str(tmp_path)))
    monkeypatch.setattr(rundir, "make_folder", lambda *_, **_settle: str(tmp_path))


@pytest.fixture
def published() -> Iterator[Published]:
    made = Published(DEV)
    yield made
    made.close()


def test_it_is_read_as_it_was_told(published: Published) -> None:
    published.tell(10.5, 2**63 - 1)
    found = Deadline.find(DEV, UID)
    assert found is not None
    assert found.at() == 10.5
    published.tell(20.25, 2**63 - 1)
    assert found.at() == 20.25
    published.tell(30.0, 5)
    assert found.at() == -math.inf, "of another session"
    later = Deadline.find(DEV, UID)
    assert later is not None
    assert later.at() == 30.0
    for each in (found, later):
        each.close()


def test_whoever_may_use_the_mount_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        published = Published(DEV)
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.name == "0-77.lease"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    published.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_believed(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.tell(10.0, 1)
    assert Deadline.find("0:78", UID) is None, "there is none"
    data = (tmp_path / "0-77.lease").read_bytes()
    (tmp_path / "0-78.lease").write_bytes(data)
    assert Deadline.find("0:78", UID) is None, "its daemon is dead"
    (tmp_path / "0-79.lease").symlink_to(tmp_path / "0-77.lease")
    assert Deadline.find("0:79", UID) is None, "another's"
    monkeypatch.setattr(deadline, "_namespace", lambda: 1)
    assert Deadline.find(DEV, UID) is None, "of another clock"
    monkeypatch.undo()


@pytest.mark.root
def test_another_users_file_is_not_believed(published: Published, tmp_path: Path) -> None:
    os.chown(tmp_path / "0-77.lease", 65534, 65534)
    assert Deadline.find(DEV, UID) is None
    found = Deadline.find(DEV, 65534)
    assert found is not None
    found.close()


@pytest.mark.parametrize("lock", ["flock", "fcntl"])
def test_who_may_only_read_a_dead_daemons_file_cannot_make_it_believed(
    tmp_path: Path, lock: str
) -> None:
    """Programs on the next mount with its device number would take their locks for lost."""
    path = tmp_path / "0-77.lease"
    path.write_bytes(deadline.RECORD.pack(5.0, 1, deadline._namespace()))
    with path.open("rb") as file:
        if lock == "flock":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            fcntl.lockf(file, fcntl.LOCK_SH)
        assert Deadline.find(DEV, UID) is None


def test_nobody_else_can_open_it_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's start would wait for whoever locked it first."""
    modes = []
    real = fcntl.fcntl

    def look(fd: int, command: int, argument: bytes) -> object:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", look)
    Published(DEV).close()
    assert modes == [0o600]


def test_a_folder_of_others_is_not_looked_into(published: Published, tmp_path: Path) -> None:
    """A FUSE file system of another user may say that its files are root's, or answer never."""
    tmp_path.chmod(0o777)
    assert Deadline.find(DEV, UID) is None
    tmp_path.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert not rundir.is_safe(str(link), UID)
    assert rundir.is_safe(str(tmp_path), UID)


def test_a_file_that_is_being_written_is_read_again(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the old deadline with half of the new one may be later than both."""
    published.tell(10.0, 1)
    found = Deadline.find(DEV, UID)
    assert found is not None
    torn = deadline.RECORD.pack(1e9, 1, 0)
    reads = [torn, *[deadline.RECORD.pack(11.0, 1, 0)] * 2]
    monkeypatch.setattr(os, "pread", lambda *_: reads.pop(0))
    assert found.at() == 11.0
    monkeypatch.undo()
    found.close()


def test_the_next_mounts_file_stays(tmp_path: Path) -> None:
    """As with the control socket: a device number is free before its daemon has ended."""
    old, new = Published(DEV), Published(DEV)
    old.close()
    found = Deadline.find(DEV, UID)
    assert found is not None
    found.close()
    new.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_over_is_over_for_its_session_only(published: Published) -> None:
    """A renewal that is confirmed later must not bring it back; a node that came back has another."""
    published.tell(1e9, 1)
    found = Deadline.find(DEV, UID)
    assert found is not None
    assert not found.passed()
    published.over()
    published.tell(2e9, 1)
    assert found.passed()
    published.tell(2e9, 2)
    later = Deadline.find(DEV, UID)
    assert later is not None
    assert not later.passed()
    assert found.passed()
    for each in (found, later):
        each.close()


def test_where_no_lease_runs_out_it_is_the_daemons_death(tmp_path: Path) -> None:
    published = Published(DEV)
    published.tell(math.inf, 1)
    found = Deadline.find(DEV, UID)
    assert found is not None
    assert found.at() == math.inf
    (tmp_path / "0-77.lease").rename(tmp_path / "kept")  # a killed daemon leaves it there
    published.close()
    assert found.at() == -math.inf
    found.close()


def test_sleeping_ends_at_the_instant() -> None:
    for ahead in (-1.0, 0.0, 0.0100000001):
        at = boottime() + ahead
        while boottime() < at:
            sleep_until(at)
    seconds = math.ceil(boottime() + 0.01) - 1e-10  # rounded up it has no nanoseconds
    sleep_until(seconds)
    assert boottime() >= seconds


# -- the library's holders ---------------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.lost = threading.Event()

    def happened(self, events: int) -> None:
        assert is_lost(events)
        self.lost.set()


PLACE = Place("/dlm", DEV, "etcd://h/c", "dom", "x", UID)


def test_holders_are_told_when_it_has_passed(published: Published) -> None:
    first, gone, later = Holder(), Holder(), Holder()
    published.tell(boottime() + 0.2, 1)
    mount = deadlines.watch(PLACE, first)
    assert mount is not None
    assert deadlines.watch(PLACE, gone) is mount
    mount.remove(gone)
    published.tell(boottime() + 0.4, 1)
    assert first.lost.wait(PATIENCE_S)
    mount.join(PATIENCE_S)
    published.tell(boottime() + 3600, 2)
    other = deadlines.watch(PLACE, later)
    assert other not in (None, mount)
    assert not gone.lost.is_set()
    assert not later.lost.is_set()


class Stuck:
    """A watcher whose epoll asks a stopped daemon: nothing can be removed from it."""

    def __init__(self) -> None:
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def remove(self, _fd: int) -> None:
        self.reached.set()
        assert self.goes_on.wait(PATIENCE_S)


def test_a_release_that_waits_for_the_daemon_keeps_no_other_from_being_told(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = Stuck(), Holder()
    monkeypatch.setattr(keeper, "watcher", lambda _device: stuck)
    published.tell(boottime() + 1, 1)
    one = keeper.Keeper(logic.Request(PLACE), lambda: None, lambda _lost: None)
    one.settled.set()
    one._fd, one._is_watched = os.open(os.devnull, os.O_RDONLY), True
    one._deadline = deadlines.watch(PLACE, one)
    assert deadlines.watch(PLACE, other) is one._deadline
    releasing = threading.Thread(target=one.release)
    releasing.start()
    try:
        assert stuck.reached.wait(PATIENCE_S)
        assert other.lost.wait(PATIENCE_S)
    finally:
        stuck.goes_on.set()
        releasing.join(PATIENCE_S)


def test_a_grant_of_a_later_session_is_not_of_the_former(published: Published) -> None:
    """The thread of the former one may sleep still."""
    first, second = Holder(), Holder()
    published.tell(boottime() + 0.3, 1)
    former = deadlines.watch(PLACE, first)
    published.tell(boottime() + 3600, 2)
    assert deadlines.watch(PLACE, second) is not former
    assert first.lost.wait(PATIENCE_S)
    assert not second.lost.is_set()


def test_what_is_past_already_is_lost_at_once(published: Published) -> None:
    late = Holder()
    published.tell(boottime() - 1, 1)
    assert deadlines.watch(PLACE, late) is not None
    assert late.lost.wait(PATIENCE_S)


def test_where_no_lease_can_run_out_there_is_no_thread() -> None:
    before = threading.active_count()
    assert deadlines.watch(PLACE, Holder()) is None
    assert threading.active_count() == before
