"""A lock's side towards its node: the core's actions are carried out, and others' wishes told to it.

Rules of this file
------------------
* Actions are carried out in the order in which the core gave them, whatever comes of each.
* The core hears of others' wishes when they have changed, and with what came here before them.
* A trylock is answered in bounded time, without the cluster if need be (promise 6, protocol-traps 13).
* Another node's trylock is refused for users only who are here still: see `_refuse`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs.core.events import (
    Action,
    Ask,
    Claim,
    Drop,
    Fail,
    Grant,
    Identify,
    Notify,
    Phase,
    RefuseTry,
    Stage,
    Withdraw,
)
from dlmfs.engine.view import NOTHING, View, Wanted
from dlmfs.timing import Timer

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock

SLACK_S: Final = 0.001
"""A timer may come early by a rounding of the clock."""


class Local:
    """See the rules at the head of the file.

    `running`: actions are being carried out; `refuse_try`: the core wants others' trylocks refused;
    `told`: it knows that its request waits in the queue.
    """

    __slots__ = (
        "_abandoned",
        "_lock",
        "_looked_again",
        "_seen",
        "_todo",
        "_try_timer",
        "refuse_try",
        "running",
        "told",
        "wanted",
    )

    def __init__(self, lock: ClusterLock) -> None:
        self._lock = lock
        self._abandoned = False
        self.running = False
        self.refuse_try = False
        self.told = False
        self.wanted: Wanted | None = NOTHING
        """What the core was told last; None: tell it in any case."""
        self._looked_again: Wanted | None = None
        """What the core was told a second time, for the sake of trylocks."""
        self._seen: dict[int, int] | None = None
        self._todo: list[Action] = []
        self._try_timer: Timer | None = None

    # -- the core's actions ---------------------------------------------------------------------

    def run(self, actions: list[Action]) -> None:
        """Carry out the core's actions in order. A grant that cannot be delivered is closed from
        inside the loop; its actions queue up behind, or a Withdraw would pass its Ask."""
        if not actions or self._abandoned:
            return
        self._todo.extend(actions)
        if self.running:
            return
        self.running = True
        lock, host = self._lock, self._lock.space.host
        try:
            while self._todo:
                action = self._todo.pop(0)
                match action:
                    case Grant(claim):
                        host.granted(claim)
                    case Fail(claim, reason):
                        host.failed(claim, reason)
                    case Notify(claim):
                        host.notify(claim)
                    case Identify(claim):
                        told = partial(lock.enter, self._identified, claim)
                        host.identify(claim, list(lock.res.holders.values()), told)
                    case RefuseTry():
                        self._refuse()
                    case Ask() | Drop():
                        self.told = False
                    case Withdraw():
                        pass
        finally:
            self.running = False
        if self._try_timer is not None and not lock.res.trying:
            self.cancel_try()

    def freeze(self, frozen: bool) -> None:
        """Serve nothing until the store has been shown to be the one that it was; then go on."""
        lock = self._lock
        if frozen:
            lock.res.frozen = True
            return
        self.run(lock.res.thaw())
        if not (lock.unresolved and lock.value.writes):
            lock.value.answer_reads()

    def _identified(self, claim: Claim, kin: bool) -> None:
        """The host's answer, perhaps later: by then the claim may be gone."""
        if claim.stage is Stage.WAITING and claim.kin is None:
            self.run(self._lock.res.identified(claim, kin=kin))
            self._lock.resume()

    def look_at_converters(self, then: Callable[[], None]) -> None:
        """EDEADLK is for who holds the lock shared now, not for who did when it came. `then` is called
        when that is known of all."""
        res, host = self._lock.res, self._lock.space.host
        holders, asked = list(res.holders.values()), res.converters()
        left = len(asked)

        def told(claim: Claim, kin: bool) -> None:
            nonlocal left
            left -= 1
            if not kin and claim.stage is Stage.WAITING and claim.kin:
                res.not_kin(claim)
            if not left:
                then()

        for claim in asked:
            host.identify(claim, holders, partial(self._lock.enter, told, claim))
        if not asked:
            then()

    # -- what others wish for -------------------------------------------------------------------

    def tell_wanted(self, view: View) -> None:
        """Tell the core what the others wish for, if that changed."""
        wanted = view.wanted()
        if wanted != self.wanted:
            self.wanted = wanted
            self.refuse_try = False
            self.run(self._lock.res.wanted(*wanted[0], self._before_others(view)))

    def _before_others(self, view: View) -> int | None:
        """The last claim here that came before the oldest wish of another node, as we learned of it."""
        seen, last = self._seen or {}, self._lock.res.last_seq
        queue = [w.revision for w in view.others() if not w.trying]
        self._seen = {r: seen.get(r, last) for r in queue} or None
        return min(self._seen.values()) if self._seen else None

    def _refuse(self) -> None:
        """The core wants others' trylocks refused. First the requests are heard that the kernel had for
        us before we heard of these wishes: a close(2) returns before its RELEASE is read, and what
        begins after that must not be refused for its sake. They are read in the next turn of the loop,
        behind what waits for that turn already: so the core is asked again two turns from now."""
        if self.wanted is self._looked_again:
            self.refuse_try = True
        elif self.wanted is not None:
            loop, enter = self._lock.space.loop, self._lock.enter
            loop.call_soon(loop.call_soon, enter, self._ask_again, self.wanted)

    def _ask_again(self, wanted: Wanted) -> None:
        lock = self._lock
        if self.wanted is wanted and lock.res.phase is not Phase.LOST:
            self._looked_again = wanted
            self.run(lock.res.wanted(*wanted[0], self._before_others(lock.view)))
            lock.resume()

    # -- the time of trylocks -------------------------------------------------------------------

    def time_try(self) -> None:
        """A trylock waits."""
        if self._try_timer is None:
            self._time_try(self._lock.space.timing.try_timeout_s)

    def _time_try(self, delay: float) -> None:
        self._try_timer = self._lock.later(delay, self._try_is_over)

    def _try_is_over(self) -> None:
        """The holder of a lock we try, or the store, is silent: answer without it (trap 13).

        The core withdraws the request once nobody waits for it.
        """
        self._try_timer = None
        lock, space = self._lock, self._lock.space
        if not space.serving():
            return  # and everybody has been told
        # No answer of the store in all this time: then it is not a user who refuses.
        silent = lock.busy or lock.wreck_left is not None or not space.running
        reason = errno.ENOLCK if silent else errno.ETXTBSY
        limit, now = space.timing.try_timeout_s, space.loop.time()
        trying = [c for c in lock.res.waiters.values() if c.trying]
        later = [c for c in trying if now < c.since + limit - SLACK_S]
        for claim in [c for c in trying if c not in later]:
            if claim.stage is Stage.WAITING:  # else the one before it made room
                space.host.failed(claim, reason)
                self.run(lock.res.interrupt(claim))
        # One that was granted just now waits no more, and its time began anew.
        left = [c for c in later if c.stage is Stage.WAITING]
        if left and self._try_timer is None:
            self._time_try(left[0].since + limit - now)
        lock.resume()

    def abandon(self) -> None:
        """The lock is wrecked: what was to be done is for nobody any more."""
        self._abandoned = True
        self._todo.clear()
        self.cancel_try()

    def cancel_try(self) -> None:
        """None waits any more."""
        if self._try_timer is not None:
            self._try_timer.cancel()
            self._try_timer = None
