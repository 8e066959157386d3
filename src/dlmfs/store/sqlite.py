"""The embedded engine's store: one SQLite file in WAL mode, shared by the daemons of one host.

Rules of this file
------------------
* The event loop never waits (`sqlite_work`).
* Before each transaction the path must still be the file that was opened: deleted or replaced
  under us, we are fenced (design, section 3, "sqlite").
* Nobody here opens the database file by hand: closing it would drop SQLite's own locks
  (protocol-traps 17).
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from dlmfs import fstype, home, proc
from dlmfs.errors import (
    BadState,
    DlmfsError,
    LockLost,
    NotPermitted,
    OutcomeUnknown,
    StoreFull,
    Unavailable,
)
from dlmfs.store import schema, statefile
from dlmfs.store.base import BOUNDS, Session, Txn, TxnDone, WatchBatch, WatchGap, Witness
from dlmfs.store.check import check, writes
from dlmfs.store.highwater import HighWater
from dlmfs.store.lives import Lives, holder, may_live
from dlmfs.store.sqlite_session import SqliteSession
from dlmfs.store.sqlite_watch import AGAIN_S, SqliteWatch
from dlmfs.store.sqlite_work import Worker, reading, writing

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

OPEN_TIMEOUT_S: Final = 5.0
REGISTER_AGAIN_S: Final = 0.2
FAILING_MAX_S: Final = 2.0
MARK_AGAIN_S: Final = 5.0
SIZE_VALID_S: Final = 1.0
TRIM_EVERY: Final = 1000
KEEP_REVISIONS: Final = 10_000
WAL_WRITE_LOCK: Final = 120
"""The byte of the -shm file that a writer locks (SQLite's WAL-index format)."""


class SqliteStore:
    """One daemon's handle on the state file; opens or creates it.

    `loop` is asyncio's. Raises BadState, UsageError, NotPermitted, StoreFull or Unavailable.
    """

    bounds = BOUNDS

    def __init__(
        self,
        path: Path,
        loop: asyncio.AbstractEventLoop,
        *,
        default: bool = False,
        highwater: HighWater | None = None,
    ) -> None:
        self.loop = loop
        place = statefile.prepare(path, default=default)
        self.path, self.kind, self.folder = place
        self.highwater = highwater or HighWater(None)
        self._mark_at = 0.0
        self.volatile = self.kind in fstype.VOLATILE or home.is_of_this_boot(self.path.parent)
        """It need not outlive a power failure: commits do not wait for the medium."""
        self.dead: str | None = None
        self._lost: Callable[[DlmfsError], None] | None = None
        self.renewed: Callable[[Session], None] = lambda _session: None
        """Called when a session begins: none needs to be renewed."""
        self.session: SqliteSession | None = None
        try:
            self.highwater.read()
            statefile.secure(place)
            self._worker = Worker(self.path, loop, volatile=self.volatile, start=self._start)
            self.highwater.keep_above(schema.revision_of(self._worker.fast))
        except BaseException:
            os.close(self.folder)
            raise
        self._identity = self._look(self.path)
        self._beside = {p: self._look(p) for p in (f"{self.path}-wal", f"{self.path}-shm")}
        self._watches: list[SqliteWatch] = []
        self._version = -1
        self._revision = 0
        self._swept = 0
        """The first revision that the sweep has not looked at."""
        self._pumping = False
        self._generation = -1
        self._peer_prefixes: dict[int, tuple[bytes, ...]] = {}
        self._commits = 0
        self._size_mb = 0.0
        self._failing_since: float | None = None
        self._size_until = 0.0
        self._shm: int | None = None

    # -- transactions ---------------------------------------------------------------------------

    def txn(self, txn: Txn, done: TxnDone) -> None:
        check(txn, self.bounds)
        if writes(txn):
            self._write(partial(schema.evaluate, txn=txn), done)
        else:
            self._submit(partial(reading, txn=txn), done)

    def _write(
        self,
        work: Callable[[sqlite3.Connection], tuple[T, list[schema.Row]]],
        done: Callable[[T | DlmfsError], None],
    ) -> None:
        """Run `work` in a write transaction, then ring for the events it made."""

        def finished(outcome: tuple[T, list[schema.Row], int] | DlmfsError) -> None:
            self._judge(outcome)
            if isinstance(outcome, DlmfsError):
                done(outcome)
                return
            result, events, generation = outcome
            if events:
                try:
                    self._announce(events, generation)
                except Exception as error:  # the sweep tells the others; who asked must hear
                    self._report("ringing", error)
            done(result)

        self._submit(partial(writing, work=work), finished)

    def _report(self, where: str, error: Exception) -> None:
        """Have an exception named that nobody expected."""
        context = {"message": f"{where} of the embedded store", "exception": error}
        self.loop.call_exception_handler(context)

    def _judge(self, outcome: object) -> None:
        """A medium that fails and goes on failing will not come back by itself."""
        if not isinstance(outcome, OutcomeUnknown):
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = self.loop.time()
        elif self.loop.time() - self._failing_since > FAILING_MAX_S:
            self.fence(f"{self.path}: {outcome}")

    def _submit(
        self,
        work: Callable[[sqlite3.Connection], T | None],
        done: Callable[[T | DlmfsError], None],
    ) -> None:
        """Run `work` now, or as soon as it can be, unless the state is gone."""
        if not self.still_ours():
            self.loop.call_soon(done, LockLost(self.dead))
            return
        self._worker.submit(work, done)

    @staticmethod
    def _look(path: Path | str) -> tuple[int, int] | None:
        try:
            info = os.stat(path)
        except OSError:
            return None
        return info.st_dev, info.st_ino

    def intact(self) -> bool:
        """Whether the path still leads to the state file; if not, we are fenced (design, section 3,
        "sqlite": checked in every operation)."""
        if self.dead is not None:
            return False
        if self._look(self.path) != self._identity:
            self.fence(f"the state file {self.path} was deleted or replaced while in use")
        return self.dead is None

    def still_ours(self) -> bool:
        """The same of what SQLite keeps beside it: another daemon would make these anew, and
        from then on each would see its own."""
        if not self.intact():
            return False
        for path, identity in self._beside.items():
            if self._look(path) != identity:
                self.fence(f"{path} was deleted or replaced while in use")
        return self.dead is None

    def fence(self, reason: str) -> None:
        """The state is gone: tell the session's owner, once."""
        self.dead = reason
        if self._lost is not None:
            self.loop.call_soon(self._lost, BadState(reason))
            self._lost = None

    # -- events ---------------------------------------------------------------------------------

    def _announce(self, events: list[schema.Row], generation: int) -> None:
        """Tell who watches any of these keys; uncontended traffic wakes nobody."""
        keys = [event.key for event in events]
        if generation != self._generation:
            try:
                self._peer_prefixes = schema.prefixes(self._worker.fast)
            except sqlite3.OperationalError:  # a peer recovers the log just now
                self.loop.call_later(AGAIN_S, self._announce, events, generation)
                return
            self._generation = generation
        mine = self.session.lease if self.session is not None else 0
        for lease, prefixes in self._peer_prefixes.items():
            if lease != mine and any(key.startswith(prefixes) for key in keys):
                assert self.session is not None
                self.session.ring(lease)
        if any(key.startswith(w.prefixes) for w in self._watches for key in keys):
            self.pump_soon()
        self._commits += 1
        if self._commits % TRIM_EVERY == 0:
            self._trim()

    def _trim(self) -> None:
        """Keep the log short."""
        self._submit(partial(writing, work=_trim), lambda _outcome: None)

    def sweep(self) -> None:
        """Once a second: deliver what no bell has told of. Costs next to nothing while nobody commits."""
        try:
            version = schema.data_version(self._worker.fast)
            if version != self._version and self._is_behind():
                self.pump_soon()
            self._version = version
            self._went_on(schema.revision_of(self._worker.fast))
        except sqlite3.Error:
            return  # a peer recovers the log just now, or it is damaged: the next transaction says so

    def _went_on(self, revision: int) -> None:
        """The revision now. One below that of a moment ago is that of a copy put in this one's place, by
        `sqlite3 .restore` and its like, which keep the file: what was granted since is forgotten."""
        if revision < self._revision:
            self.fence(
                f"the state file {self.path} went back from revision {self._revision} to {revision}: it "
                "was restored while in use; remount its nodes"
            )
            return
        self._revision = revision
        self._keep_mark(revision)

    def _start(self, known: schema.Sessions | None) -> int:
        """The revision from which a state goes on that was lost, or is one of before (from a backup)."""
        mark = self.highwater.value
        if known is None:
            return max(schema.clock(None), mark)
        return 0 if self._anybody_lives(known) else mark

    def _anybody_lives(self, known: schema.Sessions) -> bool:
        try:
            lives = Lives.look(self.path)
        except OSError:
            return any(may_live(pid) for _, _, pid in known)
        with contextlib.closing(lives):
            return any(lives.alive(lease, pid) for lease, _, pid in known)

    def _keep_mark(self, revision: int) -> None:
        """Raise the high-water mark in time, in a thread: it waits for a disk."""
        if self.loop.time() < self._mark_at or not self.highwater.is_due(revision):
            return
        self._mark_at = self.loop.time() + MARK_AGAIN_S
        self.loop.run_in_executor(None, self.highwater.keep_above, revision)

    def _is_behind(self) -> bool:
        """Whether a watch was not told what it should have been; if none, all are at the log's end."""
        revision, trimmed, changes = schema.changes_since(self._worker.fast, self._swept)
        if trimmed >= self._swept:
            self._swept = revision + 1
            return True
        self._swept = revision + 1
        told: dict[bytes, int] = {}
        for watch in self._watches:
            for prefix in watch.prefixes:
                told[prefix] = min(watch.next, told.get(prefix, watch.next))
        lengths = {len(prefix) for prefix in told}
        for rev, key in changes:
            if any(told.get(key[:length], rev + 1) <= rev for length in lengths):
                return True
        for watch in self._watches:
            watch.next = max(watch.next, revision + 1)
        return False

    def pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Deliver the log to the watches, from where each stands."""
        self._pumping = False
        for watch in list(self._watches):
            try:
                watch.deliver(self._worker.fast)
            except Exception as error:  # the others are told all the same
                self._report("a watch", error)
                watch.begin_anew()

    def watch(
        self,
        prefixes: Sequence[bytes],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> SqliteWatch:
        watch = SqliteWatch(self, tuple(prefixes), from_revision, sink)
        self._watches.append(watch)
        self._register()
        return watch

    def _register(self) -> None:
        """Let the others know which prefixes we watch, then catch up with what came meanwhile."""
        assert self.session is not None, "a watch needs a session"
        lease = self.session.lease
        wanted = sorted({p for w in self._watches for p in w.prefixes})
        work = partial(schema.register, lease=lease, prefixes=wanted)

        def registered(result: object) -> None:
            if isinstance(result, Unavailable) and self.session is not None:
                # Until it is in, nobody rings us: we would be deaf.
                self.loop.call_later(REGISTER_AGAIN_S, self._register_again)
            self.pump_soon()

        self._write(work, registered)

    def _register_again(self) -> None:
        if self.session is not None and self.dead is None:
            self._register()

    def drop_watch(self, watch: SqliteWatch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)
            if self.session is not None and self.dead is None:
                self._register()

    # -- sessions -------------------------------------------------------------------------------

    def open_session(
        self,
        node: str,
        ttl_s: float,  # noqa: ARG002 - there is no lease to run out on one host
        lost: Callable[[DlmfsError], None],
        done: Callable[[Session | DlmfsError], None],
        witness: Witness | None = None,  # noqa: ARG002 - there is no connection to be lost
    ) -> None:
        if self.session is not None:
            assert self.session.ended
            self.session.release(over=False)
        self._lost = lost
        session = SqliteSession(self, random.getrandbits(48) | 1)
        self.session = session
        row = (session.lease, node, os.getpid(), time.time())

        def opened(result: DlmfsError | None) -> None:
            if result is not None:
                self.session = None
                session.release(over=not isinstance(result, OutcomeUnknown))
                done(result)
                return
            session.sweep()
            self._trim()
            self.renewed(session)
            done(session)

        try:
            session.begin()
        except (OSError, BadState) as error:
            self.session = None
            refused = _of_os(error, f"cannot set up {self.path}.d")
            self.loop.call_soon(done, refused)
            return
        self._write(partial(schema.add_session, row=row), opened)

    def end_session(self, lease: int, done: Callable[[DlmfsError | None], None]) -> None:
        """All keys of a lease vanish in one revision; nothing if that happened already."""

        def ended(result: bool | DlmfsError) -> None:
            error = result if isinstance(result, DlmfsError) else None
            if self.session is not None and lease == self.session.lease:
                self.session.release(over=error is None)
            done(error)

        self._write(partial(schema.end_session, lease=lease), ended)

    def kill_stopped(self, lease: int) -> bool:
        return self.session is not None and self.session.kill_stopped(lease)

    def lease_left(
        self,
        lease: int,  # noqa: ARG002 - a session here ends with its process, not with time
        done: Callable[[float | DlmfsError | None], None],
    ) -> None:
        self.loop.call_soon(done, None)

    def sessions(self) -> list[tuple[int, str, int]]:
        """Lease, node and pid of every session on record."""
        return schema.sessions(self._worker.fast)

    def describe(self) -> dict[str, object]:
        facts: dict[str, object] = {
            "engine": "embedded",
            "path": str(self.path),
            "filesystem": self.kind,
            "durable": not self.volatile,
        }
        if self.highwater.trouble is not None:
            facts["tokens"] = (
                "they may go back if this state is lost while the clock is behind: "
                f"{self.highwater.trouble}"
            )
        if self.dead is not None:
            return facts | {"lost": self.dead}
        try:
            rows = self.sessions()
        except sqlite3.Error as error:
            return facts | {"error": str(error)}
        mine = self.session.lease if self.session is not None else 0
        facts["sessions"] = [
            {"node": node, "pid": pid, "own": lease == mine, "stopped": proc.is_stopped(pid)}
            for lease, node, pid in rows
        ]
        if self._worker.pending:
            facts["waiting_for_pid"] = self._writer()
        return facts

    def size_mb(self) -> float:
        now = self.loop.time()
        if now >= self._size_until and self.dead is None:
            with contextlib.suppress(sqlite3.Error):
                self._size_mb = schema.size(self._worker.fast) / 1e6
            self._size_until = now + SIZE_VALID_S
        return self._size_mb

    def _writer(self) -> int:
        """Who holds the write lock that we wait for."""
        if self._shm is None:
            # Never closed: closing it by hand would drop SQLite's locks on it.
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            self._shm = os.open(f"{self.path.name}-shm", flags, dir_fd=self.folder)
        return holder(self._shm, WAL_WRITE_LOCK)

    def ends(self) -> None:
        """Our session is being ended by ourselves: that is no loss."""
        self._lost = None

    def close(self) -> None:
        self._worker.stop()
        self._lost = None
        for watch in self._watches:
            watch.cancelled = True
        self._watches.clear()
        if self.session is not None:
            self.session.release(over=False)
            self.session = None
        self._worker.close()
        folder, self.folder = self.folder, -1
        if folder >= 0:
            os.close(folder)


def _trim(conn: sqlite3.Connection) -> tuple[None, list[schema.Row]]:
    schema.trim(conn, KEEP_REVISIONS)
    return None, []


def _of_os(error: OSError | BadState, what: str) -> DlmfsError:
    if isinstance(error, BadState):
        return error
    if error.errno == errno.ENOSPC:
        return StoreFull(f"{what}: no space left")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(f"{what}: permission denied (it belongs to another user?)")
    return BadState(f"{what}: {error.strerror}")
