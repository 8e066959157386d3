"""The claims on one lock resource at its node: who holds, who waits, and the holders' tokens.

Nothing is decided here: `lockres` says who is served, and when.
"""

from __future__ import annotations

from typing import Final

from dlmfs.core.events import Claim, Stage
from dlmfs.core.tokens import PLAIN, Tokens
from dlmfs.model import TOKEN_SHIFT, HolderRule, Mode

COUNTER_MAX: Final = (1 << TOKEN_SHIFT) - 1


class Claims:
    """`holders` by open file, `ex` and `pr` of them by mode; `waiters` by number, in order of arrival.
    `revision` is that of the node's grant; `frozen`: nobody is served (`lockres`)."""

    __slots__ = (
        "_counter",
        "_kin_waiting",
        "_last_exclusive",
        "_token",
        "_tokens",
        "_trying_waiting",
        "ex",
        "frozen",
        "grants",
        "holders",
        "pr",
        "revision",
        "rule",
        "waiters",
    )

    def __init__(self, rule: HolderRule, tokens: Tokens = PLAIN) -> None:
        self.rule = rule
        self.revision = 0
        self.frozen = False
        self._tokens = tokens
        self._token = 0
        self.holders: dict[int, Claim] = {}
        self.ex = 0
        self.pr = 0
        self.grants = 0
        """Of claims here, since this resource was made."""
        self.waiters: dict[int, Claim] = {}
        self._kin_waiting = 0
        self._trying_waiting = 0
        self._counter = 0
        self._last_exclusive = False

    @property
    def in_use(self) -> bool:
        """Whether any local program holds or awaits the lock (unlink: EBUSY)."""
        return bool(self.holders or self.waiters)

    @property
    def trying(self) -> int:
        """How many trylocks wait here."""
        return self._trying_waiting

    def in_conflict(self, claim: Claim) -> bool:
        """Whether a local holder stands in the claim's way (only under holder=file)."""
        if self.rule is HolderRule.NODE:
            return False
        return self.ex > 0 or (claim.mode is Mode.EX and self.pr > 0)

    def converters(self) -> list[Claim]:
        """Who would be told EDEADLK: waiters whose process held the lock shared when they came."""
        return [c for c in self.waiters.values() if c.kin is True and c.mode is Mode.EX]

    def not_kin(self, claim: Claim) -> None:
        """The claim's process has closed what it held: it waits like any other."""
        assert claim.kin is True
        claim.kin = False
        self._kin_waiting -= 1

    # -- for the lock resource ------------------------------------------------------------------

    def _line_up(self, claim: Claim) -> None:
        self.waiters[claim.seq] = claim
        self._trying_waiting += claim.trying

    def _is_kin(self, claim: Claim, *, kin: bool) -> None:
        # Under holder=file a second exclusive open waits even for its own process (rule 11).
        claim.kin = kin and not (self.rule is HolderRule.FILE and claim.mode is Mode.EX)
        self._kin_waiting += claim.kin

    def _step_out(self, claim: Claim) -> None:
        """It waits no more."""
        del self.waiters[claim.seq]
        self._trying_waiting -= claim.trying
        self._kin_waiting -= claim.kin is True

    def _hold(self, claim: Claim) -> None:
        if claim.mode is Mode.EX:
            self.ex += 1
        else:
            self.pr += 1
        if self.rule is HolderRule.FILE:
            exclusive = claim.mode is Mode.EX
            # Consecutive readers share a token; every change of hands of an exclusive grant,
            # in or out, needs a larger one (promise 2).
            self._counter += exclusive or self._last_exclusive
            self._last_exclusive = exclusive
        claim.token = self._token + self._counter
        claim.stage = Stage.HELD
        self.grants += 1
        self.holders[claim.fh] = claim

    def _let_go(self, claim: Claim) -> None:
        del self.holders[claim.fh]
        claim.stage = Stage.ENDED
        if claim.mode is Mode.EX:
            self.ex -= 1
        else:
            self.pr -= 1

    def _begin_tokens(self, revision: int) -> None:
        """The node has a new grant: tokens count from its revision."""
        assert revision > self.revision, (revision, self.revision)
        self.revision = revision
        self._token = self._tokens.of(revision)
        self._counter = 0
        self._last_exclusive = False
