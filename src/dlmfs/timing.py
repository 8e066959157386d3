"""Every duration of the protocol, derived from one number, and the clock contract.

Time line of a node that loses its store at 0 (ttl = 15 s, the default)::

    0        3        6            10               15
    renew    renew    SUSPECT      FENCED           the store expires the lease
    sent     fails    no new       EIO on every     others are granted
                      grants       descriptor

FENCED comes at 0.67 ttl counted from the *sending* of the last good renewal, so it precedes
expiry as long as clock rates differ by less than 1 / 0.67 = 1.49 (design, "Lease and fencing").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Timer(Protocol):
    """A pending call, as `asyncio.TimerHandle`."""

    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """What the engine needs of an event loop. asyncio's loop and `sim.loop.SimLoop` both fit."""

    def time(self) -> float: ...

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> object: ...

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer: ...


Clock = Callable[[], float]
"""Seconds that also pass while the machine is suspended (CLOCK_BOOTTIME): a lease does not wait."""

GRACE_S = 2.0
"""How long holders have to close what they are told is over, before others may have it: twice what
`dlmfs lock` takes to end a command."""

TTL_DEFAULT_S = 15.0
TTL_MIN_S = 5.0
TTL_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Timing:
    """All waits of one node, in seconds, from the lease time that the store granted."""

    ttl_s: float = TTL_DEFAULT_S

    @property
    def renew_every_s(self) -> float:
        return self.ttl_s / 5

    @property
    def suspect_after_s(self) -> float:
        return self.ttl_s * 0.4

    @property
    def fence_after_s(self) -> float:
        return self.ttl_s * 0.67

    @property
    def kill_after_s(self) -> float:
        """Counted from FENCED: who ignores SIGTERM is killed before the store expires the lease."""
        return self.ttl_s * 0.15

    @property
    def try_timeout_s(self) -> float:
        """A trylock's wish is withdrawn from a silent holder after this long (protocol-traps 13)."""
        return 3.0

    @property
    def answer_timeout_s(self) -> float:
        """Calls that hold the kernel's directory lock answer within this (fuse-notes, Critical 1)."""
        return 4.0

    def __post_init__(self) -> None:
        assert 0 < self.renew_every_s < self.suspect_after_s < self.fence_after_s < self.ttl_s
