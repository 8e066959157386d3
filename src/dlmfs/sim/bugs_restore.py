"""Planted bugs (see `bugs`) of what is done when a store goes back: runs with a restore show them."""

from __future__ import annotations

from typing import Final

from dlmfs.sim.planted import Planted

TOKENS: Final = "core/tokens.py"
TIMELINE: Final = "engine/timeline.py"
RESTORED: Final = "engine/restored.py"

RESTORES: Final[tuple[Planted, ...]] = (
    Planted(
        "stamp-unseen",
        TIMELINE,
        "        if follows_ours is False:\n            return",
        "        if False:\n            return",
        100,
        "a renewal counts whatever stamp the store shows (restore)",
    ),
    Planted(
        "heads-unproved",
        TIMELINE,
        "            if not _stands(lock, kv, mine=look.mine):",
        "            if False:",
        100,
        "what is younger than the stamp is not looked at after a lost connection (restore)",
    ),
    Planted(
        "no-quarantine",
        RESTORED,
        "self._commit(Txn(compares, (put, quarantine)), session)",
        "self._commit(Txn(compares, (put,)), session)",
        100,
        "who finds the store restored begins anew at once, and so do all others",
    ),
    Planted(
        "offset-not-raised",
        TOKENS,
        "        return (revision + offset) << TOKEN_SHIFT",
        "        return revision << TOKEN_SHIFT",
        100,
        "tokens go back with the revisions (restore)",
        first=150,
    ),
)
