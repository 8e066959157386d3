"""A watch on the state file: a place in the log, and where to deliver what comes after it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from dlmfs.store import schema
from dlmfs.store.base import WatchBatch, WatchGap

if TYPE_CHECKING:
    from dlmfs.store.sqlite import SqliteStore

AGAIN_S: Final = 0.005
"""How long to wait for a peer that recovers the log."""


class SqliteWatch:
    """See above. Its store has it deliver, whenever there may be something."""

    def __init__(
        self,
        store: SqliteStore,
        prefixes: tuple[bytes, ...],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> None:
        self.store = store
        self.prefixes = prefixes
        self.next = from_revision
        self.sink = sink
        self.cancelled = False

    def deliver(self, conn: sqlite3.Connection) -> None:
        if self.cancelled:
            return
        try:
            revision, trimmed, batches = schema.events_since(conn, self.next, self.prefixes)
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:  # a peer recovers the log
                self.store.loop.call_later(AGAIN_S, self.store.pump_soon)
                return
            self.store.fence(f"the state file cannot be read any more: {error}")
            return
        if self.next <= trimmed:
            self.cancel()
            self.sink(WatchGap(trimmed + 1))
            return
        self.next = max(self.next, revision + 1)
        for batch in batches:
            if not self.cancelled:
                self.sink(batch)

    def begin_anew(self) -> None:
        """What comes next in the log cannot be told: have everything read from the tables."""
        if not self.cancelled:
            self.cancel()
            self.sink(WatchGap(self.next))

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self.store.drop_watch(self)
