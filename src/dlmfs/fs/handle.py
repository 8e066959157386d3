"""One open lock file: the claim of whoever opened it, and what the kernel knows it by."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dlmfs.core.events import Claim, Stage
from dlmfs.model import Mode

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.fs.limits import User
    from dlmfs.fs.tree import LockFile


class Handle(Claim):
    """An open lock file. `unique` is the request that waits for it (0: none does), `poll` the
    kernel's handle once poll(2) has slept on it."""

    __slots__ = ("append", "charged", "file", "lock", "poll", "truncated", "unique", "user")

    def __init__(
        self, fh: int, pid: int, flags: int, file: LockFile, *, lock: ClusterLock, user: User
    ) -> None:
        self.fh = fh
        self.mode = Mode.EX if flags & os.O_ACCMODE else Mode.PR
        self.trying = bool(flags & os.O_NONBLOCK)
        self.pid = pid
        self.seq = 0
        self.kin = None
        self.token = 0
        self.stage = Stage.WAITING
        self.append = bool(flags & os.O_APPEND)
        self.truncated = False  # since its opening or its last write: see `write`
        self.file = file
        self.lock = lock
        self.user = user
        self.unique = 0
        self.charged = False
        """Counted as a waiter of its user."""
        self.poll: int | None = None
