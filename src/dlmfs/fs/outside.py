"""What the file system tells others: the kernel, and the watchdog."""

from __future__ import annotations

from typing import Protocol


class Kernel(Protocol):
    """What the kernel is told besides the answers that handlers return (`fuse.device.Device`)."""

    def answer(self, unique: int, reply: bytes | int) -> bool:
        """Answer a request that waits; False if that reached nobody."""

    def notify_poll(self, kh: int) -> None: ...

    def invalidate_entry(self, parent: int, name: bytes) -> None: ...


class Watchdog(Protocol):
    """Who signals the holders' processes if the node is fenced; by the opening thread's id."""

    def holds(self, pid: int) -> None: ...

    def closed(self, pid: int) -> None: ...

    def lost(self) -> None: ...

    def lost_one(self, pid: int) -> None: ...
