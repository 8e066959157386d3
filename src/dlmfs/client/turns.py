"""The order of those in this process who want one lock.

A daemon serves a process that holds the lock already before everybody else, since a process that
waits for itself waits for ever (design, engine rule 11). A program whose threads queue for a lock
would so keep all other nodes out. So they queue here, and only one whose turn it is asks the daemon.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Turn:
    """One that holds or waits."""

    __slots__ = ("shared",)

    def __init__(self, shared: bool) -> None:
        self.shared = shared


class Turns:
    """First come, first served; those who share go together."""

    def __init__(self) -> None:
        self._queues: dict[object, list[Turn]] = {}
        self._mutex = threading.RLock()
        """Itself, and not by way of the condition: an exception of a signal's handler may come in
        the middle of what a condition does in Python before it releases."""
        self._changed = threading.Condition(self._mutex)

    def enter(
        self, lock: object, shared: bool, *, trying: bool, given_up: Callable[[], bool]
    ) -> Turn | None:
        """Wait for one's turn; None if it did not come: `given_up`, or it is `trying` and somebody
        is before it."""
        turn = Turn(shared)
        with self._mutex:
            queue = self._queues.setdefault(lock, [])
            queue.append(turn)
            if not trying:
                self._changed.wait_for(lambda: given_up() or _is_first(queue, turn))
            if not given_up() and _is_first(queue, turn):
                return turn
            self._remove(lock, turn)
            return None

    def leave(self, lock: object, turn: Turn) -> None:
        """May be repeated, and goes on where an exception ended it."""
        with self._mutex:
            self._remove(lock, turn)

    def _remove(self, lock: object, turn: Turn) -> None:
        queue = self._queues.get(lock, [])
        if turn in queue:
            queue.remove(turn)
        if not queue:
            self._queues.pop(lock, None)
        self._changed.notify_all()

    def look(self) -> None:
        """Somebody has given up."""
        with self._mutex:
            self._changed.notify_all()


def _is_first(queue: list[Turn], turn: Turn) -> bool:
    """Whether all that came before can go together with it."""
    before = queue[: queue.index(turn)]
    return all(other.shared for other in before) if turn.shared else not before


turns = Turns()


def _forked() -> None:
    """None of those threads runs in a forked child."""
    turns.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forked)
