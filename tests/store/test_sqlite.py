"""What only the embedded store promises: deaths, stopped writers, files that vanish."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs import fstype
from dlmfs.errors import BadState, Bug, LockLost, StoreFull, Unavailable, UsageError
from dlmfs.store import schema, sqlite, statefile
from dlmfs.store.base import (
    Delete,
    Get,
    KeyValue,
    Put,
    Range,
    Txn,
    TxnResult,
    WatchBatch,
    WatchGap,
)
from dlmfs.store.bells import Bells
from dlmfs.store.sqlite import SqliteStore
from dlmfs.store.sqlite_session import SqliteSession
from tests.fs.nodes import PATIENCE_S, ROOT
from tests.store.drivers import Client, DurableDriver, SqliteDriver, VolatileDriver

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

COUNTER = """
import asyncio, sys
from pathlib import Path
from dlmfs.store.base import Get, Put, Txn, unchanged
from dlmfs.store.sqlite import SqliteStore

async def main():
    loop = asyncio.get_running_loop()
    store = SqliteStore(Path(sys.argv[1]), loop)

    async def ask(start, *args):
        answer = loop.create_future()
        start(*args, answer.set_result)
        answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    session = await ask(store.open_session, "counter", 15.0, print)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    for _ in range(100):
        while True:
            (kv,) = (await ask(store.txn, Txn((), (Get(b"n"),)))).responses
            value, revision = (int(kv.value), kv.mod_revision) if kv else (0, 0)
            change = Txn((unchanged(b"n", revision),), (Put(b"n", b"%d" % (value + 1)),))
            if (await ask(store.txn, change)).succeeded:
                break
    await ask(session.close)
    store.close()

asyncio.run(main())
"""


@pytest.fixture(params=[VolatileDriver, DurableDriver], ids=["volatile", "durable"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqliteDriver]:
    made: SqliteDriver = request.param(tmp_path)
    yield made
    made.close()


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()  # a stopped one dies too, and is waited for


def start(children: list[subprocess.Popen[str]], script: str, path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
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
    driver.run_until(lambda: len(schema.sessions(client.store._worker.fast)) == 1)  # type: ignore[attr-defined]


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
    peer.txn(Txn((), (Put(b"h/x", b""),)))  # the watch is on record before this is answered
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
    monkeypatch.setattr(fstype, "fs_type", lambda _folder: "nfs4")
    with pytest.raises(BadState, match="nfs4"):
        statefile.prepare(tmp_path / "x.db", default=False)


def put(key: bytes, value: bytes = b"", lease: int = 0) -> Txn:
    return Txn((), (Put(key, value, lease),))


def test_processes_lose_no_increment(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    """Four processes compare and swap at the same time, and a watch sees every step once."""
    client = Client(driver)
    first = client.txn(put(b"start")).revision + 1
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch([b"n"], first, seen.append)
    counters = [start(children, COUNTER, driver.path) for _ in range(4)]
    for counter in counters:
        assert counter.stdin is not None
        counter.stdin.write("go\n")
        counter.stdin.flush()
    driver.run_until(lambda: len(seen) == 400)
    for counter in counters:
        assert counter.wait(PATIENCE_S) == 0
    batches = [batch for batch in seen if isinstance(batch, WatchBatch)]
    assert [int(b.events[0].kv.value) for b in batches] == list(range(1, 401))
    assert [b.revision for b in batches] == list(range(first, first + 400))
    (kv,) = client.txn(Txn((), (Get(b"n"),))).responses
    assert isinstance(kv, KeyValue)
    assert kv.value == b"400"
    driver.run_until(lambda: len(schema.sessions(_connection(client))) == 1)


def _connection(client: Client) -> sqlite3.Connection:
    assert isinstance(client.store, SqliteStore)
    return client.store._worker.fast


def test_a_killed_process_frees_its_keys_in_one_revision_once(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    """Two survivors bury the same dead: the second finds that it is done."""
    clients = [Client(driver, "a"), Client(driver, "b")]
    child = start(children, MEMBER, driver.path)
    revision = clients[0].txn(put(b"x")).revision
    seen: list[list[WatchBatch | WatchGap]] = [[], []]
    for client, sink in zip(clients, seen, strict=True):
        client.store.watch([b"w/"], revision + 1, sink.append)
    assert clients[0].txn(Txn((), (Range(b"w/"),))).responses[0] != ()
    child.kill()
    driver.run_until(lambda: all(seen))
    assert clients[1].txn(put(b"x")).revision == revision + 2
    for sink in seen:
        (batch,) = sink
        assert isinstance(batch, WatchBatch)
        assert batch.revision == revision + 1
        assert len(batch.events) == 2
    assert not any(client.lost for client in clients)


def test_a_stopped_process_is_not_taken_for_dead(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    """It may go on at any time and believe in its locks."""
    client = Client(driver)
    child = start(children, MEMBER, driver.path)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert isinstance(client.session, SqliteSession)
    for _ in range(3):
        client.session.look()
        assert client.txn(Txn((), (Range(b"w/"),))).responses[0] != ()
    rows = client.store.describe()["sessions"]
    assert isinstance(rows, list)
    found = {(row["node"], row["pid"], row["own"], row["stopped"]) for row in rows}
    assert found == {("n", os.getpid(), True, False), ("member", child.pid, False, True)}
    child.kill()
    driver.run_until(lambda: len(schema.sessions(_connection(client))) == 1)


def test_the_loop_runs_and_others_read_while_a_writer_is_stopped(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    """No call waits; what was asked meanwhile is answered once, in order, when it goes on."""
    client = Client(driver)
    reader = Client(driver, "reader")
    before = client.txn(put(b"a", b"0")).revision
    assert "waiting_for_pid" not in client.store.describe()
    child = start(children, STOPPED, driver.path)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    answers: list[object] = []
    begun = time.monotonic()
    for number in range(5):
        client.store.txn(put(b"a", b"%d" % number), answers.append)
    assert time.monotonic() - begun < sqlite.OPEN_TIMEOUT_S / 2
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        driver.loop.call_later(0.01, tick)

    client.store.txn(Txn((), (Get(b"a"),)), answers.append)
    tick()
    driver.run_until(lambda: len(ticks) >= 20)
    assert answers == []
    assert client.store.describe()["waiting_for_pid"] == child.pid
    (kv,) = reader.txn(Txn((), (Get(b"a"),))).responses
    assert kv == KeyValue(b"a", b"0", before, before)
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait(PATIENCE_S) == 0
    driver.run_until(lambda: len(answers) == 6)
    results = [answer for answer in answers if isinstance(answer, TxnResult)]
    assert [result.revision for result in results[:5]] == list(range(before + 1, before + 6))
    assert results[5].responses == (KeyValue(b"a", b"4", before, before + 5),)
    assert "waiting_for_pid" not in client.store.describe()
    assert client.lost == []


def test_a_writer_killed_inside_a_transaction_frees_the_others(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    client = Client(driver)
    child = start(children, STOPPED, driver.path)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    answers: list[object] = []
    client.store.txn(put(b"a"), answers.append)
    child.kill()
    driver.run_until(lambda: bool(answers))
    assert isinstance(answers[0], TxnResult)


def test_a_writer_stopped_for_longer_than_an_open_may_take(
    driver: SqliteDriver,
    request: pytest.FixtureRequest,
    children: list[subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long it stands, the transaction is answered at last."""
    monkeypatch.setattr(sqlite, "OPEN_TIMEOUT_S", 0.1)
    driver.patience_s = 10.0
    client = Client(driver)
    child = start(children, STOPPED, driver.path)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    answers: list[object] = []
    client.store.txn(put(b"a"), answers.append)
    ticks: list[int] = []
    driver.loop.call_later(1.0, ticks.append, 1)
    driver.run_until(lambda: bool(ticks))
    os.kill(child.pid, signal.SIGCONT)
    driver.run_until(lambda: bool(answers))
    assert isinstance(answers[0], TxnResult)
    assert client.txn(put(b"a")).revision == answers[0].revision + 1


def test_opening_while_a_writer_is_stopped_says_so(
    tmp_path: Path, children: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "OPEN_TIMEOUT_S", 0.1)
    path = tmp_path / "state.db"
    path.touch(0o600)
    schema.connect(path, volatile=True, timeout_s=10).close()
    child = start(children, STOPPED, path)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    driver = SqliteDriver(tmp_path)
    try:
        with pytest.raises(Unavailable, match="held by another daemon"):
            driver.open()
    finally:
        driver.close()


def test_a_store_can_be_closed_while_a_writer_is_stopped(
    driver: SqliteDriver, children: list[subprocess.Popen[str]]
) -> None:
    client = Client(driver)
    child = start(children, STOPPED, driver.path)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    answers: list[object] = []
    client.store.txn(put(b"a"), answers.append)
    client.store.close()
    driver.stores.clear()
    assert answers == []


@pytest.mark.parametrize("replacement", [None, "copy", "link"])
def test_the_loss_is_noticed_without_a_transaction(
    driver: SqliteDriver, replacement: str | None
) -> None:
    """By the sweep; and told once. A copy of the same bytes is another file."""
    client = Client(driver)
    copy = driver.path.read_bytes()
    driver.path.unlink()
    if replacement == "copy":
        driver.path.write_bytes(copy)
    elif replacement == "link":
        driver.path.symlink_to("nowhere")
    driver.run_until(lambda: bool(client.lost))
    for work in (put(b"a"), Txn((), (Get(b"a"),))):
        assert isinstance(client.fails(work), LockLost)
    assert isinstance(client.get(client.session.close), LockLost)
    assert len(client.lost) == 1
    assert client.store.describe()["lost"] == client.lost[0]
    if replacement == "copy":
        assert driver.path.read_bytes() == copy


def test_a_peer_is_rung_only_for_what_it_watches(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is rung for reads, nor after a cancelled watch, nor the writer itself."""
    client, peer = Client(driver, "a"), Client(driver, "b")
    rings: list[int] = []
    ring = Bells.ring

    def counted(self: Bells, lease: int) -> None:
        rings.append(lease)
        ring(self, lease)

    monkeypatch.setattr(Bells, "ring", counted)
    revision = client.txn(put(b"w/x")).revision
    client.store.watch([b"w/"], revision + 1, lambda _batch: None)
    seen: list[WatchBatch | WatchGap] = []
    watch = peer.store.watch([b"w/", b"v/"], revision + 1, seen.append)
    peer.txn(put(b"other"))  # the watch is on record before this is answered
    rings.clear()
    client.txn(put(b"w"))
    client.txn(put(b"w0"))
    client.txn(Txn((), (Get(b"w/x"), Delete(b"w/absent"))))
    assert rings == []
    client.txn(Txn((), (Put(b"w/x", b""), Put(b"v/x", b""))))
    assert rings == [peer.session.lease]
    driver.run_until(lambda: bool(seen))
    watch.cancel()
    peer.txn(put(b"other"))
    rings.clear()
    client.txn(put(b"v/x"))
    assert rings == []


def test_a_watch_that_keeps_up_survives_trimming(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "TRIM_EVERY", 10)
    monkeypatch.setattr(sqlite, "KEEP_REVISIONS", 5)
    client = Client(driver)
    first = client.txn(put(b"w/x")).revision
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], first, seen.append)
    driver.run_until(lambda: len(seen) == 1)
    for number in range(2, 50):
        client.txn(put(b"w/x"))
        driver.run_until(lambda wanted=number: len(seen) == wanted)  # type: ignore[misc]
    assert [b.revision for b in seen if isinstance(b, WatchBatch)] == list(range(first, first + 49))


def test_a_gap_says_where_to_go_on_and_comes_once(driver: SqliteDriver) -> None:
    client = Client(driver)
    first = client.txn(put(b"w/x")).revision
    for _ in range(9):
        client.txn(put(b"w/x"))
    schema.trim(_connection(client), 4)
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], first, seen.append)
    driver.run_until(lambda: bool(seen))
    client.txn(put(b"w/x"))
    gap = seen[0]
    assert gap == WatchGap(first + 6)
    again: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], gap.oldest, again.append)
    driver.run_until(lambda: len(again) == 5)
    assert [b.revision for b in again if isinstance(b, WatchBatch)] == list(
        range(first + 6, first + 11)
    )
    assert len(seen) == 1


def test_the_log_has_all_that_was_not_trimmed_and_says_what_was(driver: SqliteDriver) -> None:
    client = Client(driver)
    first = client.txn(put(b"w/x")).revision
    for _ in range(9):
        client.txn(put(b"w/x"))
    schema.trim(_connection(client), 4)
    last_trimmed = first + 5
    before: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], last_trimmed, before.append)
    after: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], last_trimmed + 1, after.append)
    driver.run_until(lambda: bool(before) and len(after) == 4)
    assert before == [WatchGap(last_trimmed + 1)]
    kept = [batch.revision for batch in after if isinstance(batch, WatchBatch)]
    assert kept == list(range(last_trimmed + 1, first + 10))


def test_no_gap_after_cancel(driver: SqliteDriver) -> None:
    """One watch's sink cancels the other; both are behind the log."""
    client = Client(driver)
    first = client.txn(put(b"w/x")).revision
    for _ in range(9):
        client.txn(put(b"w/x"))
    schema.trim(_connection(client), 4)
    seen: list[WatchBatch | WatchGap] = []
    late: list[WatchBatch | WatchGap] = []

    def sink(batch: WatchBatch | WatchGap) -> None:
        seen.append(batch)
        other.cancel()

    client.store.watch([b"w/"], first, sink)
    other = client.store.watch([b"w/"], first, late.append)
    driver.run_until(lambda: bool(seen))
    client.txn(put(b"w/x"))
    assert late == []


def test_a_session_that_cannot_begin_is_refused_later(driver: SqliteDriver) -> None:
    Path(f"{driver.path}.d").touch()
    store = driver.open()
    answers: list[object] = []
    store.open_session("n", 15.0, lambda _reason: None, answers.append)
    assert answers == []
    driver.run_until(lambda: bool(answers))
    assert isinstance(answers[0], BadState)


def test_a_session_that_cannot_begin_leaves_nothing_behind(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Bells, _lease: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Bells, "listen", full)
    store = driver.open()
    answers: list[object] = []
    store.open_session("n", 15.0, lambda _reason: None, answers.append)
    driver.run_until(lambda: bool(answers))
    assert isinstance(answers[0], StoreFull)
    assert os.listdir(f"{driver.path}.d") == []


def test_long_paths_ring_too(tmp_path: Path) -> None:
    """Through the socket, not by luck of the sweep: the peer hears of a key it watches."""
    folder = tmp_path / ("d" * 200)
    folder.mkdir()
    driver = SqliteDriver(folder)
    try:
        client, peer = Client(driver, "a"), Client(driver, "b")
        assert len(str(driver.path)) > 108
        seen: list[WatchBatch | WatchGap] = []
        revision = client.txn(put(b"w/x")).revision
        peer.store.watch([b"w/"], revision + 1, seen.append)
        client.txn(put(b"w/x"))
        driver.run_until(lambda: bool(seen))
    finally:
        driver.close()


def test_sessions_leave_nothing_but_the_state(driver: SqliteDriver) -> None:
    clients = [Client(driver, str(number)) for number in range(3)]
    assert len(os.listdir(f"{driver.path}.d")) == 6
    for client in clients:
        assert client.get(client.session.close) is None
    assert os.listdir(f"{driver.path}.d") == []
    assert schema.sessions(_connection(clients[0])) == []
    assert not any(client.lost for client in clients)


def test_a_watch_that_breaks_is_begun_anew_and_the_others_are_told(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with one must not keep the other from its events, nor pass for "nothing happened"."""
    client, peer = Client(driver, "a"), Client(driver, "b")
    faults: list[object] = []
    driver.loop.set_exception_handler(lambda _loop, context: faults.append(context["exception"]))
    broken: list[WatchBatch | WatchGap] = []
    sound: list[WatchBatch | WatchGap] = []
    revision = client.txn(Txn((), (Put(b"h/x", b""),))).revision
    client.store.watch([b"w/"], revision, broken.append)
    client.store.watch([b"m/"], revision, sound.append)
    events_since = schema.events_since

    def buggy(conn: sqlite3.Connection, start: int, prefixes: tuple[bytes, ...]) -> object:
        if prefixes == (b"w/",):
            raise KeyError("a bug")
        return events_since(conn, start, prefixes)

    monkeypatch.setattr(schema, "events_since", buggy)
    peer.txn(Txn((), (Put(b"w/x", b""), Put(b"m/x", b""))))
    driver.run_until(lambda: bool(broken and sound))
    assert isinstance(broken[0], WatchGap)
    assert isinstance(sound[0], WatchBatch)
    assert len(faults) == 1


@pytest.mark.allow_warnings
def test_a_transaction_that_breaks_is_answered(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the loop and in the thread: who asked would wait for ever, and so would all behind it."""
    client = Client(driver)

    def buggy(*_args: object, **_more: object) -> object:
        raise KeyError("a bug")

    for volatile in (True, False):
        monkeypatch.setattr(client.store._worker, "volatile", volatile)  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(schema, "evaluate", buggy)
            assert isinstance(client.fails(Txn((), (Put(b"a", b""),))), Bug)
        assert client.txn(Txn((), (Put(b"a", b""),))).succeeded


@pytest.mark.allow_warnings
def test_a_state_that_is_restored_in_place_fences(driver: SqliteDriver, tmp_path: Path) -> None:
    """The file is the same, its content that of a copy: what was granted since is forgotten."""
    client = Client(driver)
    copy = sqlite3.connect(tmp_path / "copy.db")
    live = sqlite3.connect(client.store.path)  # type: ignore[attr-defined]
    live.backup(copy)
    client.txn(Txn((), (Put(b"later", b""),)))
    client.store.sweep()  # type: ignore[attr-defined]
    copy.backup(live)
    client.store.sweep()  # type: ignore[attr-defined]
    driver.run_until(lambda: bool(client.lost))
    assert "restored while in use" in client.lost[0]
    for conn in (copy, live):
        conn.close()
