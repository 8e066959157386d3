"""One thread that hears, for all locks of a mount, when somebody wants one and when it is lost.

epoll(7) and not poll(2): a poll holds on to the open file while it sleeps, so that the close of
another thread would release nothing. Edge-triggered: a notice stays readable until the lock is
handed over, but is told once for each that comes.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Final, Protocol

EVENTS: Final = select.EPOLLIN | select.EPOLLET


class Watched(Protocol):
    """A holder. Called from the watcher's thread."""

    def happened(self, events: int) -> None: ...


class Watcher:
    """Raises whatever epoll_ctl(2) says if a file cannot be watched."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._round = 0
        self._removed: dict[int, int] = {}
        """In which round a number was removed: what that round brings may be about the file before."""
        thread = threading.Thread(target=self._watch, name="dlmfs:notices", daemon=True)
        thread.start()

    def add(self, fd: int, holder: Watched) -> None:
        """May wait for the mount's daemon, which is asked for the present state."""
        self._watched[fd] = holder
        try:
            self._epoll.register(fd, EVENTS)
        except OSError:
            del self._watched[fd]
            raise

    def remove(self, fd: int) -> None:
        """To be called before it is closed: a copy of it elsewhere would keep it watched."""
        self._watched.pop(fd, None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        self._removed[fd] = self._round  # now: until then another round may have begun and heard it

    def abandon(self) -> None:
        """In a forked child: the parent's epoll must not be touched, only let go."""
        self._epoll.close()  # and not its number alone, which would be closed again later

    def _watch(self) -> None:
        while True:
            # One at a time: an event must not outlive its file, whose number may be used again.
            for fd, events in self._epoll.poll(maxevents=1):
                holder = self._watched.get(fd)
                if holder is None:
                    continue
                if self._removed.pop(fd, -1) == self._round:
                    # Between the poll and here the number may have become another lock's, which
                    # would be told of the loss of the one before: ask anew.
                    with contextlib.suppress(OSError):
                        self._epoll.modify(fd, EVENTS)
                    continue
                tell(holder, events)
            self._round += 1


def tell(holder: Watched, events: int) -> None:
    """Whatever is wrong with one lock: the others' notices must go on."""
    try:
        holder.happened(events)
    except Exception:
        import logging

        logging.getLogger("dlmfs.client").exception("a notice could not be told")


_watchers: dict[str, Watcher] = {}
"""By the mount's device. One for each mount: while epoll asks a daemon that is stopped, nothing can be
added to it or removed, and that must not concern another mount's locks."""
_making = threading.RLock()
"""Reentrant, for a signal's handler that releases a lock."""


def watcher(device: str) -> Watcher:
    """This process's watcher of a mount's locks."""
    with _making:
        if device not in _watchers:
            _watchers[device] = Watcher()
        return _watchers[device]


def _forked() -> None:
    global _making  # noqa: PLW0603 - the parent's threads do not run here
    _making = threading.RLock()
    for each in _watchers.values():
        each.abandon()
    _watchers.clear()


os.register_at_fork(after_in_child=_forked)
