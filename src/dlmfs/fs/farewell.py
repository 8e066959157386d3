"""What programs see of the end of their node's life, before anything of theirs is given to others.

From now on every operation on a lock file fails as after a loss, but for its RELEASE, which is still
awaited: what is open keeps its lock until then. Whoever waits is sent away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlmfs.errors import Unavailable

if TYPE_CHECKING:
    from dlmfs.fs.openfiles import OpenFiles


def take_leave(fs: OpenFiles) -> None:
    """Tell everybody."""
    fs.ending = True
    fs.serving = _never
    waiting, fs.waiting = fs.waiting, {}
    for handle in waiting.values():
        handle.unique = 0  # of all first: one's withdrawal may be another's grant
    fs.places.clear()
    for unique, handle in waiting.items():
        fs.device.answer(unique, Unavailable.errno)
        fs.withdraw(handle)
    for handle in list(fs.handles.values()):
        fs.notify(handle)
    if fs.watchdog is not None:
        fs.watchdog.lost()
    fs.over()


def _never() -> bool:
    return False
