"""The state file's tables, and transactions as SQL. No policy: see sqlite.py."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

from dlmfs.errors import BadState, LockLost
from dlmfs.store import statefile
from dlmfs.store.base import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Put,
    Range,
    Response,
    Txn,
    TxnResult,
    WatchBatch,
)

APPLICATION_ID: Final = 0x646C6D66  # "dlmf"
FORMAT: Final = 1
LOG_PAGES_MAX: Final = 2000
PAGE: Final = 4096
TICK_US: Final = 32
"""A new state's revision starts at wall-clock time in this unit: tokens must not restart when a
reboot has wiped a tmpfs. Coarse enough that a token (revision << 16) fits 63 bits until 2112,
fine enough that no store commits faster than 31,250 times a second for its whole life."""

REVISION_MAX: Final = 1 << 47

_TABLES: Final = """
CREATE TABLE meta (revision INTEGER NOT NULL, trimmed INTEGER NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE kv (key BLOB PRIMARY KEY, value BLOB NOT NULL, create_rev INTEGER NOT NULL,
                 mod_rev INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX kv_lease ON kv (lease) WHERE lease <> 0;
CREATE TABLE log (rev INTEGER NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, key BLOB NOT NULL,
                  value BLOB NOT NULL, create_rev INTEGER NOT NULL, lease INTEGER NOT NULL,
                  PRIMARY KEY (rev, seq)) WITHOUT ROWID;
CREATE TABLE session (lease INTEGER PRIMARY KEY, node TEXT NOT NULL, pid INTEGER NOT NULL,
                      started REAL NOT NULL);
CREATE TABLE watch (lease INTEGER NOT NULL, prefix BLOB NOT NULL, PRIMARY KEY (lease, prefix))
                   WITHOUT ROWID;
"""


KEY_MAX: Final = 1024
"""More than any key has: domain, lock and node names are short."""


class Row(NamedTuple):
    """A row of the log."""

    rev: int
    seq: int
    kind: str
    key: bytes
    value: bytes
    create_rev: int
    lease: int


Sessions = list[tuple[int, str, int]]
"""Lease, node and pid of every session on record."""
Start = Callable[[Sessions | None], int]
"""The least revision that a state may have which is opened, by its sessions; None: it is a new one."""


def clock(known: Sessions | None) -> int:
    """That of a new state by the clock alone."""
    return time.time_ns() // 1000 // TICK_US if known is None else 0


def connect(
    path: Path, *, volatile: bool, timeout_s: float, start: Start = clock
) -> sqlite3.Connection:
    """Open the state file, which exists, filling or checking it. No busy time-out remains afterwards.

    Raises BadState for another program's or version's file, which is left as it was, and
    sqlite3.Error for what SQLite finds wrong.
    """
    conn = sqlite3.connect(
        # To make it, with which mode, is not SQLite's to decide (`statefile.secure`).
        statefile.uri(path, "rw"),
        uri=True,
        timeout=timeout_s,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    try:
        _check(conn, path)
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=" + ("OFF" if volatile else "FULL"))
        conn.execute(f"PRAGMA wal_autocheckpoint={_log_pages(path)}")
        conn.execute("BEGIN IMMEDIATE")
        if conn.execute("PRAGMA application_id").fetchone()[0] == 0:
            _create(conn, start(None))
        elif (least := start(sessions(conn))) > revision_of(conn):
            conn.execute("UPDATE meta SET revision = ?", (least,))
        conn.execute("COMMIT")
        if conn.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise BadState(f"the state file {path} is damaged: move it away or name another")
        conn.execute("PRAGMA busy_timeout=0")
    except BaseException:
        conn.close()
        raise
    return conn


def _log_pages(path: Path) -> int:
    """After how many pages the log is written back: early where it would fill the file system."""
    facts = os.statvfs(path.parent)
    return max(16, min(LOG_PAGES_MAX, facts.f_bavail * facts.f_frsize // 4 // PAGE))


def size(conn: sqlite3.Connection) -> int:
    """Bytes of the state file in use."""
    pages, free, page_size = (
        conn.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_size)


def _check(conn: sqlite3.Connection, path: Path) -> None:
    application = conn.execute("PRAGMA application_id").fetchone()[0]
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    empty = conn.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application == version == 0 and empty:
        return
    if application != APPLICATION_ID:
        raise BadState(f"{path} is another program's database, not touched: name another file")
    if version != FORMAT:
        raise BadState(
            f"{path} has state format {version}, this program reads format {FORMAT}: run the "
            "same version of dlmfs on every mount, or name another file"
        )


def _create(conn: sqlite3.Connection, start: int) -> None:
    for statement in _TABLES.split(";"):
        if statement.strip():
            conn.execute(statement)
    if not 0 <= start < REVISION_MAX:
        raise BadState("the clock of this machine is decades wrong: set it, then mount again")
    conn.execute("INSERT INTO meta VALUES (?, ?, 0)", (start, start))
    conn.execute(f"PRAGMA application_id={APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version={FORMAT}")


# -- transactions ------------------------------------------------------------------------------------


def _after(prefix: bytes) -> bytes:
    """The smallest key above all that start with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    if not stem:
        return b"\xff" * KEY_MAX
    return stem[:-1] + bytes([stem[-1] + 1])


def _holds(conn: sqlite3.Connection, compare: Compare) -> bool:
    if compare.prefix:
        row = conn.execute(
            "SELECT min(mod_rev), max(mod_rev), min(create_rev), max(create_rev) FROM kv"
            " WHERE key >= ? AND key < ?",
            (compare.key, _after(compare.key)),
        ).fetchone()
        low, high = row[:2] if compare.field == "mod" else row[2:]
        low, high = low or 0, high or 0
    else:
        row = conn.execute(
            "SELECT create_rev, mod_rev FROM kv WHERE key = ?", (compare.key,)
        ).fetchone()
        low = high = 0 if row is None else row[compare.field == "mod"]
    if compare.op == "=":
        return bool(low == high == compare.value)
    return bool(high < compare.value)


class _Plan(NamedTuple):
    """A transaction whose compares are decided: what to do, at every depth."""

    succeeded: bool
    ops: tuple[object, ...]


def _decide(conn: sqlite3.Connection, txn: Txn) -> _Plan:
    succeeded = all(_holds(conn, compare) for compare in txn.compares)
    chosen = txn.then if succeeded else txn.otherwise
    return _Plan(
        succeeded, tuple(_decide(conn, op) if isinstance(op, Txn) else op for op in chosen)
    )


def evaluate(conn: sqlite3.Connection, *, txn: Txn) -> tuple[TxnResult, list[Row]]:
    """Run a transaction inside SQLite's. All compares are decided before anything is changed.

    Raises LockLost if it puts a key on a lease that has ended.
    """
    before = conn.execute("SELECT revision FROM meta").fetchone()[0]
    plan = _decide(conn, txn)
    events: list[Row] = []
    responses = _run(conn, plan, before + 1, events)
    if events:
        _commit(conn, events)
    return _stamp(plan, responses, before + bool(events)), events


def _commit(conn: sqlite3.Connection, events: list[Row]) -> None:
    conn.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?)", events)
    conn.execute("UPDATE meta SET revision = ?", (events[0].rev,))


def _run(conn: sqlite3.Connection, plan: _Plan, revision: int, events: list[Row]) -> list[object]:
    responses: list[object] = []
    for op in plan.ops:
        response: object = None
        if isinstance(op, Put):
            _put(conn, op, revision, events)
        elif isinstance(op, Delete):
            if conn.execute("DELETE FROM kv WHERE key = ?", (op.key,)).rowcount:
                events.append(Row(revision, len(events), "delete", op.key, b"", 0, 0))
        elif isinstance(op, Get):
            row = conn.execute("SELECT * FROM kv WHERE key = ?", (op.key,)).fetchone()
            response = KeyValue(*row) if row is not None else None
        elif isinstance(op, Range):
            rows = conn.execute(
                "SELECT * FROM kv WHERE key >= ? AND key < ? AND key > ? ORDER BY key LIMIT ?",
                (op.prefix, _after(op.prefix), op.behind, op.limit or -1),
            )
            response = tuple(KeyValue(*row) for row in rows)
        else:
            assert isinstance(op, _Plan)
            response = _run(conn, op, revision, events)
        responses.append(response)
    return responses


def _put(conn: sqlite3.Connection, put: Put, revision: int, events: list[Row]) -> None:
    if put.lease:
        known = conn.execute("SELECT 1 FROM session WHERE lease = ?", (put.lease,)).fetchone()
        if known is None:
            raise LockLost("the session has ended: another daemon found this one dead")
    created = conn.execute(
        "INSERT INTO kv VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
        " value = excluded.value, mod_rev = excluded.mod_rev, lease = excluded.lease"
        " RETURNING create_rev",
        (put.key, put.value, revision, revision, put.lease),
    ).fetchone()[0]
    events.append(Row(revision, len(events), "put", put.key, put.value, created, put.lease))


def _stamp(plan: _Plan, responses: list[object], revision: int) -> TxnResult:
    """The answer, with the revision at every depth."""
    out: list[Response] = []
    for op, response in zip(plan.ops, responses, strict=True):
        if isinstance(op, _Plan):
            assert isinstance(response, list)
            out.append(_stamp(op, response, revision))
        else:
            assert response is None or isinstance(response, tuple)
            out.append(response)
    return TxnResult(plan.succeeded, revision, tuple(out))


# -- sessions, watches, the log ------------------------------------------------------------------------


def revision_of(conn: sqlite3.Connection) -> int:
    return int(conn.execute("SELECT revision FROM meta").fetchone()[0])


def generation(conn: sqlite3.Connection) -> int:
    """Grows whenever a session or a watch comes or goes."""
    row = conn.execute("SELECT generation FROM meta").fetchone()
    assert isinstance(row[0], int)
    return row[0]


def prefixes(conn: sqlite3.Connection) -> dict[int, tuple[bytes, ...]]:
    """Who watches what."""
    rows = conn.execute("SELECT lease, prefix FROM watch ORDER BY lease").fetchall()
    return {lease: tuple(p for _, p in group) for lease, group in groupby(rows, lambda r: r[0])}


def register(
    conn: sqlite3.Connection, *, lease: int, prefixes: list[bytes]
) -> tuple[None, list[Row]]:
    conn.execute("DELETE FROM watch WHERE lease = ?", (lease,))
    conn.executemany("INSERT INTO watch VALUES (?, ?)", [(lease, p) for p in prefixes])
    conn.execute("UPDATE meta SET generation = generation + 1")
    return None, []


def add_session(
    conn: sqlite3.Connection, *, row: tuple[int, str, int, float]
) -> tuple[None, list[Row]]:
    conn.execute("INSERT INTO session VALUES (?, ?, ?, ?)", row)
    return None, []


def sessions(conn: sqlite3.Connection) -> Sessions:
    return conn.execute("SELECT lease, node, pid FROM session ORDER BY started").fetchall()


def end_session(conn: sqlite3.Connection, *, lease: int) -> tuple[bool, list[Row]]:
    """Remove the session, its watches and all keys of its lease. False if it had ended before."""
    if not conn.execute("DELETE FROM session WHERE lease = ?", (lease,)).rowcount:
        return False, []
    conn.execute("DELETE FROM watch WHERE lease = ?", (lease,))
    revision = conn.execute("SELECT revision FROM meta").fetchone()[0] + 1
    keys = conn.execute("SELECT key FROM kv WHERE lease = ? ORDER BY key", (lease,)).fetchall()
    conn.execute("DELETE FROM kv WHERE lease = ?", (lease,))
    events = [Row(revision, i, "delete", key, b"", 0, 0) for i, (key,) in enumerate(keys)]
    if events:
        _commit(conn, events)
    conn.execute("UPDATE meta SET generation = generation + 1")
    return True, events


def events_since(
    conn: sqlite3.Connection, first: int, prefixes: tuple[bytes, ...]
) -> tuple[int, int, list[WatchBatch]]:
    """The store's revision, up to where the log is trimmed, and the batches from `first` on."""
    conn.execute("BEGIN")
    try:
        revision, trimmed = conn.execute("SELECT revision, trimmed FROM meta").fetchone()
        ranges = " OR ".join("(key >= ? AND key < ?)" for _ in prefixes)
        bounds = [bound for p in prefixes for bound in (p, _after(p))]
        rows = conn.execute(
            f"SELECT * FROM log WHERE rev >= ? AND ({ranges}) ORDER BY rev, seq",  # noqa: S608
            (first, *bounds),
        ).fetchall()
    finally:
        conn.execute("COMMIT")
    batches = []
    for rev, group in groupby((Row(*row) for row in rows), lambda row: row.rev):
        events = tuple(
            Event(
                "put" if row.kind == "put" else "delete",
                KeyValue(row.key, row.value, row.create_rev, rev, row.lease),
            )
            for row in group
        )
        batches.append(WatchBatch(rev, events))
    return revision, trimmed, batches


def data_version(conn: sqlite3.Connection) -> int:
    """Is another number after another connection has changed the file."""
    return int(conn.execute("PRAGMA data_version").fetchone()[0])


def changes_since(conn: sqlite3.Connection, first: int) -> tuple[int, int, list[tuple[int, bytes]]]:
    """The store's revision, up to where the log is trimmed, and the revisions from `first` on with their
    keys."""
    conn.execute("BEGIN")
    try:
        revision, trimmed = conn.execute("SELECT revision, trimmed FROM meta").fetchone()
        rows = conn.execute("SELECT rev, key FROM log WHERE rev >= ?", (first,)).fetchall()
    finally:
        conn.execute("COMMIT")
    return revision, trimmed, rows


def trim(conn: sqlite3.Connection, keep: int) -> None:
    """Forget all of the log but the last `keep` revisions."""
    revision, trimmed = conn.execute("SELECT revision, trimmed FROM meta").fetchone()
    if revision - keep > trimmed:
        conn.execute("DELETE FROM log WHERE rev <= ?", (revision - keep,))
        conn.execute("UPDATE meta SET trimmed = ?", (revision - keep,))
