"""The reply to one request: returned if it is known in time, else sent later, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dlmfs.fs.outside import Kernel
from dlmfs.timing import Timer

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock

Reply = bytes | int | None
"""A payload, an errno, or None: answered later."""


class Answer:
    """See the head of the file. `thread` waits for it; `pending` has it while it may be interrupted."""

    __slots__ = (
        "_deferred",
        "_device",
        "_early",
        "_pending",
        "_unique",
        "lock",
        "open",
        "take_back",
        "thread",
        "timer",
    )

    def __init__(
        self,
        device: Kernel,
        unique: int,
        pending: dict[int, Answer] | None = None,
        lock: ClusterLock | None = None,
        thread: int = 0,
    ) -> None:
        self.lock = lock
        self._pending = pending
        self.thread = thread
        self._device = device
        self._unique = unique
        self._early: Reply = None
        self._deferred = False
        self.open = True
        self.timer: Timer | None = None
        self.take_back: Callable[[bytes], None] | None = None
        """What to do about a reply that reached nobody."""

    def __call__(self, reply: bytes | int) -> None:
        if not self.open:
            return
        self.open = False
        if self.timer is not None:
            self.timer.cancel()
        if self._deferred:
            if self._pending is not None:
                self._pending.pop(self._unique, None)
            told = self._device.answer(self._unique, reply)
            if not told and isinstance(reply, bytes) and self.take_back is not None:
                self.take_back(reply)
        else:
            self._early = reply

    def reply(self) -> Reply:
        """What the handler returns: the reply if it is there, None if it will be sent."""
        self._deferred = True
        if self._early is None and self._pending is not None:
            self._pending[self._unique] = self
        return self._early
