"""What a node may do, by the age of its last good renewal (design, "Lease and fencing"). Pure.

HEALTHY     everything
SUSPECT     what it holds and has cached is served; nothing new is asked of the store
FENCED      nothing is served; final for this incarnation
REJOINING   a new session is being begun; until then as FENCED
"""

from __future__ import annotations

import enum

from dlmfs.timing import Timing


class LeaseState(enum.Enum):
    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    FENCED = "FENCED"
    REJOINING = "REJOINING"


def lease_state(timing: Timing, renewed_at: float | None, now: float) -> LeaseState:
    """The state of a lease that was not fenced before.

    `renewed_at`: when the last good renewal was *sent*, None for a lease that cannot run out;
    `now`: on the same clock, both in seconds.
    """
    if renewed_at is None or now - renewed_at < timing.suspect_after_s:
        return LeaseState.HEALTHY
    return LeaseState.FENCED if now - renewed_at >= timing.fence_after_s else LeaseState.SUSPECT
