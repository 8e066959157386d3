"""What can come to a lock resource and what can go out of it: phases, events, claims, actions.

The table `POSSIBLE` says which event may come in which phase; anything else is a bug.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from dlmfs.model import Mode


class Phase(enum.IntEnum):
    """What is under way between this node and the cluster for this lock."""

    IDLE = 0
    ASKING = 1
    DROPPING = 2
    LOST = 3


class Event(enum.IntEnum):
    OPEN = 0
    IDENTIFIED = 1
    CLOSE = 2
    INTERRUPT = 3
    GRANTED = 4
    QUEUED = 5
    REFUSED = 6
    WANTED = 7
    DROPPED = 8
    LOSE = 9
    SURRENDER = 10


_LIVE: Final = frozenset({Phase.IDLE, Phase.ASKING, Phase.DROPPING})
_ANY: Final = frozenset(Phase)

POSSIBLE: Final[dict[Event, frozenset[Phase]]] = {
    Event.OPEN: _LIVE,
    Event.IDENTIFIED: _LIVE,
    Event.CLOSE: _ANY,
    Event.INTERRUPT: _LIVE,
    Event.GRANTED: frozenset({Phase.ASKING}),
    Event.QUEUED: frozenset({Phase.ASKING}),
    Event.REFUSED: frozenset({Phase.ASKING}),
    Event.WANTED: _LIVE,
    Event.DROPPED: frozenset({Phase.DROPPING}),
    Event.LOSE: _LIVE,
    Event.SURRENDER: frozenset({Phase.IDLE}),
}
"""The phases in which an event may come. A pair that is missing here is impossible."""


class Stage(enum.IntEnum):
    """The life of a claim."""

    WAITING = 0
    HELD = 1
    ENDED = 2


class Claim:
    """One open(2): it waits, then holds, then ends. Made by the caller, filled in here.

    `pid` is the opener's thread id (0: unknown), `since` seconds on the caller's clock. Callers
    that keep more of an open file derive from it: actions name the very object.
    """

    __slots__ = ("fh", "kin", "mode", "pid", "seq", "since", "stage", "token", "trying")

    def __init__(
        self,
        fh: int,
        mode: Mode,
        *,
        trying: bool = False,
        pid: int = 0,
        since: float = 0.0,
    ) -> None:
        assert mode is not Mode.NL
        self.fh = fh
        self.mode = mode
        self.trying = trying
        self.pid = pid
        self.since = since
        self.seq = 0
        self.kin: bool | None = None
        self.token = 0
        self.stage = Stage.WAITING

    def __repr__(self) -> str:
        return f"<claim {self.fh} {self.mode.name} {self.stage.name.lower()} pid={self.pid}>"


class Grant(NamedTuple):
    """The open succeeded; `claim.token` is its fencing token."""

    claim: Claim


class Fail(NamedTuple):
    claim: Claim
    errno: int


class Identify(NamedTuple):
    """Tell by `identified` whether the claim's process already holds this lock (rule 11)."""

    claim: Claim


class Notify(NamedTuple):
    """Somebody waits for what this claim holds: wake its poll(2). The blocking notice (BAST)."""

    claim: Claim


class Ask(NamedTuple):
    """Get the node to `mode`. `convert`: PR is in use here and must be kept while waiting."""

    mode: Mode
    trying: bool
    convert: bool


class Withdraw(NamedTuple):
    """Nobody here wants the outstanding request any more. Answered by refused or granted."""


class Drop(NamedTuple):
    """Give up all above `to`; file a wish for `then` (NL: none) in the same commit (rule 8)."""

    to: Mode
    then: Mode


class RefuseTry(NamedTuple):
    """The lock is in use here: refuse the other nodes' trylocks (rule 10)."""


Action = Grant | Fail | Identify | Notify | Ask | Withdraw | Drop | RefuseTry
