"""What only the embedded store promises: deaths, stopped writers, files that vanish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs.errors import BadState, LockLost, UsageError
from dlmfs.store import schema, sqlite, statefile
from dlmfs.store.base import Put, Txn, WatchBatch, WatchGap
from dlmfs.store.bells import Bells
from tests.fs.nodes import PATIENCE_S, ROOT
from tests.store.drivers import Client, SqliteDriver

MEMBER = """
import asyncio, sys
from pathlib import Path
from dlmfs.store.base import Put, Txn
from dlmfs.store.sqlite import SqliteStore

async def main():
    loop = asyncio.get_running_loop()
    store = SqliteStore(Path(sys.argv[1]), loop)
    opened = loop.create_future()
    store.open_session("member", 15.0, print, opened.set_result)
    session = await opened
    done = loop.create_future()
    keys = (Put(b"w/a", b"", session.lease), Put(b"w/b", b"", session.lease))
    store.txn(Txn((), keys), done.set_result)
    await done
    print("ready", flush=True)
    await loop.create_future()

asyncio.run(main())
"""

STOPPED = """
import os, signal, sqlite3, sys
conn = sqlite3.connect(sys.argv[1], isolation_level=None)
conn.execute("BEGIN IMMEDIATE")
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
conn.execute("ROLLBACK")
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[SqliteDriver]:
    made = SqliteDriver(tmp_path)
    yield made
    made.close()


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def start(children: list[subprocess.Popen[str]], script: str, path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_killed_process_frees_its_keys(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    client = Client(driver)
    child = start(children, MEMBER, driver.path)
    revision = client.txn(Txn((), (Put(b"x", b""),))).revision
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], revision, seen.append)
    child.kill()
    driver.run_until(lambda: bool(seen))
    batch = seen[0]
    assert isinstance(batch, WatchBatch)
    assert [e.kv.key for e in batch.events] == [b"w/a", b"w/b"]
    driver.run_until(lambda: len(os.listdir(f"{driver.path}.d")) == 2)


def test_leftovers_of_a_dead_host_are_swept_by_the_next_session(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    child = start(children, MEMBER, driver.path)
    child.kill()
    child.wait(PATIENCE_S)
    client = Client(driver)
    driver.run_until(lambda: len(schema.sessions(client.store._fast)) == 1)  # type: ignore[attr-defined]


def test_a_writer_stopped_inside_a_transaction_stops_nobodys_loop(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    client = Client(driver)
    child = start(children, STOPPED, driver.path)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    answers: list[object] = []
    client.store.txn(Txn((), (Put(b"a", b""),)), answers.append)
    ticks: list[int] = []
    driver.loop.call_later(0.05, ticks.append, 1)
    driver.run_until(lambda: bool(ticks))
    assert answers == []
    assert client.store.describe()["waiting_for_pid"] == child.pid
    os.kill(child.pid, signal.SIGCONT)
    driver.run_until(lambda: bool(answers))


@pytest.mark.parametrize("replace", [False, True])
def test_a_state_file_that_is_deleted_or_replaced_is_lost(
    driver: SqliteDriver, replace: bool
) -> None:
    client = Client(driver)
    driver.path.unlink()
    if replace:
        driver.path.touch()
    assert isinstance(client.fails(Txn((), (Put(b"a", b""),))), LockLost)
    driver.run_until(lambda: bool(client.lost))
    assert "deleted or replaced" in client.lost[0]


def test_uncontended_traffic_wakes_nobody(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = Client(driver, "a"), Client(driver, "b")
    rings: list[int] = []
    ring = Bells.ring

    def counted(self: Bells, lease: int) -> None:
        rings.append(lease)
        ring(self, lease)

    seen: list[WatchBatch | WatchGap] = []
    revision = client.txn(Txn((), (Put(b"h/x", b""),))).revision
    peer.store.watch([b"w/"], revision, seen.append)
    client.txn(Txn((), (Put(b"h/x", b""),)))
    monkeypatch.setattr(Bells, "ring", counted)
    for _ in range(10):
        client.txn(Txn((), (Put(b"h/x", b""),)))
    assert rings == []
    client.txn(Txn((), (Put(b"w/x", b""),)))
    assert rings == [peer.session.lease]
    driver.run_until(lambda: bool(seen))


def test_who_falls_behind_the_log_is_told(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "TRIM_EVERY", 10)
    monkeypatch.setattr(sqlite, "KEEP_REVISIONS", 5)
    client = Client(driver)
    first = client.txn(Txn((), (Put(b"w/x", b""),))).revision
    for _ in range(40):
        client.txn(Txn((), (Put(b"w/x", b""),)))
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], first, seen.append)
    driver.run_until(lambda: bool(seen))
    assert isinstance(seen[0], WatchGap)
    assert seen[0].oldest > first


def test_long_paths(tmp_path: Path) -> None:
    """The 108 bytes of a socket's name are no limit for the folder."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    driver = SqliteDriver(folder)
    try:
        Client(driver, "a"), Client(driver, "b")
    finally:
        driver.close()


def test_a_new_states_revision_starts_at_wall_clock_time(driver: SqliteDriver) -> None:
    """protocol-traps 17: tokens must not restart after a reboot has wiped the state."""
    client = Client(driver)
    before = client.txn(Txn((), (Put(b"a", b""),))).revision
    assert 1 << 45 < before < 1 << 47


def test_places_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".x", "a/b", "x" * 65):
        with pytest.raises(UsageError):
            statefile.default_path(name)
    with pytest.raises(UsageError, match="does not exist"):
        statefile.prepare(tmp_path / "no" / "x.db", default=False)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(BadState, match="only this user"):
        statefile.prepare(open_to_all / "x.db", default=True)
    monkeypatch.setattr(statefile, "fs_type", lambda _folder: "nfs4")
    with pytest.raises(BadState, match="nfs4"):
        statefile.prepare(tmp_path / "x.db", default=False)
