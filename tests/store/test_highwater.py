"""Tokens never go back: a state that is lost, or is one of before, goes on above all that was given."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from dlmfs import fstype
from dlmfs.store import highwater, schema, statefile
from dlmfs.store.base import Put, Txn
from dlmfs.store.highwater import AHEAD, HighWater
from dlmfs.store.sqlite import SqliteStore
from tests.store.drivers import Client, DurableDriver, SqliteDriver, VolatileDriver

DAY = 86400 * 1_000_000 // schema.TICK_US


class Marked(SqliteDriver):
    """With a mark in a folder beside the state, as if both were on a disk."""

    def open(self) -> SqliteStore:
        mark = HighWater(self.path.parent / "var/lib/dlmfs")
        with mock.patch.object(fstype, "fs_type", return_value=self.kind):
            store = SqliteStore(self.path, self.loop, highwater=mark)
        self.stores.append(store)
        return store


class MarkedVolatile(Marked, VolatileDriver):
    """The state is in memory."""

    def open(self) -> SqliteStore:
        with mock.patch.object(
            statefile, "lasting", lambda path: statefile.prepare(path, default=False)
        ):
            return super().open()


class MarkedDurable(Marked, DurableDriver):
    """It is not."""


@pytest.fixture(params=[MarkedVolatile, MarkedDurable], ids=["volatile", "durable"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Marked]:
    made: Marked = request.param(tmp_path)
    yield made
    made.close()


def commit(client: Client) -> int:
    return client.txn(Txn((), (Put(b"a", b""),))).revision


def end(driver: Marked) -> None:
    """All daemons are gone."""
    for store in driver.stores:
        store.close()
    driver.stores.clear()


def lose(driver: Marked) -> None:
    end(driver)
    for path in driver.path.parent.glob("state.db*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("behind", [DAY, 40 * 365 * DAY])
def test_a_lost_state_with_a_clock_that_is_behind(
    driver: Marked, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    before = commit(Client(driver))
    lose(driver)
    clock = schema.clock
    monkeypatch.setattr(schema, "clock", lambda known: max(0, clock(known) - behind))
    after = commit(Client(driver))
    assert before < after < before + 2 * AHEAD
    lose(driver)
    assert commit(Client(driver)) > after


def test_a_state_of_before(driver: Marked) -> None:
    """Put back from a backup, with sessions on record that lived then."""
    client = Client(driver)
    commit(client)
    backup = driver.path.parent / "backup.db"
    with sqlite3.connect(driver.path) as conn:
        conn.execute("VACUUM INTO ?", (str(backup),))
    conn.close()
    before = [commit(client) for _ in range(9)][-1]
    lose(driver)
    backup.rename(driver.path)
    assert commit(Client(driver)) > before


def test_a_state_that_is_in_use_does_not_jump(driver: Marked) -> None:
    before = commit(Client(driver, "a"))
    assert commit(Client(driver, "b")) == before + 1


def test_the_mark_is_raised_in_time_and_never_in_the_event_loop(
    driver: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(highwater, "AHEAD", 100)
    client = Client(driver)
    store = client.store
    assert isinstance(store, SqliteStore)
    threads: list[threading.Thread] = []
    raised = HighWater._raised

    def seen(self: HighWater, folder: Path, revision: int) -> int:
        threads.append(threading.current_thread())
        return raised(self, folder, revision)

    monkeypatch.setattr(HighWater, "_raised", seen)
    for _ in range(30):
        revision = commit(client)
    store.sweep()
    assert threads == []
    for _ in range(60):
        revision = commit(client)
    assert store.highwater.value > revision
    store.sweep()
    driver.run_until(lambda: store.highwater.value >= revision + 100)
    assert threads
    assert threading.current_thread() not in threads
    assert store.highwater.trouble is None


def test_nobody_lowers_the_mark(tmp_path: Path) -> None:
    first, second = (HighWater(tmp_path / "mark") for _ in range(2))
    with mock.patch.object(fstype, "fs_type", return_value="ext4"):
        assert first.read() == 0
        second.read()
        first.keep_above(1_000_000)
        second.keep_above(10)
        assert second.value == first.value == 1_000_000 + AHEAD
        assert (tmp_path / "mark").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "mark/tokens.db").stat().st_mode & 0o777 == 0o600


def _no_home(_folder: Path) -> None:
    """Nothing to make."""


def _a_file(folder: Path) -> None:
    folder.touch()


def _for_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _damaged(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "tokens.db").write_bytes(b"x" * 9000)


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (_no_home, "ext4", "no home"),
        (_a_file, "ext4", "is not a folder"),
        (_for_others, "ext4", "only this user can write"),
        (_damaged, "ext4", "not a database"),
        (Path.mkdir, "tmpfs", "is in memory (tmpfs): a reboot empties it"),
        (Path.mkdir, "nfs4", "is on a network"),
    ],
)
def test_where_no_mark_can_be_kept_it_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    kind: str,
    says: str,
) -> None:
    """And goes on by the clock."""
    mark = HighWater(None if make is _no_home else tmp_path / "mark")
    make(tmp_path / "mark")
    driver = SqliteDriver(tmp_path)
    driver.kind = "ext4"
    lasting = statefile.lasting

    def on_another(path: Path) -> statefile.Place:
        monkeypatch.setattr(fstype, "fs_type", lambda _folder: kind)
        return lasting(path)

    monkeypatch.setattr(statefile, "lasting", on_another)
    store = SqliteStore(driver.path, driver.loop, highwater=mark)
    driver.stores.append(store)
    try:
        told = store.describe()["tokens"]
        assert isinstance(told, str)
        assert told.startswith("they may go back if this state is lost while the clock is behind: ")
        assert says in told
    finally:
        driver.close()
