"""Why the kernel interrupts a request: what /proc says of the signals of the thread that waits.

The same INTERRUPT tells of a signal that is caught, of one that ends the process, of a stop (SIGSTOP,
Ctrl-Z), of a debugger and of a freezer. Only the first two are a reason for a program to see EINTR.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterable
from enum import Enum
from typing import Final

from dlmfs import proc
from dlmfs.fuse import mountinfo

LEVELS_MAX: Final = 32
"""Levels of control groups that are looked at, from the top: whoever nests his own deeper is the only
one to feel it, and cannot make us read without end."""


class Cause(Enum):
    """Why a request was interrupted."""

    NOTHING = "nothing that the program would notice"
    CAUGHT = "a signal that the program catches"
    FATAL = "a signal that ends the process"
    FROZEN = "its control group is being frozen"


def _mask(*numbers: int) -> int:
    return sum(1 << (number - 1) for number in numbers)


_STOPS: Final = _mask(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_HARMLESS: Final = _STOPS | _mask(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
"""Signals whose default action ends no process (signal(7))."""


_MASKS: Final = (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn", b"SigCgt")


def cause(thread: int) -> Cause:
    """Why a request of this thread (0: of another pid namespace) was interrupted, as far as one can
    see now. Where nothing can be seen it counts as a signal that is caught."""
    told = proc.status(thread) if thread else {}
    masks = [proc.number(told.get(name), 16) for name in _MASKS]
    own, shared, blocked, ignored, caught = masks
    if own is None or shared is None or blocked is None or ignored is None or caught is None:
        return Cause.CAUGHT
    due = (own | shared) & ~blocked & ~ignored
    if due & ~caught & ~_HARMLESS:
        return Cause.FATAL
    if due & caught:
        return Cause.CAUGHT
    return Cause.FROZEN if _freezer().holds(thread) else Cause.NOTHING


class Freezer:
    """Whether a thread's control group is to stand still (cgroup.freeze, or freezer.state of version 1).

    A thread that waits for us cannot be frozen before it has its answer.
    """

    def __init__(self, table: Iterable[mountinfo.MountEntry]) -> None:
        self._v1: list[tuple[str, str]] = []
        self._v2: list[tuple[str, str]] = []
        for entry in table:
            if entry.fstype == "cgroup2":
                self._v2.append((entry.mountpoint, entry.root))
            elif entry.fstype == "cgroup" and "freezer" in entry.super_options:
                self._v1.append((entry.mountpoint, entry.root))

    def holds(self, thread: int) -> bool:
        """Whether it is being frozen; False where nothing can be seen."""
        text = proc.read(thread, "cgroup") if self._v1 or self._v2 else None
        for line in (text or b"").splitlines():
            _, controllers, path = (*line.split(b":", 2), b"", b"")[:3]
            if not controllers:
                found = any(self._frozen_v2(*top, os.fsdecode(path)) for top in self._v2)
            elif b"freezer" in controllers.split(b","):
                found = any(self._frozen_v1(*top, os.fsdecode(path)) for top in self._v1)
            else:
                continue
            if found:
                return True
        return False

    @staticmethod
    def _frozen_v1(mountpoint: str, root: str, path: str) -> bool:
        """The state tells of the groups above, too."""
        below = _below(root, path)
        return below is not None and _read(os.path.join(mountpoint, *below, "freezer.state")) in (
            b"FREEZING\n",
            b"FROZEN\n",
        )

    @staticmethod
    def _frozen_v2(mountpoint: str, root: str, path: str) -> bool:
        """Each group says what was asked of it alone."""
        here = mountpoint
        for name in ("", *(_below(root, path) or ())):
            here = os.path.join(here, name)
            if _read(os.path.join(here, "cgroup.freeze")) == b"1\n":
                return True
        return False


def _below(root: str, path: str) -> list[str] | None:
    """The names that lead from the root of a mount of control groups to one of them; None if they do
    not (as seen from another cgroup namespace)."""
    names, above = ([x for x in y.split("/") if x] for y in (path, root))
    if names[: len(above)] != above or ".." in names:
        return None
    return names[len(above) :][:LEVELS_MAX]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


@functools.cache
def _freezer() -> Freezer:
    return Freezer(mountinfo.mounts())
