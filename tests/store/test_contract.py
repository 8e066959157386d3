"""The store contract (store/base.py), sentence by sentence, on every store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs.errors import Bug, LockLost
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
    created_at,
    none_newer,
    unchanged,
)
from tests.store.drivers import Client, Driver, MemoryDriver, SqliteDriver


@pytest.fixture(params=[MemoryDriver, SqliteDriver], ids=["memory", "sqlite"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    made: Driver = request.param(tmp_path)
    yield made
    made.close()


@pytest.fixture
def client(driver: Driver) -> Client:
    return Client(driver)


def put(*pairs: tuple[bytes, bytes], lease: int = 0) -> Txn:
    return Txn((), tuple(Put(k, v, lease) for k, v in pairs))


def read(client: Client, key: bytes) -> KeyValue | None:
    (kv,) = client.txn(Txn((), (Get(key),))).responses
    assert kv is None or isinstance(kv, KeyValue)
    return kv


def test_revisions(client: Client) -> None:
    """Every transaction that changes anything gets the next revision; reading gets none."""
    first = client.txn(put((b"a", b"1"))).revision
    assert client.txn(Txn((), (Get(b"a"),))).revision == first
    second = client.txn(put((b"a", b"2"), (b"b", b"2"))).revision
    assert second == first + 1
    assert read(client, b"a") == KeyValue(b"a", b"2", first, second)
    assert read(client, b"b") == KeyValue(b"b", b"2", second, second)
    assert client.txn(Txn((), (Delete(b"nothing"),))).revision == second
    client.txn(Txn((), (Delete(b"a"),)))
    third = client.txn(put((b"a", b"3"))).revision
    assert read(client, b"a") == KeyValue(b"a", b"3", third, third)


def test_compares(client: Client) -> None:
    made = client.txn(put((b"a", b"1"))).revision
    changed = client.txn(put((b"a", b"2"))).revision
    probes = [
        (created_at(b"a", made), True),
        (created_at(b"a", 0), False),
        (created_at(b"x", 0), True),
        (unchanged(b"a", changed), True),
        (unchanged(b"a", made), False),
        (unchanged(b"x", 0), True),
        (none_newer(b"a", changed), True),
        (none_newer(b"a", made), False),
        (none_newer(b"x", 0), True),
    ]
    for compare, holds in probes:
        assert client.txn(Txn((compare,), ())).succeeded is holds, compare


def test_compares_see_the_state_before_at_every_depth(client: Client) -> None:
    inner = Txn((created_at(b"a", 0),), (Put(b"b", b"then"),), (Put(b"b", b"else"),))
    result = client.txn(Txn((created_at(b"a", 0),), (Put(b"a", b""), inner)))
    nested = result.responses[1]
    assert isinstance(nested, TxnResult)
    assert result.succeeded
    assert nested.succeeded
    assert nested.revision == result.revision
    result = client.txn(Txn((created_at(b"a", 0),), (), (inner, Get(b"a"))))
    nested = result.responses[0]
    assert isinstance(nested, TxnResult)
    assert not result.succeeded
    assert not nested.succeeded
    kv = read(client, b"b")
    assert kv is not None
    assert kv.value == b"else"


def test_operations_see_what_the_same_request_did_before_them(client: Client) -> None:
    """The engine reads the queue in the very transaction that files its wish."""
    result = client.txn(Txn((), (Put(b"q/b", b""), Put(b"q/a", b""), Range(b"q/"))))
    found = result.responses[2]
    assert isinstance(found, tuple)
    assert [kv.key for kv in found if isinstance(kv, KeyValue)] == [b"q/a", b"q/b"]
    assert {kv.mod_revision for kv in found if isinstance(kv, KeyValue)} == {result.revision}


def test_a_request_touches_a_key_once(client: Client) -> None:
    twice = Txn((), (Put(b"a", b"1"), Txn((), (), (Delete(b"a"),))))
    with pytest.raises(Bug, match="twice"):
        client.store.txn(twice, lambda _result: None)
    either = Txn((created_at(b"a", 0),), (Put(b"a", b"1"),), (Delete(b"a"),))
    assert client.txn(either).succeeded


def test_done_never_comes_from_inside_the_call(client: Client) -> None:
    answers: list[object] = []
    client.store.txn(put((b"a", b"1")), answers.append)
    assert answers == []
    client.driver.run_until(lambda: bool(answers))
    assert len(answers) == 1


def test_watch_delivers_in_order_without_gaps_or_repeats(driver: Driver) -> None:
    writer, watcher = Client(driver, "writer"), Client(driver, "watcher")
    start = writer.txn(put((b"w/0", b""), (b"other", b""))).revision
    seen: list[WatchBatch | WatchGap] = []
    watch = watcher.store.watch([b"w/", b"v/"], start, seen.append)
    revisions = [start]
    for number in range(1, 20):
        revisions.append(
            writer.txn(put((b"w/%d" % number, b""), (b"v/x", b"%d" % number))).revision
        )
        writer.txn(put((b"other", b"")))
    writer.txn(Txn((), (Delete(b"w/0"),)))
    driver.run_until(lambda: len(seen) == 21)
    batches = [b for b in seen if isinstance(b, WatchBatch)]
    assert [b.revision for b in batches][:20] == revisions
    assert [len(b.events) for b in batches] == [1] + [2] * 19 + [1]
    last = batches[-1].events[0]
    assert (last.kind, last.kv.key, last.kv.mod_revision) == (
        "delete",
        b"w/0",
        batches[-1].revision,
    )
    watch.cancel()
    writer.txn(put((b"w/1", b"late")))
    writer.txn(put((b"other", b"")))
    assert len(seen) == 21


def test_a_sessions_keys_vanish_together(driver: Driver) -> None:
    dying, watcher = Client(driver, "dying"), Client(driver, "watcher")
    made = dying.txn(put((b"w/a", b""), (b"w/b", b""), lease=dying.session.lease)).revision
    dying.txn(put((b"w/c", b"stays")))
    seen: list[WatchBatch | WatchGap] = []
    watcher.store.watch([b"w/"], made + 2, seen.append)
    assert dying.get(dying.session.close) is None
    driver.run_until(lambda: bool(seen))
    (batch,) = seen
    assert isinstance(batch, WatchBatch)
    assert [(e.kind, e.kv.key) for e in batch.events] == [("delete", b"w/a"), ("delete", b"w/b")]
    assert read(watcher, b"w/c") is not None


def test_a_key_leaves_its_lease_when_it_is_put_without_one(driver: Driver) -> None:
    dying, other = Client(driver, "dying"), Client(driver, "other")
    dying.txn(put((b"a", b"leased"), lease=dying.session.lease))
    other.txn(put((b"a", b"free")))
    assert dying.get(dying.session.close) is None
    assert read(other, b"a") is not None


def test_a_put_on_an_ended_lease_is_refused_and_nothing_applied(driver: Driver) -> None:
    dead, other = Client(driver, "dead"), Client(driver, "other")
    dead.get(dead.session.close)
    assert isinstance(
        other.fails(put((b"a", b""), (b"b", b""), lease=dead.session.lease)), LockLost
    )
    assert read(other, b"a") is None


def test_two_handles_lose_no_increment(driver: Driver) -> None:
    clients = [Client(driver, "a"), Client(driver, "b")]
    for number in range(30):
        client = clients[number % 2]
        while True:
            kv = read(client, b"n")
            value, revision = (int(kv.value), kv.mod_revision) if kv else (0, 0)
            change = Txn((unchanged(b"n", revision),), (Put(b"n", b"%d" % (value + 1)),))
            if client.txn(change).succeeded:
                break
    kv = read(clients[0], b"n")
    assert kv is not None
    assert kv.value == b"30"
