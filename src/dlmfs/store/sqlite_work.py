"""Work on the state file, of which the event loop never waits for any.

On a tmpfs a piece of work runs in the loop, at once, with no busy time-out; if another daemon is inside
a write (and perhaps stopped there) it goes to the worker thread. On a disk, where a commit waits for the
medium, everything goes to the worker. It is tried until the file is not busy; what comes meanwhile waits
behind it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dlmfs.errors import (
    BadState,
    Bug,
    DlmfsError,
    LockLost,
    NotPermitted,
    OutcomeUnknown,
    StoreFull,
    Unavailable,
)
from dlmfs.store import schema
from dlmfs.store.base import Txn, TxnResult

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("dlmfs.store")

T = TypeVar("T")

OPEN_TIMEOUT_S: Final = 5.0


class Worker:
    """The connections to one state file, which exists, and the thread.

    `fast` is the event loop's connection; `pending` how much waits for the thread. Raises BadState,
    NotPermitted, StoreFull or Unavailable.
    """

    def __init__(
        self, path: Path, loop: asyncio.AbstractEventLoop, *, volatile: bool, start: schema.Start
    ) -> None:
        self.path = path
        self.loop = loop
        self.volatile = volatile
        self.fast = _connect(path, volatile=volatile, start=start)
        self.pending = 0
        self._thread: ThreadPoolExecutor | None = None
        self._slow: sqlite3.Connection | None = None
        self._closing = False

    def submit(
        self,
        work: Callable[[sqlite3.Connection], T | None],
        done: Callable[[T | DlmfsError], None],
    ) -> None:
        """Run `work` now, or in the thread if it would have to wait. None means "busy"."""
        if self.volatile and not self.pending:
            outcome = _guarded(work, self.fast)
            if outcome is not None:
                self.loop.call_soon(done, outcome)
                return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "dlmfs-sqlite")
        self.pending += 1
        self._thread.submit(self._work_slowly, work, done)

    def _work_slowly(self, work: Any, done: Any) -> None:
        """In the worker thread: the same work, as often as it takes."""
        wait = 0.001
        outcome = None
        while outcome is None and not self._closing:
            outcome = _guarded(partial(self._on_slow, work), self.fast)
            if outcome is None:
                time.sleep(wait)
                wait = min(wait * 2, 0.05)
        if self._closing:
            return
        with contextlib.suppress(RuntimeError):  # the loop closed in between
            self.loop.call_soon_threadsafe(self._slowly_done, done, outcome)

    def _on_slow(self, work: Any, _fast: sqlite3.Connection) -> Any:
        """The work on the worker's own connection; to open that one may have to wait as well."""
        if self._slow is None:
            self._slow = schema.connect(self.path, volatile=self.volatile, timeout_s=0.1)
        return work(self._slow)

    def _slowly_done(self, done: Any, outcome: Any) -> None:
        self.pending -= 1
        if not self._closing:
            done(outcome)

    def stop(self) -> None:
        """Begin nothing more, and tell nobody what comes of the rest."""
        self._closing = True

    def close(self) -> None:
        """Wait for what is under way, and close the file."""
        self._closing = True
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._slow is not None:
            self._slow.close()
        self.fast.close()


def _connect(path: Path, *, volatile: bool, start: schema.Start) -> sqlite3.Connection:
    try:
        made = schema.connect(path, volatile=volatile, timeout_s=OPEN_TIMEOUT_S, start=start)
        if os.access(path, os.W_OK):
            return made
        made.close()
        raise NotPermitted(
            f"cannot open the state file {path} for writing: it is read-only; name another"
        )
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            raise Unavailable(
                f"the state file {path} is held by another daemon (is one stopped?): "
                "continue or end that process"
            ) from None
        if code == sqlite3.SQLITE_FULL or not os.statvfs(path.parent).f_bavail:
            raise StoreFull(f"no space left for the state file {path}") from None
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise NotPermitted(
                f"cannot open the state file {path} for writing ({error}): see who owns it, "
                "or name another"
            ) from None
        raise BadState(f"the state file {path} cannot be used: {error}") from None
    except sqlite3.DatabaseError as error:
        raise BadState(
            f"{path} is not a sound state file of dlmfs ({error}): move it away or name another"
        ) from None


def _guarded(work: Callable[[sqlite3.Connection], T | None], conn: sqlite3.Connection) -> Any:
    """The work's result, or the DlmfsError it means, or None if the file is busy."""
    try:
        return work(conn)
    except (DlmfsError, Bug) as error:
        return error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return None
        if code == sqlite3.SQLITE_FULL:
            return StoreFull("no space left for the state file")
        if code == sqlite3.SQLITE_READONLY:
            return Unavailable("the state file cannot be written any more: it is read-only")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return LockLost(f"the state file is damaged: {error}")
        return OutcomeUnknown(f"the state file failed: {error}")
    except Exception as error:  # rolled back; who asked must hear of it, or would wait for ever
        log.exception("a fault in a transaction")
        return Bug(f"a fault of this daemon: {type(error).__name__}")


def writing(
    conn: sqlite3.Connection, *, work: Callable[[sqlite3.Connection], tuple[T, list[schema.Row]]]
) -> tuple[T, list[schema.Row], int]:
    """`work` in a write transaction: its result, its events, and with any the generation."""
    try:
        return _write_once(conn, work)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:
            raise
    # What is committed may fill the log many times over; written back, there may be room.
    with contextlib.suppress(sqlite3.OperationalError):
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return _write_once(conn, work)


def _write_once(
    conn: sqlite3.Connection, work: Callable[[sqlite3.Connection], tuple[T, list[schema.Row]]]
) -> tuple[T, list[schema.Row], int]:
    conn.execute("BEGIN IMMEDIATE")
    try:
        result, events = work(conn)
        generation = schema.generation(conn) if events else 0
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise
    return result, events, generation


def reading(conn: sqlite3.Connection, *, txn: Txn) -> TxnResult:
    """A transaction that changes nothing."""
    conn.execute("BEGIN")
    try:
        result, events = schema.evaluate(conn, txn=txn)
        assert not events
    finally:
        conn.execute("COMMIT")
    return result
