"""One thread that hears, for all locks of this process, when somebody wants one and when it is lost.

epoll(7) and not poll(2): a poll holds on to the open file while it sleeps, so that the close of
another thread would release nothing. Edge-triggered: a notice stays readable until the lock is
handed over, but is told once for each that comes.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Protocol


class Watched(Protocol):
    """A holder. Called from the watcher's thread."""

    def happened(self, events: int) -> None: ...


class Watcher:
    """Raises whatever epoll_ctl(2) says if a file cannot be watched."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        thread = threading.Thread(target=self._watch, name="dlmfs:notices", daemon=True)
        thread.start()

    def add(self, fd: int, holder: Watched) -> None:
        """May wait for the mount's daemon, which is asked for the present state."""
        self._watched[fd] = holder
        try:
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        except OSError:
            del self._watched[fd]
            raise

    def remove(self, fd: int) -> None:
        """To be called before it is closed: a copy of it elsewhere would keep it watched."""
        self._watched.pop(fd, None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def abandon(self) -> None:
        """In a forked child: the parent's epoll must not be touched, only let go."""
        os.close(self._epoll.fileno())

    def _watch(self) -> None:
        while True:
            # One at a time: an event must not outlive its file, whose number may be used again.
            for fd, events in self._epoll.poll(maxevents=1):
                holder = self._watched.get(fd)
                if holder is not None:
                    tell(holder, events)


def tell(holder: Watched, events: int) -> None:
    """Whatever a program's callback raises: the others' notices must go on."""
    try:
        holder.happened(events)
    except Exception:
        import logging

        logging.getLogger("dlmfs.client").exception("a notice's callback failed")


_watcher: Watcher | None = None
_making = threading.Lock()


def watcher() -> Watcher:
    """This process's watcher."""
    global _watcher  # noqa: PLW0603 - one for each process
    with _making:
        if _watcher is None:
            _watcher = Watcher()
        return _watcher


def _forked() -> None:
    global _watcher, _making  # noqa: PLW0603 - the parent's thread does not run here
    _making = threading.Lock()
    if _watcher is not None:
        _watcher.abandon()
        _watcher = None


os.register_at_fork(after_in_child=_forked)
