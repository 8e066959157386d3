"""Planted bugs (see `bugs`) of how a node ends while programs hold its locks (`graces`)."""

from __future__ import annotations

from typing import Final

from dlmfs.sim.planted import Planted

ENDS: Final[tuple[Planted, ...]] = (
    Planted(
        "end-is-a-close",
        "fs/farewell.py",
        "    fs.over()\n",
        "    for handle in list(fs.handles.values()):\n        fs._close(handle)\n    fs.over()\n",
        100,
        "a daemon that ends closes what its programs have open (found)",
    ),
    Planted(
        "grace-not-waited",
        "engine/ending.py",
        "        if left_s > 0:\n            self.phase",
        "        if False:\n            self.phase",
        100,
        "a node ends without giving its holders their time (rule 19)",
    ),
    Planted(
        "shared-at-once",
        "fs/openfiles.py",
        "return any(handle.stage is Stage.HELD for",
        "return any(handle.stage is Stage.HELD and handle.mode is Mode.EX for",
        100,
        "only exclusive holders are given time when their node ends (rule 19)",
    ),
    Planted(
        "kept-is-closed",
        "engine/forgetting.py",
        """    if lock.forgets and lock.res.holders:
        finish(""",
        """    for claim in list(lock.res.holders.values()):
        lock.close(claim)
    if lock.forgets and lock.res.holders:
        finish(""",
        100,
        "what is open when the grace is over is left as if it were closed: no mark (rule 19)",
    ),
    Planted(
        "fence-ends-at-once",
        "engine/membership.py",
        "self._come_back(max(left_s, 0.0 if self.final else RETRY_S), self._after_fence)",
        "self._come_back(0.0 if self.final else RETRY_S, self._after_fence)",
        100,
        "a fenced node ends its session while its holders are being told (found)",
    ),
    Planted(
        "former-self-ended-at-once",
        "engine/naming.py",
        "first = record.lease != self._awaited and self._session.renewed_at is not None",
        "first = False",
        100,
        "who comes after a dead daemon ends its lease, and its programs have no time (found)",
    ),
    Planted(
        "half-a-lock-delay",
        "engine/deaths.py",
        "if now - at >= self._delay_s - SLACK_S:",
        "if now - at >= self._delay_s / 2:",
        100,
        "lock-delay is cut short by whatever else happens meanwhile",
    ),
)
