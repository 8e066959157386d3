"""One node's computer in a simulation: a clock at its own rate, and every way to stand still.

Rules of this file
------------------
* The node runs in one thread, so that a pause in the middle of a handler can be simulated without one:
  the rest of the handler runs at once, but its clock reads, and whatever it sends leaves, after the
  pause (`lag`); what comes from outside waits until then, too. Nobody else sees a difference.
* A pause after a look at the clock and before the answer that rests on it is the one thing that no lock
  service can exclude (design, promise 1): `overtaken` says that it happened in what runs now.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Final

from dlmfs.sim.loop import SimLoop, SimTimer

ROUNDING_S: Final = 1e-7


class MachineTimer:
    """A pending call on one machine."""

    __slots__ = ("args", "callback", "due", "inner")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], due: float) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args
        self.due = due
        self.inner: SimTimer

    def cancel(self) -> None:
        self.callback = None
        self.inner.cancel()


class Machine:
    """A `timing.Scheduler` whose clock runs at `rate`. `fitful` is the probability of a pause at each
    look at the clock and at each message sent; `nap_s` how long such a pause is at most."""

    def __init__(self, loop: SimLoop, rng: Random, rate: float = 1.0) -> None:
        self.loop = loop
        self.rng = rng
        self.rate = rate
        self._since = self._then = 0.0
        """The clock showed `_then` at the true time `_since`, when it got its rate."""
        self.fitful = 0.0
        self.nap_s = 0.0
        self.dead = False
        self.overtaken = False
        self.stalls = 0
        self._awake_at = 0.0
        self._asleep = 0.0
        self._frozen = 0.0

    # -- clocks -------------------------------------------------------------------------------

    @property
    def awake_at(self) -> float:
        """When (true time) whatever runs now goes on: in the future while the machine stands still."""
        return max(self.loop.time(), self._awake_at)

    @property
    def stands_still(self) -> bool:
        return self._awake_at > self.loop.time()

    def lag(self) -> float:
        """Seconds (true time) until a message that is sent now leaves."""
        return max(0.0, self._awake_at - self.loop.time())

    def time(self) -> float:
        """CLOCK_MONOTONIC: not counting suspended time."""
        return self.boottime() - self._asleep

    def boottime(self) -> float:
        """CLOCK_BOOTTIME, as a checker reads it."""
        return self._then + (self.awake_at - self._since) * self.rate - self._frozen

    def clock(self) -> float:
        """CLOCK_BOOTTIME, as the node reads it."""
        now = self.boottime()
        self.overtaken = False
        self.effect()
        return now

    def true_time(self, boottime: float) -> float:
        """When the node's clock shows that, in true time, if the machine does not freeze before."""
        return self._since + (boottime + self._frozen - self._then) / self.rate

    def set_rate(self, rate: float) -> None:
        """The clock runs at another rate from now on; timers under way may come late."""
        self._then += (self.awake_at - self._since) * self.rate
        self._since = self.awake_at
        self.rate = rate

    # -- standing still -------------------------------------------------------------------------

    def effect(self) -> None:
        """The node does something that can be seen from outside; it may be paused right then."""
        if self.fitful and self.rng.random() < self.fitful:
            self.pause(self.rng.uniform(0, self.nap_s))

    def pause(self, seconds: float) -> None:
        """The process is stopped; both clocks go on."""
        self._awake_at = self.awake_at + seconds
        self.overtaken = True
        self.stalls += 1

    def suspend(self, seconds: float) -> None:
        """The machine is suspended; only CLOCK_BOOTTIME goes on."""
        self.pause(seconds)
        self._asleep += seconds * self.rate

    def freeze(self, seconds: float) -> None:
        """The virtual machine is stopped; its clocks with it (protocol-traps 16)."""
        self.pause(seconds)
        self._frozen += seconds * self.rate

    def crash(self) -> None:
        """Nothing of it ever runs again."""
        self.dead = True

    # -- scheduling -----------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> MachineTimer:
        return self.call_later(0.0, callback, *args)

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> MachineTimer:
        timer = MachineTimer(callback, args, self.time() + delay)
        timer.inner = self.loop.call_later(self.lag() + delay / self.rate, self._fire, timer)
        return timer

    def _fire(self, timer: MachineTimer) -> None:
        callback = timer.callback
        if self.dead or callback is None:
            return
        left = timer.due - self.time()
        if self.stands_still or left > ROUNDING_S:
            timer.inner = self.loop.call_later(
                self.lag() + max(0.0, left) / self.rate, self._fire, timer
            )
            return
        self.overtaken = False
        callback(*timer.args)
