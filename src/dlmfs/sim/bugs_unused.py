"""Planted bugs (see `bugs`) in what is done about locks that nobody uses (`fs.unused`)."""

from __future__ import annotations

from typing import Final

from dlmfs.sim.planted import Planted

FORGETTING: Final = "engine/forgetting.py"

UNUSED: Final[tuple[Planted, ...]] = (
    Planted(
        "unused-with-a-value",
        FORGETTING,
        "if head.lvb != EMPTY_LVB or lock.view.head.abandoned",
        "if lock.view.head.abandoned",
        100,
        "a file that nobody uses goes with the lock's value (promise 4)",
    ),
    Planted(
        "unused-with-a-mark",
        FORGETTING,
        "lock.view.head.abandoned is not None or head.abandoned is not None:",
        "False:",
        100,
        "a file that nobody uses goes though a dead holder is marked (promise 4)",
    ),
    Planted(
        "unused-but-awaited",
        FORGETTING,
        "    if lock.res.in_use or lock.forgets:\n        lock.learned()",
        "    if lock.forgets:\n        lock.learned()",
        100,
        "who opens a lock while its node leaves it waits at a file that is gone",
    ),
    Planted(
        "forgotten-is-refused",
        "fs/openfiles.py",
        "return errno.ESTALE if file.is_stale else errno.EAGAIN",
        "return errno.ESTALE if file.lost else errno.EAGAIN",
        100,
        "who opens a name that has just gone by itself is refused",
    ),
    Planted(
        "never-forgotten",
        FORGETTING,
        "    return not (view.wishes or view.must_look)\n",
        "    return view.mine() is None\n",
        100,
        "a name that was used once stays for ever (found)",
    ),
)
