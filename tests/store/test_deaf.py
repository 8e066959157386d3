"""A watch that the store could not register at once: nobody rings its node until it is in.

The registration is a transaction like any other and may be refused, by a full medium for one. It was
not tried again: the node's wishes were granted in the store and the node was never told, so that its
opens waited for ever (promise 5).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs.store import schema
from dlmfs.store.base import Get, Put, Txn, WatchBatch, WatchGap
from tests.store.drivers import Client, DurableDriver, SqliteDriver, VolatileDriver

ATTEMPTS = 4
"""More than one registration makes: it was begun anew."""


@pytest.fixture(params=[VolatileDriver, DurableDriver], ids=["volatile", "durable"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqliteDriver]:
    made: SqliteDriver = request.param(tmp_path)
    yield made
    made.close()


class Medium:
    """Stands in for `schema.register`, and has no space for it as long as it is full."""

    def __init__(self) -> None:
        self.full = True
        self.refused = 0
        self._register = schema.register

    def register(
        self, conn: sqlite3.Connection, *, lease: int, prefixes: list[bytes]
    ) -> tuple[None, list[schema.Row]]:
        if not self.full:
            return self._register(conn, lease=lease, prefixes=prefixes)
        self.refused += 1
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error


def test_a_watch_whose_registration_was_refused_is_told_in_the_end(
    driver: SqliteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The medium is full while the watch is registered, and has room again before anything happens
    that the watch should tell.
    """
    watching, peer = Client(driver, "watching"), Client(driver, "peer")
    now = watching.txn(Txn((), (Get(b"w/lock"),))).revision
    medium = Medium()
    monkeypatch.setattr(schema, "register", medium.register)
    seen: list[WatchBatch | WatchGap] = []
    watching.store.watch((b"w/",), now + 1, seen.append)
    driver.run_until(lambda: medium.refused > ATTEMPTS)
    medium.full = False
    peer.txn(Txn((), (Put(b"w/lock", b"a wish"),)))
    driver.run_until(lambda: bool(seen))
    (batch,) = seen
    assert isinstance(batch, WatchBatch)
    assert [event.kv.key for event in batch.events] == [b"w/lock"]
    assert not watching.lost
