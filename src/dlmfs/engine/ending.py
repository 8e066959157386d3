"""The end of one life of a node, in order: an umount, a signal, an eviction (design, rule 19).

    SERVING  as usual
    TOLD     holders are told, nothing new is served; what they close is left cleanly. `grace_s` at most
    LEAVING  what is still open keeps its place in its head; all else is left while the store answers
    OVER     the session is ended: who is still in a head has died there, as the others see it

Rules of this file
------------------
* What a program holds goes to nobody before it is closed or TOLD is over, and what stays open is never
  left: its head tells of a death then (mark, lock-delay), and that is what the next holder must know.
* The session is renewed, and requests are served, to the last: so closes are seen. Where they cannot be
  (the FUSE connection is gone), or the node is fenced meanwhile, the grace is waited for in full.
* A life ends once, and nobody who asks again makes it quicker.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from dlmfs.errors import DlmfsError, Unavailable

if TYPE_CHECKING:
    from dlmfs.engine.lock import Done
    from dlmfs.engine.lockspace import Lockspace
    from dlmfs.engine.membership import Membership

PATIENCE_S: Final = 3.0
"""LEAVING goes on for as long as the store answers something within this."""
END_S: Final = 1.0
"""How long the end of the session is waited for."""
RETRY_S: Final = 0.5


class Phase(enum.Enum):
    SERVING = "serving"
    TOLD = "told"
    LEAVING = "leaving"
    OVER = "over"


class Ending:
    """See the head of the file. One for each `Membership`."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self.phase = Phase.SERVING
        self.reason = ""
        self._waiting: list[Done] = []
        self._to_leave = 0
        self._is_told = False
        """`_over` has been called."""

    @property
    def begun(self) -> bool:
        return self.phase is not Phase.SERVING

    def begin(self, reason: str, done: Done) -> None:
        """End this life, for `reason`; `done` is called once, when it is over: at the latest `grace_s`,
        PATIENCE_S after the store's last answer and END_S from now."""
        if self._is_told:
            done(None)
            return
        self._waiting.append(done)
        if self.begun:
            return
        self.reason = reason
        member = self._member
        if member.up and member.host.holding():
            member.hold()
        left_s = member.held_until - member.loop.time()
        if left_s > 0:
            self.phase = Phase.TOLD
            member.loop.call_later(left_s, member.enter, self._grace_is_over)
        else:
            self._begin_leaving()
        member.host.ends(reason)
        if self.phase is Phase.TOLD and member.up:
            member.announce_end()
        self._leave_all()

    # -- leaving --------------------------------------------------------------------------------

    def _leave_all(self) -> None:
        """Every domain: of each lock what nobody has open at once, the rest as it is closed."""
        spaces = list(self._member.spaces.values())
        self._to_leave = len(spaces)
        if not spaces:
            self._all_left()
        for space in spaces:
            self._leave(space)

    def _leave(self, space: Lockspace) -> None:
        def left(error: DlmfsError | None) -> None:
            if isinstance(error, Unavailable) and self.phase is not Phase.OVER:
                # To end with a lock at EX that nobody has would look like a death (protocol-traps 12).
                self._member.loop.call_later(RETRY_S, self._member.enter, self._leave, space)
                return
            self._to_leave -= 1
            if not self._to_leave:
                self._all_left()

        self._member.leave(space, left)
        if self.phase is Phase.LEAVING:
            space.keep()

    def _all_left(self) -> None:
        if self.phase is Phase.TOLD and not self._member.up:
            return  # nothing was left, all was lost: whoever holds it may be at work still
        self._end()

    def _grace_is_over(self) -> None:
        if self.phase is not Phase.TOLD:
            return
        self._begin_leaving()
        if not self._to_leave:
            self._end()
        for space in list(self._member.spaces.values()):
            space.keep()

    def _begin_leaving(self) -> None:
        self.phase = Phase.LEAVING
        self._member.loop.call_later(PATIENCE_S, self._look, self._member.answers)

    def _look(self, seen: int) -> None:
        """Whether the store has answered anything since."""
        if self.phase is Phase.OVER:
            return
        if self._member.answers != seen:
            self._member.loop.call_later(PATIENCE_S, self._look, self._member.answers)
        else:
            self._end()

    # -- the end --------------------------------------------------------------------------------

    def _end(self) -> None:
        if self.phase is Phase.OVER:
            return
        self.phase = Phase.OVER
        for space in list(self._member.spaces.values()):
            space.lose(f"the node ends: {self.reason}")
        self._member.loop.call_later(END_S, self._over)
        self._member.end(self._over)

    def _over(self, error: DlmfsError | None = None) -> None:
        if not self._is_told:
            self._is_told = True
            waiting, self._waiting = self._waiting, []
            for done in waiting:
                done(error)
