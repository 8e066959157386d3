"""Places in the queue that are kept for a moment after a signal.

FUSE cannot restart an open(2): every signal ends it with EINTR, also where the program, its
runtime (Python, PEP 475) or SA_RESTART would have it go on (fuse-notes 4). If the open went to the
end of the queue each time, a program with a timer would never get a busy lock. So the claim stays
for a second, and the same thread's next open of the same file in the same mode takes it over. It
is given up at once when the process ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from dlmfs.model import Mode
from dlmfs.timing import Scheduler, Timer

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.fs.handle import Handle

KEPT_S: Final = 1.0
"""How long a place is kept. A program that retries is back within milliseconds."""

Key = tuple[int, int, Mode]


class Readers(Protocol):
    """The part of an event loop that tells of a process's end."""

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> object: ...

    def remove_reader(self, fd: int) -> bool: ...


class Place:
    """One kept claim: its timer, and a descriptor that becomes readable when its process ends."""

    __slots__ = ("handle", "pidfd", "timer")

    def __init__(self, handle: Handle, timer: Timer, pidfd: int) -> None:
        self.handle = handle
        self.timer = timer
        self.pidfd = pidfd


class Places:
    """The kept places of one mount. `give_up(handle)` is called for one that nobody took back."""

    def __init__(
        self,
        loop: Scheduler,
        readers: Readers | None,
        give_up: Callable[[Handle], None],
        fate: Callable[[int], int | None],
    ) -> None:
        """`fate`: the thread group of a thread, None for one that is dying (`kin.fate`)."""
        self._loop = loop
        self._readers = readers
        self._give_up = give_up
        self._fate = fate
        self._places: dict[Key, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def keep(self, handle: Handle) -> bool:
        """Keep the place of an open that was just interrupted; False if its process is dying."""
        key = (handle.pid, handle.file.ino, handle.mode)
        group = self._fate(handle.pid)
        if group is None or key in self._places:
            return False
        pidfd = -1
        if self._readers is not None:
            # Without a descriptor to spare the timer alone ends it.
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(group)
                self._readers.add_reader(pidfd, self._over, key)
        timer = self._loop.call_later(KEPT_S, self._over, key)
        self._places[key] = Place(handle, timer, pidfd)
        return True

    def take(self, pid: int, ino: int, mode: Mode) -> Handle | None:
        """The claim that this thread left behind, if it comes back in time."""
        return self._remove((pid, ino, mode))

    def leave(self, pid: int, ino: int, *, but: Mode | None) -> None:
        """Give up what the thread left behind at the file, but a claim in that mode."""
        for mode in (Mode.PR, Mode.EX):
            if mode is not but:
                self._over((pid, ino, mode))

    def forget(self, handle: Handle) -> None:
        """The claim ended by itself: refused, or lost with its domain."""
        self._remove((handle.pid, handle.file.ino, handle.mode))

    def of(self, lock: ClusterLock) -> list[Handle]:
        """The claims on that lock."""
        return [p.handle for p in self._places.values() if p.handle.lock is lock]

    def clear(self, ino: int | None = None) -> None:
        """Give up all places, or those at one file, which is being unlinked."""
        for key in [key for key in self._places if ino is None or key[1] == ino]:
            self._over(key)

    def _remove(self, key: Key) -> Handle | None:
        place = self._places.pop(key, None)
        if place is None:
            return None
        place.timer.cancel()
        if place.pidfd >= 0:
            assert self._readers is not None
            self._readers.remove_reader(place.pidfd)
            os.close(place.pidfd)
        return place.handle

    def _over(self, key: Key) -> None:
        handle = self._remove(key)
        if handle is not None:
            self._give_up(handle)
