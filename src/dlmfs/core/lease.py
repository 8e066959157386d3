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


class Renewal:
    """Which renewals of a lease count (design, "Lease and fencing"; protocol-traps 15).

    One counts only if the linearizable reads before it was sent and after it was answered found the
    same raft term: then one leader reigned all the while, so it was this leader that renewed the
    lease. Otherwise a paused old leader may have answered for a lease that the new one lets run out.
    """

    __slots__ = ("renewed_at", "term")

    def __init__(self, sent: float, term: int) -> None:
        """The lease was asked for at `sent` and confirmed under `term`. A leader that came between the
        two has renewed it in full."""
        self.renewed_at = sent
        self.term = term

    def confirmed(self, sent: float, term: int) -> bool:
        """A renewal sent at `sent` (on the node's clock) was answered, and a read after that found the
        lease there under `term`. False: it does not count; another is due now."""
        same, self.term = term == self.term, term
        if same:
            self.renewed_at = sent
        return same
