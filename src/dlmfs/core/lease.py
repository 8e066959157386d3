"""What a node may do, by the age of its last good renewal (design, "Lease and fencing"). Pure.

HEALTHY     everything
SUSPECT     what it holds and has cached is served; nothing new is asked of the store
UNPROVED    a connection to the store was lost: nothing is served before the store has been shown to be
            the one that it was (`engine.timeline`)
FENCED      nothing is served; final for this incarnation
REJOINING   a new session is being begun; until then as FENCED
"""

from __future__ import annotations

import enum

from dlmfs.timing import Timing


class LeaseState(enum.Enum):
    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    UNPROVED = "UNPROVED"
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
    same raft term, and one connection to one member carried all three. A member that served a read
    under a term knows of that term: if it renewed the lease afterwards, then as this term's leader or
    through it. Otherwise a former leader, paused or cut off from the others, may have answered for a
    lease that the present one lets run out; and a client that goes from member to member may well
    read from one and renew at another (docs/track-record.md).
    """

    __slots__ = ("connection", "renewed_at", "ruled", "term")

    def __init__(self, sent: float, term: int, connection: int | None) -> None:
        """The lease was asked for at `sent` (on the node's clock) and read under `term`. A leader that
        came between the two has renewed it in full. `connection`: the number of that which carried
        the read, None if it was given up meanwhile."""
        self.renewed_at = sent
        self.term = term
        self.connection = connection
        self.ruled = 0
        """The last term that two reads in a row were served under: the store knows that it was."""

    def confirmed(self, sent: float, term: int, connection: int | None) -> bool:
        """A renewal sent at `sent` was answered, and a read after that found the lease there under
        `term`; `connection` carried both, None if there were two. False: it does not count, and
        another is due now."""
        same = term == self.term and connection is not None and connection == self.connection
        self.term, self.connection = term, connection
        if same:
            self.renewed_at, self.ruled = sent, term
        return same
