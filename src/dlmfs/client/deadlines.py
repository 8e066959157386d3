"""For each mount whose locks can run out, a thread that says so when the time has come.

The watcher hears of a loss from the mount's daemon. One that stands still says nothing, and its locks
run out all the same (dlmfs.deadline).
"""

from __future__ import annotations

import math
import os
import select
import threading

from dlmfs.client.place import Place
from dlmfs.client.watcher import Watched, tell
from dlmfs.deadline import Deadline, boottime, sleep_until

_mutex = threading.RLock()
"""Reentrant, for a signal's handler that releases a lock."""

_mounts: dict[str, Mount] = {}
"""Whose thread runs, by device, the last one of each: the same device may be another mount's later."""


class Mount(threading.Thread):
    """The holders of one session of a mount. Ends when there is none left, or all have lost."""

    def __init__(self, dev: str, deadline: Deadline) -> None:
        super().__init__(name="dlmfs:deadline", daemon=True)
        self.dev = dev
        self.deadline = deadline
        self.holders: dict[int, Watched] = {}

    def run(self) -> None:
        while True:
            at = self.deadline.at()
            with _mutex:
                lost = list(self.holders.values()) if boottime() >= at else []
                over = bool(lost) or not self.holders
                if over:
                    self._end()
            for holder in lost:
                with _mutex:  # who releases meanwhile may be long about it: no waiting for that
                    is_there = id(holder) in self.holders
                if is_there:
                    tell(holder, select.EPOLLERR | select.EPOLLHUP)
            if over:
                return
            sleep_until(at)

    def _end(self) -> None:
        if _mounts.get(self.dev) is self:
            del _mounts[self.dev]
        self.deadline.close()

    def remove(self, holder: Watched) -> None:
        """May be repeated."""
        with _mutex:
            self.holders.pop(id(holder), None)


def watch(place: Place, holder: Watched) -> Mount | None:
    """From now on `holder` is told, in another thread, when what it was granted before is past its
    deadline. Asks no daemon. None where no lease can run out, or it cannot be seen. Raises RuntimeError
    if no thread can be started."""
    with _mutex:
        deadline = Deadline.find(place.dev, place.uid)
        if deadline is None:
            return None
        if deadline.at() == math.inf:  # the kernel tells of a daemon's death
            deadline.close()
            return None
        mount = _mounts.get(place.dev)
        if mount is not None and mount.deadline.identity == deadline.identity:
            deadline.close()
            mount.holders[id(holder)] = holder
            return mount
        mount = Mount(place.dev, deadline)
        mount.holders[id(holder)] = holder  # past already, perhaps: then it is told so
        mount.start()
        _mounts[place.dev] = mount
        return mount


def _forked() -> None:
    global _mutex  # noqa: PLW0603 - the parent's threads do not run here
    _mutex = threading.RLock()
    for mount in _mounts.values():
        mount.deadline.close()
    _mounts.clear()


os.register_at_fork(after_in_child=_forked)
