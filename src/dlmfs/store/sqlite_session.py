"""A daemon's session in the state file: its own life, and its eye on the others'.

The row says that it exists, the POSIX lock on its file that it lives (`lives`). Whoever finds a row
without a life ends that session, in one commit.

Rules of this file
------------------
* A session is given up (`abandon`) before it is over: the daemon may have reasons to keep what it has
  from the others for a while. It lives, and has its bell, until the commit that ends it is announced.
* If that commit fails, the lock is let go and the file stays: to the others it is a death, which they
  end.
* A bell may be missed: it needs descriptors, sockets and the folder. So once a second each daemon looks
  at the sessions and at the log by itself.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.errors import BadState, DlmfsError
from dlmfs.store.bells import Bells
from dlmfs.store.lives import Life, Lives

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
    born = 0
    seen = 0

    def __init__(self, store: SqliteStore, lease: int) -> None:
        self.store = store
        self.lease = lease
        self.ended = False
        self._place: _Place | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rechecks: list[asyncio.TimerHandle] = []

    def begin(self) -> None:
        """Take the lock and listen before the row says that we exist. Raises OSError, BadState."""
        self._place = _Place(self)

    def kill_stopped(self, lease: int) -> bool:
        """As `store.base.Store.kill_stopped`."""
        return self._place is not None and self._place.lives.kill_stopped(lease)

    def ring(self, lease: int) -> None:
        """Have a peer look at the log. Once this session is over, it finds out by itself."""
        if self._place is not None:
            self._place.bells.ring(lease)

    def sweep(self) -> None:
        """Look at everybody and everything now, and again every second."""
        if self.ended:
            return
        self._timer = self.store.loop.call_later(SWEEP_S, self.sweep)
        try:
            self._stay_findable()
            self.look()
        finally:  # whatever is wrong with the others, we are told what they do
            self.store.sweep()

    def _stay_findable(self) -> None:
        """If the folder was deleted, newcomers have made another: be there."""
        if self._place is None or self._place.lives.is_in_place() or not self.store.still_ours():
            return
        with contextlib.suppress(OSError, BadState):  # then the others hear from us once a second
            new = _Place(self)
            self._place.leave(remove=False)
            self._place = new

    def look(self) -> None:
        """Bury the dead, connect to the new."""
        if self.ended or self._place is None or not self.store.still_ours():
            return
        try:
            sessions = self.store.sessions()
        except sqlite3.Error:
            return  # a peer recovers the log just now, or it is damaged: the next transaction says so
        for lease, _, pid in sessions:
            if lease == self.lease:
                continue
            if self._place.lives.alive(lease, pid):
                self._place.bells.connect(lease)
            else:
                self.store.end_session(lease, partial(self._buried, lease))

    def joined(self) -> None:
        """A peer connected, perhaps to ring: a bell is only kept by a connection."""
        self.look()
        self.store.pump_soon()

    def _buried(self, lease: int, error: DlmfsError | None) -> None:
        if self.ended or self._place is None or error is not None:
            return
        self._place.bells.forget(lease)
        self._place.lives.remove(lease)

    def hung_up(self) -> None:
        """A peer may have died."""
        if self.ended:
            return
        for timer in self._rechecks:
            timer.cancel()
        self.look()
        self._rechecks = [self.store.loop.call_later(d, self.look) for d in RECHECKS_S]

    def abandon(self) -> None:
        """Look after nobody any more. Others are not told before `end_session`."""
        self.ended = True
        for timer in (self._timer, *self._rechecks):
            if timer is not None:
                timer.cancel()

    def release(self, *, over: bool) -> None:
        """Live no more. `over`: the store has it no more, either; if not, the others end it."""
        self.abandon()
        if self._place is not None:
            self._place.leave(remove=over)
            self._place = None

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        self.store.ends()
        self.abandon()
        self.store.end_session(self.lease, done)


class _Place:
    """A session's place in the folder of sessions. Raises OSError, BadState."""

    def __init__(self, session: SqliteSession) -> None:
        store = session.store
        self._lease = session.lease
        self.lives = Lives.make(store.path, store.folder)
        self._life: Life | None = None
        self.bells = Bells(
            store.loop,
            self.lives,
            rung=store.pump_soon,
            joined=session.joined,
            hung_up=session.hung_up,
        )
        try:
            self._life = Life(self.lives, self._lease)
            self.bells.listen(self._lease)
        except BaseException:
            self.leave(remove=True)
            raise

    def leave(self, *, remove: bool) -> None:
        self.bells.close()
        if remove:
            self.lives.remove(self._lease)
        if self._life is not None:
            self._life.end()
        self.lives.close()
