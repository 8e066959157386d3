"""Lock files that nobody uses are removed: those made for one use, and others if the mount is told to.

A file with the sticky bit is *transient*: whoever made it, as `dlmfs lock` and the library do, does not
need it once it is closed, and will not remove it. With `forget=` any file goes that is idle for so long.

Rules of this file
------------------
* Nothing that means something is lost: no file goes whose lock has a value or the mark of a dead holder,
  or is held or awaited here. The engine decides, by one commit (`engine.forgetting.leave_unused`).
* Opens and closes note nothing. A file is looked at now and then: it is in use, or was granted since the
  last look, or else it is idle since then at least.
* What is due is done in small pieces: others' commits must not wait behind ten thousand of these.
* A program that still has the inode of a file that went is answered ESTALE, upon which the kernel looks
  the name up again, and makes it anew if it is to be made.
"""

from __future__ import annotations

import heapq
import stat
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.engine.forgetting import leave_unused
from dlmfs.engine.lockspace import Life
from dlmfs.fs.tree import LockFile

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.engine.lockspace import Lockspace
    from dlmfs.fs.filesystem import FileSystem
    from dlmfs.timing import Timer

TRANSIENT_S: Final = 1.0
"""How long a transient file stays idle: who comes back within that finds the lock cached."""
LOOKS_MAX: Final = 500
LEAVES_MAX: Final = 32
"""In one piece: looks, and attempts to leave a lock, which make one commit together."""
PACE_S: Final = 0.01
"""Between two pieces."""
STEP_MAX_S: Final = 60.0
"""Looks at a file that is in use, or stays, become rarer, up to this or its time."""
SLACK_S: Final = 0.001


class Look(NamedTuple):
    """The next look at a file: `uses`, the grants that its lock had counted at the last; `idle_since`."""

    due: float
    number: int
    file: LockFile
    uses: int
    idle_since: float
    step_s: float


class Unused:
    """See the rules at the head of the file. `forget_s`: how long any file may be idle; None: always."""

    def __init__(self, fs: FileSystem, forget_s: float | None) -> None:
        self._fs = fs
        self._forget_s = forget_s
        self._looks: list[Look] = []
        self._number = 0
        self._stale = 0
        self._timer: Timer | None = None

    def watch(self, file: LockFile) -> None:
        """The file is new, or its mode has changed."""
        limit = self._limit(file)
        if limit is None:
            return
        self._stale += bool(file.look)
        now = self._fs.loop.time()
        self._push(Look(now + limit, 0, file, self._uses(file), now, limit))
        self._arm(0.0)

    def gone(self) -> None:
        """Some file was removed. Looks at what is gone are taken out when they are many."""
        self._stale += 1
        if self._stale > len(self._looks) // 2 + LOOKS_MAX:
            self._stale = 0
            self._looks = [look for look in self._looks if self._is_valid(look)]
            heapq.heapify(self._looks)

    # -- looking --------------------------------------------------------------------------------

    def _limit(self, file: LockFile) -> float | None:
        return TRANSIENT_S if file.mode & stat.S_ISVTX else self._forget_s

    def _lock(self, file: LockFile) -> ClusterLock | None:
        space = self._fs.spaces.get(file.domain.ino)
        return None if space is None else space.locks.get(file.name)

    def _uses(self, file: LockFile) -> int:
        lock = self._lock(file)
        return 0 if lock is None else lock.res.grants

    def _push(self, look: Look) -> None:
        self._number += 1
        look.file.look = self._number
        heapq.heappush(self._looks, look._replace(number=self._number))

    @staticmethod
    def _is_valid(look: Look) -> bool:
        return look.file.linked and look.file.look == look.number

    def _arm(self, least_s: float) -> None:
        if not self._looks:
            return
        if self._timer is not None:
            self._timer.cancel()
        delay = max(least_s, self._looks[0].due - self._fs.loop.time())
        self._timer = self._fs.loop.call_later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._fs.loop.time()
        looks = leaves = 0
        try:
            while self._looks and looks < LOOKS_MAX and leaves < LEAVES_MAX:
                if self._looks[0].due > now + SLACK_S:
                    break
                look = heapq.heappop(self._looks)
                looks += 1
                if self._is_valid(look):
                    leaves += self._look_at(look, now)
        finally:
            self._arm(PACE_S)

    def _look_at(self, look: Look, now: float) -> bool:
        """Whether the store was asked for something."""
        file, limit = look.file, self._limit(look.file)
        if limit is None:
            file.look = 0
            return False
        lock = self._lock(file)
        uses = 0 if lock is None else lock.res.grants
        in_use, used = lock is not None and lock.res.in_use, uses != look.uses
        since = now if in_use or used else look.idle_since
        step = limit if used and not in_use else min(2 * look.step_s, max(limit, STEP_MAX_S))
        # The next look is due whatever becomes of an attempt now.
        self._push(Look(max(now + step, since + limit), 0, file, uses, since, step))
        return now >= since + limit - SLACK_S and self._remove(file, lock)

    # -- removing -------------------------------------------------------------------------------

    def _remove(self, file: LockFile, lock: ClusterLock | None) -> bool:
        space = self._fs.spaces.get(file.domain.ino)
        if space is None or space.life is not Life.JOINED or not space.running:
            return False
        if file.domain.removing or self._fs.ending:
            return False
        if lock is not None:
            lock.enter(leave_unused, lock, partial(self._left, file, space))
            return lock.busy
        if space.files.is_without(file.name):
            self._left(file, space)
        return False

    def _left(self, file: LockFile, space: Lockspace) -> None:
        """The node is out of the lock's head, and nobody here wants it."""
        if file.linked and self._fs.spaces.get(file.domain.ino) is space:
            file.forgotten = True
            self._fs.removed(file, space)
            self._fs.device.invalidate_entry(file.domain.ino, file.name)
