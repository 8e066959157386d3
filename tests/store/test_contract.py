"""The store contract (store/base.py), sentence by sentence, on every store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs.errors import Bug, LockLost
from dlmfs.store.base import (
    Compare,
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
from tests.store.drivers import (
    Client,
    Driver,
    DurableDriver,
    EtcdDriver,
    MemoryDriver,
    SqliteDriver,
    VolatileDriver,
)


@pytest.fixture(
    params=[MemoryDriver, VolatileDriver, DurableDriver, EtcdDriver],
    ids=["memory", "sqlite-volatile", "sqlite-durable", "etcd"],
)
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


def watch(client: Client, *prefixes: bytes, start: int) -> list[WatchBatch | WatchGap]:
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch(prefixes, start, seen.append)
    return seen


def flush(driver: Driver, client: Client) -> None:
    """Wait until the client's handle has been told all that was committed so far."""
    revision = client.txn(put((b"~flush", b""))).revision
    seen = watch(client, b"~flush", start=revision)
    driver.run_until(lambda: bool(seen))
    if isinstance(driver, EtcdDriver):
        driver.flush(client.store, revision)


def test_a_failed_compare_changes_nothing(client: Client) -> None:
    """The transaction is atomic: one compare that does not hold stops all of `then`."""
    start = client.txn(put((b"a", b"1"))).revision
    compares = (unchanged(b"a", start), unchanged(b"b", start))
    result = client.txn(Txn(compares, (Put(b"a", b"2"), Put(b"c", b""))))
    assert not result.succeeded
    assert result.revision == start
    assert result.responses == ()
    assert read(client, b"a") == KeyValue(b"a", b"1", start, start)
    assert read(client, b"c") is None


def test_the_branch_that_ran_answers(client: Client) -> None:
    made = client.txn(put((b"a", b"1"))).revision
    both = ((Get(b"a"), Range(b"a")), (Get(b"x"),))
    held = client.txn(Txn((unchanged(b"a", made),), *both))
    kv = KeyValue(b"a", b"1", made, made)
    assert (held.succeeded, held.responses) == (True, (kv, (kv,)))
    failed = client.txn(Txn((unchanged(b"a", 0),), *both))
    assert (failed.succeeded, failed.responses) == (False, (None,))


def test_less_than_compares(client: Client) -> None:
    made = client.txn(put((b"a", b"1"))).revision
    changed = client.txn(put((b"a", b"2"))).revision
    client.txn(put((b"a/b", b"")))
    probes = [
        (Compare(b"a", "create", "<", made), False),
        (Compare(b"a", "create", "<", made + 1), True),
        (Compare(b"a", "mod", "<", changed), False),
        (Compare(b"a", "mod", "<", changed + 1), True),
        (Compare(b"none", "mod", "<", 1), True),
        (Compare(b"none", "mod", "<", 0), False),
        (Compare(b"none", "mod", "=", 0, prefix=True), True),
        (Compare(b"a", "create", "=", made, prefix=True), False),
        (Compare(b"a/", "create", "=", changed + 1, prefix=True), True),
        (Compare(b"a", "mod", "=", changed + 1, prefix=True), False),
    ]
    for compare, holds in probes:
        assert client.txn(Txn((compare,), ())).succeeded is holds, compare


def test_none_newer_does_not_count_deletions_or_neighbours(client: Client) -> None:
    start = client.txn(put((b"p/a", b""), (b"p/b", b""))).revision
    client.txn(put((b"p", b""), (b"p0", b""), (b"o", b"")))
    client.txn(Txn((), (Delete(b"p/a"),)))
    assert client.txn(Txn((none_newer(b"p/", start),), ())).succeeded
    client.txn(put((b"p/\xff\xff", b"")))
    assert not client.txn(Txn((none_newer(b"p/", start),), ())).succeeded


@pytest.mark.parametrize("prefix", [b"", b"\xff"])
def test_prefixes_without_an_upper_end(
    client: Client, request: pytest.FixtureRequest, prefix: bytes
) -> None:
    """The empty prefix is every key."""
    if isinstance(client.driver, SqliteDriver):
        client.driver.patience_s = 3.0
    start = client.txn(put((prefix + b"a", b""))).revision
    assert client.txn(Txn((none_newer(prefix, start),), ())).succeeded
    assert not client.txn(Txn((none_newer(prefix, start - 1),), ())).succeeded
    (found,) = client.txn(Txn((), (Range(prefix),))).responses
    assert found == (KeyValue(prefix + b"a", b"", start, start),)
    seen = watch(client, prefix, start=start)
    client.driver.run_until(lambda: bool(seen))


def test_nested_transactions_three_deep(client: Client) -> None:
    """In place, each with its own `succeeded`, all against the state before the whole."""
    deepest = Txn((unchanged(b"a", 0),), (Put(b"c", b"then"),), (Put(b"c", b"else"),))
    middle = Txn((created_at(b"b", 7),), (), (Put(b"b", b""), deepest, Get(b"c")))
    result = client.txn(Txn((unchanged(b"a", 0),), (Put(b"a", b""), middle, Get(b"b"))))
    inner = result.responses[1]
    assert isinstance(inner, TxnResult)
    innermost = inner.responses[1]
    assert isinstance(innermost, TxnResult)
    assert (result.succeeded, inner.succeeded, innermost.succeeded) == (True, False, True)
    assert {result.revision, inner.revision, innermost.revision} == {result.revision}
    assert inner.responses[2] == KeyValue(b"c", b"then", result.revision, result.revision)
    assert result.responses[2] == KeyValue(b"b", b"", result.revision, result.revision)


@pytest.mark.parametrize(
    "operations",
    [
        (Put(b"a", b""), Put(b"a", b"")),
        (Put(b"a", b""), Delete(b"a")),
        (Delete(b"a"), Delete(b"a")),
        (Delete(b"a"), Txn((created_at(b"b", 0),), (), (Put(b"a", b""),))),
        (Txn((), (Put(b"a", b""),)), Txn((), (Put(b"a", b""),))),
    ],
)
def test_duplicate_keys_are_refused(client: Client, operations: tuple[Put, ...]) -> None:
    answers: list[object] = []
    for refused in (Txn((), operations), Txn((), (), operations)):
        with pytest.raises(Bug, match="twice"):
            client.store.txn(refused, answers.append)
    assert read(client, b"a") is None
    assert answers == []


def test_every_call_is_answered_once_in_a_burst(client: Client) -> None:
    """Reads and writes mixed: each gets its answer, and only one."""
    answers: list[list[object]] = [[] for _ in range(50)]
    for number, sink in enumerate(answers):
        work = put((b"k%d" % number, b"")) if number % 2 else Txn((), (Range(b"k"),))
        client.store.txn(work, sink.append)
        assert sink == []
    client.driver.run_until(lambda: all(answers))
    flush(client.driver, client)
    assert [len(sink) for sink in answers] == [1] * 50
    results = [result for (result,) in answers]
    assert all(isinstance(result, TxnResult) for result in results)
    revisions = [r.revision for r in results[1::2] if isinstance(r, TxnResult)]
    assert len(set(revisions)) == 25
    assert max(revisions) - min(revisions) == 24


def test_a_transaction_sent_from_an_answer(client: Client) -> None:
    """The engine sends the next one from `done` of the last."""
    answers: list[object] = []
    inside: list[bool] = []

    def next_one(_result: object) -> None:
        client.store.txn(Txn((), (Get(b"a"),)), answers.append)
        inside.append(bool(answers))

    client.store.txn(put((b"a", b"1")), next_one)
    client.driver.run_until(lambda: bool(answers))
    assert inside == [False]


def test_watch_starts_in_the_past_and_goes_on(driver: Driver) -> None:
    """From the first revision asked for, with values and revisions as they were then."""
    writer, watcher = Client(driver, "writer"), Client(driver, "watcher")
    first = writer.txn(put((b"w/a", b"0"))).revision
    second = writer.txn(put((b"w/a", b"1"))).revision
    writer.txn(Txn((), (Delete(b"w/a"),)))
    seen = watch(watcher, b"w/", start=second)
    driver.run_until(lambda: len(seen) == 2)
    fourth = writer.txn(put((b"w/a", b"3"))).revision
    driver.run_until(lambda: len(seen) == 3)
    flush(driver, watcher)
    assert [b.revision for b in seen if isinstance(b, WatchBatch)] == [second, second + 1, fourth]
    events = [e for b in seen if isinstance(b, WatchBatch) for e in b.events]
    assert [(e.kind, e.kv) for e in events] == [
        ("put", KeyValue(b"w/a", b"1", first, second)),
        ("delete", KeyValue(b"w/a", b"", 0, second + 1)),
        ("put", KeyValue(b"w/a", b"3", fourth, fourth)),
    ]


def test_watch_from_a_future_revision(driver: Driver, request: pytest.FixtureRequest) -> None:
    if isinstance(driver, SqliteDriver):
        pass
    client = Client(driver)
    start = client.txn(put((b"w/a", b""))).revision
    seen = watch(client, b"w/", start=start + 3)
    flush(driver, client)  # start + 1
    for _ in range(3):
        client.txn(put((b"w/a", b"")))
    flush(driver, client)
    assert [b.revision for b in seen if isinstance(b, WatchBatch)] == [start + 3, start + 4]


def test_watch_tells_of_the_watched_prefixes_only(driver: Driver) -> None:
    client = Client(driver)
    start = client.txn(put((b"w/a", b""), (b"w", b""), (b"w0", b""), (b"v/a", b""))).revision
    client.txn(put((b"x/a", b"")))
    seen = watch(client, b"w/", b"v/", b"w/a", start=start)
    flush(driver, client)
    (batch,) = seen
    assert isinstance(batch, WatchBatch)
    assert batch.revision == start
    assert [event.kv.key for event in batch.events] == [b"w/a", b"v/a"]


def test_cancel_from_the_sink_stops_the_rest(driver: Driver) -> None:
    """Even what had been fetched together with the batch that made the sink cancel."""
    writer, watcher = Client(driver, "writer"), Client(driver, "watcher")
    start = writer.txn(put((b"w/a", b""))).revision
    for _ in range(5):
        writer.txn(put((b"w/a", b"")))
    seen: list[WatchBatch | WatchGap] = []

    def sink(batch: WatchBatch | WatchGap) -> None:
        seen.append(batch)
        if len(seen) == 2:
            held.cancel()

    held = watcher.store.watch([b"w/"], start, sink)
    driver.run_until(lambda: len(seen) == 2)
    writer.txn(put((b"w/a", b"")))
    flush(driver, watcher)
    assert len(seen) == 2


def test_cancelled_before_anything_came(driver: Driver) -> None:
    client = Client(driver)
    start = client.txn(put((b"w/a", b""))).revision
    seen: list[WatchBatch | WatchGap] = []
    client.store.watch([b"w/"], start, seen.append).cancel()
    client.txn(put((b"w/a", b"")))
    flush(driver, client)
    assert seen == []


def test_nothing_of_a_refused_put_is_applied(driver: Driver) -> None:
    """Neither what stood before it nor what was nested, and no revision is used up."""
    dead, other = Client(driver, "dead"), Client(driver, "other")
    dead.get(dead.session.close)
    start = other.txn(put((b"keep", b"1"))).revision
    seen = watch(other, b"a", b"b", b"keep", start=start + 1)
    late = Txn((), (Put(b"b", b"", dead.session.lease),))
    change = Txn((), (Put(b"a", b""), Delete(b"keep"), late))
    assert isinstance(other.fails(change), LockLost)
    assert other.txn(Txn((), (Get(b"keep"),))).revision == start
    assert read(other, b"a") is None
    assert read(other, b"b") is None
    assert read(other, b"keep") is not None
    flush(driver, other)
    assert seen == []
    spared = Txn((created_at(b"keep", 0),), (late,), (Put(b"a", b""),))
    assert other.txn(spared).revision == start + 2


def test_a_session_ends_with_one_revision(driver: Driver) -> None:
    """All keys at once, wherever they lie, and nobody else's."""
    dying, watcher = Client(driver, "dying"), Client(driver, "watcher")
    lease = dying.session.lease
    keys = [b"w/%d" % number for number in range(20)]
    for key in keys:
        start = dying.txn(put((key, b""), lease=lease)).revision
    watcher.txn(put((b"w/other", b""), lease=watcher.session.lease))
    seen = watch(watcher, b"w/", start=start + 2)
    assert dying.get(dying.session.close) is None
    driver.run_until(lambda: bool(seen))
    (batch,) = seen
    assert isinstance(batch, WatchBatch)
    assert batch.revision == start + 2
    assert [event.kv.key for event in batch.events] == sorted(keys)
    assert {event.kind for event in batch.events} == {"delete"}
    assert {event.kv.mod_revision for event in batch.events} == {start + 2}
    assert read(watcher, b"w/other") is not None
    assert dying.lost == []
    assert watcher.lost == []


def test_a_session_without_keys_uses_no_revision(driver: Driver) -> None:
    idle, other = Client(driver, "idle"), Client(driver, "other")
    start = other.txn(put((b"a", b""))).revision
    assert idle.get(idle.session.close) is None
    own_record = isinstance(driver, EtcdDriver)  # it proves the lease at each renewal
    assert other.txn(Txn((), (Get(b"a"),))).revision == start + own_record


def test_handles_see_each_others_commits_at_once(driver: Driver) -> None:
    """Linearizable: what one was told is done, the other reads, without waiting."""
    one, two = Client(driver, "one"), Client(driver, "two")
    for number in range(10):
        result = one.txn(put((b"a", b"%d" % number)))
        kv = read(two, b"a")
        assert kv is not None
        assert (kv.value, kv.mod_revision) == (b"%d" % number, result.revision)
        one, two = two, one


def test_leases_differ(driver: Driver) -> None:
    clients = [Client(driver, str(number)) for number in range(3)]
    assert len({client.session.lease for client in clients}) == 3
    assert all(client.session.lease > 0 for client in clients)


def test_how_long_a_session_would_last(driver: Driver) -> None:
    """Up to its lease time, nothing once it has ended; None where none can run out."""
    asker, other = Client(driver, "asker"), Client(driver, "other")

    def left() -> object:
        return asker.get(lambda done: asker.store.lease_left(other.session.lease, done))

    if other.session.renewed_at is None:
        assert left() is None
        return
    seconds = left()
    assert isinstance(seconds, float)
    assert 0 < seconds <= 15.0
    other.get(other.session.close)
    assert left() == 0.0


def test_a_range_in_pieces(client: Client) -> None:
    """Only so many, only those behind a key, also one that is not there, and no neighbours."""
    keys = [b"p/a", b"p/b", b"p/b\0", b"p/ba", b"p/c\xff", b"p/d"]
    client.txn(put(*((key, b"") for key in (b"o/z", *keys, b"q/a"))))
    pieces: list[bytes] = []
    behind = b""
    while True:
        (found,) = client.txn(Txn((), (Range(b"p/", behind, 2),))).responses
        assert isinstance(found, tuple)
        assert len(found) <= 2
        if not found:
            break
        pieces += [kv.key for kv in found if isinstance(kv, KeyValue)]
        behind = pieces[-1]
    assert pieces == keys
    (found,) = client.txn(Txn((), (Range(b"p/", b"p/c"),))).responses
    assert isinstance(found, tuple)
    assert [kv.key for kv in found if isinstance(kv, KeyValue)] == [b"p/c\xff", b"p/d"]


# -- readings ----------------------------------------------------------------------------------------


def test_a_transaction_that_only_reads(client: Client) -> None:
    """One key, several at once, behind a compare that holds or fails, and none at all: one revision,
    and nothing changes. (On etcd it must not go out as it is: see `codec.only_reads`.)"""
    at = client.txn(put((b"a", b"1"), (b"b", b"2"))).revision
    one = client.txn(Txn((), (Get(b"a"),)))
    assert (one.succeeded, one.revision) == (True, at)
    assert one.responses == (KeyValue(b"a", b"1", at, at, 0),)
    assert client.txn(Txn((), (Get(b"c"),))).responses == (None,)
    several = client.txn(Txn((), (Get(b"b"), Range(b"a"), Get(b"c"))))
    assert (several.succeeded, several.revision) == (True, at)
    a, b = KeyValue(b"a", b"1", at, at, 0), KeyValue(b"b", b"2", at, at, 0)
    assert several.responses == (b, (a,), None)
    held = client.txn(Txn((unchanged(b"a", at),), (Get(b"b"),), (Get(b"a"),)))
    assert (held.succeeded, held.responses) == (True, (b,))
    failed = client.txn(Txn((unchanged(b"a", at + 1),), (Get(b"b"),), (Get(b"a"),)))
    assert (failed.succeeded, failed.responses) == (False, (a,))
    nothing = client.txn(Txn((), ()))
    assert (nothing.succeeded, nothing.responses) == (True, ())
    assert client.txn(Txn((), (Get(b"a"),))).revision == at
