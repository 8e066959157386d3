"""The domains of one node: joined by its programs, lost with its incarnation, and joined again.

Rules of this file
------------------
* At most one membership of a domain is being joined at a time; a later join takes its place.
* A domain that was lost is joined again until it is left, or its store is of another version.
* What a fence overtakes has failed: an answer that comes after it stands for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from dlmfs.core.lease import LeaseState
from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.errors import BadState, DlmfsError, LockLost, Unavailable

if TYPE_CHECKING:
    from dlmfs.engine.lock import Done
    from dlmfs.engine.membership import Membership

RETRY_S: Final = 0.5


class Domains:
    """See the rules at the head of the file. `spaces`: those joined, or lost and not left since."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self.spaces: dict[bytes, Lockspace] = {}
        self._joining: dict[bytes, Lockspace] = {}
        self._held_until: dict[bytes, float] = {}
        """Of domains that were lost: until when their holders have their time, on the loop's clock."""

    def join(self, domain: bytes, done: Callable[[Lockspace | DlmfsError], None]) -> None:
        """Become a member of a domain. Unavailable while fenced."""
        member = self._member
        if not member.serving():
            done(Unavailable(f"this node is fenced: {member.reason}"))
            return
        if member.loop.time() < self._held_until.get(domain, 0.0):
            done(Unavailable("what was held here, and lost, has not had its time to be closed"))
            return
        self._held_until.pop(domain, None)
        space = self._space(domain)

        def joined(error: DlmfsError | None) -> None:
            self._is_joined(space)
            if error is None and not member.up:
                space.lose(str(member.reason))
                error = Unavailable(f"this node is fenced: {member.reason}")
            if error is not None:
                done(error)
                return
            self._add(space)
            done(space)

        space.join(joined)

    def leave(self, space: Lockspace, done: Done) -> None:
        """Give back every lock of a domain, then the membership."""

        def left(error: DlmfsError | None) -> None:
            self._member.timeline.left_keys |= space.left_keys
            over = error is None or isinstance(error, LockLost) or space.life is Life.LOST
            # A late leave must not take the name from one that was joined meanwhile.
            if over and self.spaces.get(space.domain) is space:
                del self.spaces[space.domain]
            done(error)

        if space.live:
            space.leave(left)
        else:
            left(None)

    def join_again(self, domain: bytes) -> None:
        """A domain that was lost and has not been left since."""
        member = self._member
        old = self.spaces.get(domain)
        if old is None or old.life is not Life.LOST or not member.up or member.ending.begun:
            return
        assert member.session is not None
        under_way = self._joining.get(domain)
        if under_way is not None and under_way.lease == member.session.lease:
            return  # its end, if it is no good one, brings us back
        if member.state is LeaseState.SUSPECT:
            member.loop.call_later(RETRY_S, self.join_again, domain)
            return
        space = self._space(domain)

        def joined(error: DlmfsError | None) -> None:
            self._is_joined(space)
            if error is None and not member.up:  # fenced meanwhile; it is joined again then
                space.lose(str(member.reason))
                return
            if self.spaces.get(domain) is not old:
                if error is None:
                    space.leave(lambda _error: None)  # left while we were at it
            elif isinstance(error, BadState):
                old.reason = str(error)  # it will not mend itself
            elif error is not None:
                member.loop.call_later(RETRY_S, self.join_again, domain)
            else:
                self._add(space)
                member.host.rejoined(space)

        space.join(joined)

    def _add(self, space: Lockspace) -> None:
        self.spaces[space.domain] = space
        space.suspend(self._member.state)

    def _space(self, domain: bytes) -> Lockspace:
        """A new membership of a domain, to be joined; at most one at a time is."""
        member = self._member
        assert member.session is not None
        former = self._joining.pop(domain, None)
        if former is not None:  # its program was told ENOLCK, yet it goes on until it knows
            former.give_up_joining()
        space = self._joining[domain] = Lockspace(
            member.store,
            member.loop,
            member.host,
            domain=domain,
            node=member.name,
            lease=member.session.lease,
            rule=member.config.rule,
            timing=member.timing,
            lock_delay_s=member.config.lock_delay_s,
            grace_s=member.config.grace_s,
            dead_value=member.config.dead_value,
            tokens=member.tokens,
            serving=member.serving,
            ended=self._space_lost,
            leased=member.session.renewed_at is not None,
        )
        return space

    def _is_joined(self, space: Lockspace) -> None:
        """It is known what became of the join."""
        if self._joining.get(space.domain) is space:
            del self._joining[space.domain]

    def _space_lost(self, space: Lockspace) -> None:
        """One domain's membership was taken from us, perhaps by hand, while the session stands. To join
        again takes what we had away, if it is still there: first its holders have their time."""
        again = self._member.up and not self._member.ending.begun
        if again and self.spaces.get(space.domain) is space:
            grace_s = self._member.config.grace_s
            self._held_until[space.domain] = self._member.loop.time() + grace_s
            self._member.loop.call_later(grace_s, self.join_again, space.domain)
