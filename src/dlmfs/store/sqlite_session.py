"""A daemon's session in the state file: its own life, and its eye on the others'.

The row says that it exists, the POSIX lock on its file that it lives (`bells`). Whoever finds a row
without a life ends that session, in one commit.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dlmfs.errors import DlmfsError
from dlmfs.store import bells

if TYPE_CHECKING:
    import asyncio

    from dlmfs.store.sqlite import SqliteStore

RECHECKS_S: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256)
"""When to look again after a peer hung up: the kernel may close its sockets before its locks."""
SWEEP_S: Final = 1.0


class SqliteSession:
    """A daemon's life on this host: its lock file, its bell, and its eye on the others."""

    renewed_at: float | None = None
    ttl_s = 0.0

    def __init__(self, store: SqliteStore, lease: int) -> None:
        self.store = store
        self.lease = lease
        self.folder = Path(f"{store.path}.d")
        self._life: bells.Life | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rechecks: list[asyncio.TimerHandle] = []
        self.ended = False
        self.bells: bells.Bells

    def begin(self) -> None:
        """Take the lock and listen before the row says that we exist. Raises OSError."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._life = bells.Life(self._lock_file(self.lease))
        self.bells = bells.Bells(
            self.store.loop,
            self.folder,
            rung=self.store.pump_soon,
            joined=self._joined,
            hung_up=self._hung_up,
        )
        self.bells.listen(self.lease)

    def _lock_file(self, lease: int) -> Path:
        return self.folder / f"{lease:x}.lock"

    def sweep(self) -> None:
        """Look at everybody now, and again every second."""
        if self.ended:
            return
        self.look()
        self._timer = self.store.loop.call_later(SWEEP_S, self.sweep)

    def look(self) -> None:
        """Bury the dead, connect to the new."""
        if self.ended or not self.store.still_ours():
            return
        try:
            sessions = self.store.sessions()
        except sqlite3.OperationalError:
            return  # a peer recovers the log just now; the sweep looks again
        for lease, _, pid in sessions:
            if lease == self.lease:
                continue
            if bells.alive(self._lock_file(lease), pid):
                self.bells.connect(lease)
            else:
                self.store.end_session(lease, partial(self._buried, lease))

    def _joined(self) -> None:
        """A peer connected, perhaps to ring: a bell is only kept by a connection."""
        self.look()
        self.store.pump_soon()

    def _buried(self, lease: int, _error: DlmfsError | None) -> None:
        if self.ended:
            return
        self.bells.forget(lease)
        for suffix in ("lock", "sock"):
            with contextlib.suppress(OSError):
                (self.folder / f"{lease:x}.{suffix}").unlink()

    def _hung_up(self) -> None:
        if self.ended:
            return
        for timer in self._rechecks:
            timer.cancel()
        self.look()
        self._rechecks = [self.store.loop.call_later(d, self.look) for d in RECHECKS_S]

    def abandon(self) -> None:
        """Stop, and let the others find out."""
        if self.ended:
            return
        self.ended = True
        for timer in (self._timer, *self._rechecks):
            if timer is not None:
                timer.cancel()
        if hasattr(self, "bells"):
            self.bells.close(self.lease)
        if self._life is not None:
            self._life.end()

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        def ended(error: DlmfsError | None) -> None:
            self.abandon()
            done(error)

        self.store.ends()
        self.store.end_session(self.lease, ended)
