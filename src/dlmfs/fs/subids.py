"""Subordinate user ids (subuid(5)): whose they are. A user may run processes under each of his, 65,536
as a rule, by newuidmap(1); each with a share of a mount's limits they would be as many shares.

/etc/subuid is read when a user comes for the first time, if it has changed; and looked at once a minute
at most. Names are those of /etc/passwd, without asking a network. Root's are left alone: they are its
containers', each of which has its own share.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable
from typing import Final

BYTES_MAX: Final = 1 << 20
"""Of each of the files; what lies behind is not looked at."""
LOOK_S: Final = 60.0
ORDINARY_MAX: Final = 65_536
"""Ids below are users of their own, whatever is written there."""


class SubordinateIds:
    """See above. `clock`: seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        subuid: str = "/etc/subuid",
        passwd: str = "/etc/passwd",  # noqa: S107 - a path
    ) -> None:
        self._clock = clock
        self._files = subuid, passwd
        self._seen: object = None
        self._next = -1.0
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, int]] = []
        """First, behind the last, whose; in the order of the first."""

    def owner_of(self, uid: int) -> int:
        """The user whose id it is: itself, but for subordinate ones."""
        if uid < ORDINARY_MAX:
            return uid
        if self._clock() >= self._next:
            self._next = self._clock() + LOOK_S
            self._look()
        found = bisect.bisect_right(self._starts, uid) - 1
        if found >= 0:
            _, behind, owner = self._ranges[found]
            if uid < behind:
                return owner
        return uid

    def _look(self) -> None:
        state = _state(self._files[0])
        if state == self._seen:
            return
        self._seen = state
        text, names = _read(self._files[0]), _names(self._files[1])
        ranges = []
        for line in text.splitlines():
            who, first, count, *_ = [*line.split(b":"), b"", b""]
            owner = names.get(who, int(who) if _is_number(who) else 0)
            if owner and _is_number(first) and _is_number(count):
                start = max(int(first), ORDINARY_MAX)
                ranges.append((start, int(first) + int(count), owner))
        self._ranges = sorted(ranges)
        self._starts = [first for first, _, _ in self._ranges]


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= len(str(1 << 32))


def _names(path: str) -> dict[bytes, int]:
    fields = (line.split(b":") for line in _read(path).splitlines())
    return {each[0]: int(each[2]) for each in fields if len(each) > 2 and _is_number(each[2])}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(BYTES_MAX)
    except OSError:
        return b""


def _state(path: str) -> object:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size
