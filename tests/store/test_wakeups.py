"""Whoever must act hears of it: by a bell at once, and if that is missed, by itself within a second."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dlmfs.errors import DlmfsError, Unavailable
from dlmfs.store import lives, schema, sqlite, sqlite_session
from dlmfs.store.base import Put, Range, Txn, WatchBatch, WatchGap
from dlmfs.store.bells import Bells
from dlmfs.store.sqlite import SqliteStore
from dlmfs.store.sqlite_session import SqliteSession
from tests.store.drivers import Client, DurableDriver, SqliteDriver, VolatileDriver
from tests.store.test_sqlite import MEMBER, children, driver, put, start

__all__ = ["children", "driver"]


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bells alone."""
    monkeypatch.setattr(sqlite_session, "SWEEP_S", 1000.0)


def session(client: Client) -> SqliteSession:
    assert isinstance(client.session, SqliteSession)
    return client.session


def store(client: Client) -> SqliteStore:
    assert isinstance(client.store, SqliteStore)
    return client.store


def watched(client: Client, peer: Client) -> list[WatchBatch | WatchGap]:
    """What the peer hears from now on of a key on the client's lease, which is there."""
    revision = client.txn(put(b"w/a", lease=client.session.lease)).revision
    seen: list[WatchBatch | WatchGap] = []
    peer.store.watch([b"w/"], revision + 1, seen.append)
    peer.txn(put(b"other"))  # the watch is on record before this is answered
    return seen


# -- a session that is given up while its daemon lives on -----------------------------------------------


@pytest.mark.usefixtures("no_sweep")
def test_a_session_that_was_given_up_rings_when_it_is_ended(driver: SqliteDriver) -> None:
    """A fence gives the session up first, and ends it in the store after that."""
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)
    session(client).abandon()
    assert client.get(lambda done: client.store.end_session(client.session.lease, done)) is None
    driver.run_until(lambda: bool(seen))
    assert isinstance(seen[0], WatchBatch)
    assert seen[0].events[0].kind == "delete"
    driver.run_until(lambda: len(os.listdir(f"{driver.path}.d")) == 2)


@pytest.mark.usefixtures("no_sweep")
def test_a_session_given_up_keeps_what_it_has_until_it_is_ended(driver: SqliteDriver) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)
    session(client).abandon()
    for _ in range(3):
        session(peer).look()
        assert peer.txn(Txn((), (Range(b"w/"),))).responses[0] != ()
    assert seen == []


@pytest.mark.usefixtures("no_sweep")
def test_a_session_that_its_own_daemon_cannot_end_is_ended_by_the_others(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)

    def refused(_work: object, done: Callable[[DlmfsError], None]) -> None:
        driver.loop.call_soon(done, Unavailable("no space"))

    monkeypatch.setattr(client.store, "_write", refused)
    session(client).abandon()
    client.get(lambda done: client.store.end_session(client.session.lease, done))
    left = f"{client.session.lease:x}.lock"
    assert left in os.listdir(f"{driver.path}.d"), "without it the process would have to end first"
    driver.run_until(lambda: bool(seen))


@pytest.mark.usefixtures("no_sweep")
def test_a_new_session_ends_the_life_of_the_old_one(driver: SqliteDriver) -> None:
    """Where nobody ended it in the store."""
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)
    session(client).abandon()
    lost: list[DlmfsError] = []
    client.get(lambda done: client.store.open_session("a", 15.0, lost.append, done))
    driver.run_until(lambda: bool(seen))


# -- bells that are missed ---------------------------------------------------------------------------


def test_a_missed_bell_costs_a_second(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)
    monkeypatch.setattr(Bells, "ring", lambda _self, _lease: None)
    client.txn(put(b"w/x"))
    driver.run_until(lambda: bool(seen))


def test_the_sweep_asks_for_nothing_while_nobody_commits(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    watched(client, peer)
    store(peer).sweep()
    asked: list[int] = []
    changes_since = schema.changes_since

    def counted(*args: Any) -> Any:
        asked.append(1)
        return changes_since(*args)

    monkeypatch.setattr(schema, "changes_since", counted)
    store(peer).sweep()
    assert asked == []
    client.txn(put(b"h/x"))
    store(peer).sweep()
    assert asked == [1]


def test_the_sweep_makes_up_for_a_log_that_was_trimmed(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)
    store(peer).sweep()
    monkeypatch.setattr(Bells, "ring", lambda _self, _lease: None)
    for _ in range(9):
        client.txn(put(b"w/x"))
    schema.trim(store(client)._worker.fast, 4)
    driver.run_until(lambda: bool(seen))
    assert isinstance(seen[0], WatchGap)


@pytest.mark.usefixtures("no_sweep")
def test_a_full_bell_is_a_bell(driver: SqliteDriver) -> None:
    """Nobody listens for as long as it takes to fill it."""
    client, peer = Client(driver, "a"), Client(driver, "b")
    seen = watched(client, peer)
    for _ in range(5000):
        session(client).ring(peer.session.lease)
    client.txn(put(b"w/x"))
    driver.run_until(lambda: bool(seen))


@pytest.mark.usefixtures("no_sweep")
def test_who_was_there_before_the_folder_was_deleted_is_found_in_the_new_one(
    driver: SqliteDriver,
) -> None:
    """And rung there, by newcomers; nobody is taken for dead on the way."""
    clients = [Client(driver, "a"), Client(driver, "b")]
    seen = watched(*clients)
    shutil.rmtree(f"{driver.path}.d")
    newcomer = Client(driver, "c")
    for client in clients:
        session(client).sweep()
    assert len(os.listdir(f"{driver.path}.d")) == 6
    newcomer.txn(put(b"w/x"))
    driver.run_until(lambda: bool(seen))
    assert len(store(newcomer).sessions()) == 3
    assert not any(client.lost for client in clients)


# -- in doubt nobody is buried -------------------------------------------------------------------------


def test_a_missing_lock_file_is_no_death(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    """Somebody tidied up. The end of the process is one, though nobody has reaped it yet."""
    client = Client(driver)
    child = start(children, MEMBER, driver.path)
    child_lease = next(lease for lease, _, pid in store(client).sessions() if pid == child.pid)
    Path(f"{driver.path}.d", f"{child_lease:x}.lock").unlink()
    for _ in range(3):
        session(client).look()
        assert client.txn(Txn((), (Range(b"w/"),))).responses[0] != ()
    child.kill()
    driver.run_until(lambda: len(store(client).sessions()) == 1)


def test_who_has_no_descriptor_to_look_with_buries_nobody(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    assert session(peer)._place is not None
    monkeypatch.setattr(lives, "_OWN", Counter())  # as if they were two processes
    lives_of = session(peer)._place.lives  # type: ignore[union-attr]

    def refused(*_args: object, **_more: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refused)
    assert lives_of.alive(client.session.lease, 1)


# -- the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "synchronous"), [(VolatileDriver, 0), (DurableDriver, 2)])
def test_on_a_disk_a_commit_is_on_the_medium_before_it_is_answered(
    tmp_path: Path, kind: type[SqliteDriver], synchronous: int
) -> None:
    """FULL; in memory it would cost for nothing."""
    made = kind(tmp_path)
    try:
        client = Client(made)
        client.txn(Txn((), (Put(b"a", b""),)))
        worker = store(client)._worker
        for conn in filter(None, (worker.fast, worker._slow)):
            assert conn.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert (worker._slow is not None) == (kind is DurableDriver)
    finally:
        made.close()


def test_the_log_is_trimmed_by_daemons_that_live_shortly(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "KEEP_REVISIONS", 20)

    def rows(client: Client) -> int:
        (count,) = store(client)._worker.fast.execute("SELECT count(*) FROM log").fetchone()
        assert isinstance(count, int)
        return count

    for _ in range(5):
        client = Client(driver)
        for _ in range(10):
            client.txn(put(b"a"))
        assert client.get(client.session.close) is None
    client = Client(driver)
    driver.run_until(lambda: rows(client) <= 20)


@pytest.fixture(autouse=True)
def _descriptors_stay(driver: SqliteDriver) -> Iterator[None]:
    """What sessions and stores open they close."""
    yield
    driver.close()
    driver.stores.clear()
