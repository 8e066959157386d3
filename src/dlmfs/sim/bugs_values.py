"""Planted bugs of values and marks (see `bugs`): how long they live, and what they say."""

from __future__ import annotations

from typing import Final

from dlmfs.sim.planted import Planted

VALUES: Final[tuple[Planted, ...]] = (
    Planted(
        "mark-dropped-by-unlink",
        "engine/changes.py",
        "keep = head.members or not head.forgettable()",
        "keep = head.members",
        100,
        "the last unlink removes a head that tells of a death (rule 15)",
        first=300,
    ),
    Planted(
        "seen-by-nobody",
        "engine/view.py",
        "or self.had_ex < mark.revision:",
        "or False:",
        100,
        "a mark counts as seen by an exclusive grant that reached no program (promise 4)",
    ),
    Planted(
        "never-seen",
        "engine/view.py",
        "or self.had_ex < mark.revision:",
        "or True:",
        100,
        "a head that tells of a death outlives all who know of it (found)",
    ),
    Planted(
        "file-keeps-nothing",
        "fs/filesystem.py",
        "        self.spaces[parent.ino].files.made((name,))\n",
        "",
        100,
        "a value dies although a node has the lock's file, which it has not opened (promise 4; found)",
    ),
    Planted(
        "first-values-untold",
        "engine/sender.py",
        "        if not locks:\n            return txn\n",
        "        if True:\n            return txn\n",
        100,
        "a file that was made before the value was written does not keep it (promise 4)",
    ),
    Planted(
        "dead-value-mixed",
        "engine/value.py",
        "old = EMPTY_LVB if self._invalid() else head.lvb",
        "old = head.lvb",
        100,
        "with dead-value=invalid a write brings the rest of a dead holder's value back",
    ),
    Planted(
        "write-hides-nothing",
        "engine/changes.py",
        "head = head._replace(lvb=lvb, abandoned=None)",
        "head = head._replace(lvb=lvb)",
        100,
        "a write under EX leaves the mark of a death standing",
    ),
)
