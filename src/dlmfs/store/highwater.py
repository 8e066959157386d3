"""The high-water mark: a revision that no state of this user has reached, kept over a reboot.

A state in memory is gone after a reboot, and any may be deleted, or put back from a backup. Its
successor must give larger tokens all the same, also with a clock that is behind. So each user has one
number on a disk, for all lock spaces of this host: it is raised, far ahead, before a revision reaches it,
and what begins anew begins there.

Rules of this file
------------------
* Nothing here is on the way of a transaction: the number is read and raised while a state is opened, and
  then by a thread, so rarely that a slow disk keeps up.
* One number for all: a lock space is not known again when its file was renamed or is named differently,
  and to begin too high harms nobody.
* Where there is no such place it says so, and goes on by the clock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import Final

from dlmfs import folders, home
from dlmfs.errors import DlmfsError
from dlmfs.store import statefile

log = logging.getLogger("dlmfs.store")

AHEAD: Final = 1 << 18
"""How far the mark is raised ahead of a revision: 8 s at the rate of the clock by which states begin, and
at ten times as many commits as an embedded engine does. It is raised again when half of that is used."""
BUSY_S: Final = 2.0
ROOT: Final = "/var/lib/dlmfs"

_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS"
    " mark (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL)"
)
_RAISE: Final = (
    "INSERT INTO mark VALUES (0, ?)"
    " ON CONFLICT (id) DO UPDATE SET revision = max(revision, excluded.revision)"
    " RETURNING revision"
)


def of_user() -> HighWater:
    """That of the user of this process: by his home in the list of users, not by the environment, which
    differs between a login shell and cron."""
    if os.geteuid() == 0:
        return HighWater(Path(ROOT))
    folder = home.folder_of(os.geteuid())
    return HighWater(None if folder is None else Path(folder))


class HighWater:
    """The mark in a folder, which is made; None: there is no place for one.

    `trouble`: why it is not kept, or was not the last time; None if it is. `value`: the mark, as it was
    last seen; 0 if it is not known.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.trouble = None if folder is not None else "this user has no home"
        self.value = 0

    def read(self) -> int:
        """The mark now. Waits for the disk."""
        self._at_least(0)
        return self.value

    def is_due(self, revision: int) -> bool:
        """Whether it is time to raise the mark for a state that has come to this revision."""
        return revision + AHEAD // 2 > self.value

    def keep_above(self, revision: int) -> None:
        """Raise the mark so that the state may go on for a while. Waits for the disk."""
        if self.is_due(revision):
            self._at_least(revision + AHEAD)

    def _at_least(self, revision: int) -> None:
        if self.folder is None:
            return
        try:
            self.value = self._raised(self.folder, revision)
        except (OSError, sqlite3.Error, DlmfsError) as error:
            says = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            trouble = str(says) if isinstance(error, DlmfsError) else f"{self.folder}: {says}"
            if trouble != self.trouble:
                log.info("the high-water mark of the tokens is not kept: %s", trouble)
            self.trouble = trouble
        else:
            self.trouble = None

    def _raised(self, folder: Path, revision: int) -> int:
        place = _place(folder)
        try:
            statefile.secure(place)
        finally:
            os.close(place.folder)
        conn = sqlite3.connect(
            statefile.uri(place.path, "rw"), uri=True, isolation_level=None, timeout=BUSY_S
        )
        with contextlib.closing(conn):
            conn.execute("PRAGMA synchronous=EXTRA")  # the number of before must not come back
            conn.execute("BEGIN IMMEDIATE")
            conn.execute(_TABLE)
            (mark,) = conn.execute(_RAISE, (revision,)).fetchone()
            conn.execute("COMMIT")
        return int(mark)


def _place(folder: Path) -> statefile.Place:
    """Make the folder, and what is missing above it. Raises OSError, DlmfsError."""
    os.close(folders.make_missing(str(folder), 0o700))
    return statefile.lasting(folder / "tokens.db")
