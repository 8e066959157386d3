"""Records that cannot be read: skipped, named by `dlmfs status` while they stand so."""

from __future__ import annotations

import logging
from typing import Final

from dlmfs.engine.fields import shown
from dlmfs.errors import BadState

log = logging.getLogger("dlmfs.node")

KEPT_MAX: Final = 100
"""Keys kept: of more it is said that there are more."""


class BadRecords:
    """Of each key what is wrong with its record."""

    def __init__(self) -> None:
        self.found: dict[bytes, str] = {}

    def note(self, key: bytes, error: BadState | str) -> None:
        """`key` is found to be bad: logged when it is news."""
        what = str(error)
        if self.found.get(key) == what:
            return
        if key in self.found or len(self.found) < KEPT_MAX:
            log.error("%s", what)
            self.found[key] = what

    def unknown(self, key: bytes) -> None:
        """A key of no shape that we know stands where only ours should be."""
        self.note(key, f"the key {shown(key)} in the store is not of dlmfs")

    def good(self, key: bytes) -> None:
        """The record was overwritten with a good one, or deleted."""
        if self.found and self.found.pop(key, None) is not None:
            log.warning("the key %s in the store is good again, or gone", shown(key))

    def forget(self, prefix: bytes) -> None:
        """All below `prefix` is read anew."""
        for key in [key for key in self.found if key.startswith(prefix)]:
            del self.found[key]

    def told(self) -> list[str]:
        """For people and scripts."""
        return sorted(self.found.values())
