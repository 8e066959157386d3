"""Whether a history of one lock can be that of a correct lock: what programs saw, put in order.

The question is linearizability (Herlihy and Wing 1990): is there an instant for every operation,
between its invocation and its return, such that a shared/exclusive lock that did them one by one at
these instants would have given the same answers? Operations of unknown outcome may have an instant
anywhere after their invocation, or none. Real-time order: a is before b iff a.returned < b.invoked.

The lock
--------
* Its state is a multiset of holds, (owner, mode). An acquire or a trylock is ok only if no other
  owner has an incompatible hold. An owner's own holds never conflict with each other.
* A trylock is busy only for a reason: another owner has an incompatible hold, or waits for one
  (first come, first served), or may have one by an operation of unknown outcome. Where its own owner
  waits for EX, it stands behind that acquire: any other owner with a hold or a request is a reason.
  That a lock is cached somewhere is no reason (design, promise 6).
* What failed had no effect; while it had not returned, and while it kept its place, it waited.

Why there is little to search
-----------------------------
General checkers (Wing and Gong 1993, Lowe 2017) try orders and remember the states they led to. For
this object nearly every choice has a best answer, so one pass over the times suffices:

* An acquire takes effect when it returns: earlier would shut others out for longer, and for a busy
  trylock it is the same reason while it waits. A release takes effect as late as possible, when
  somebody else must have the lock or when it returns: until then it is a reason.
* A busy trylock changes nothing: it takes effect as soon as there is a reason.
* An unknown acquire that never takes effect is in nobody's way, and a reason for as long as it may.
* A trylock that was ok is a reason only once it has taken effect. Only for a busy trylock that finds
  no other reason until it returns is one moved to that instant, and which one is a choice: here the
  pass branches. A state that was met before is not followed again.

One tie is decided, not searched: of several holds that each ended at the very instant at which they
began, and exclude each other, the one whose release was answered last is taken to be the last.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from dlmfs.model import Mode, compatible

AROUND: Final = 4
"""How many neighbours of an impossible answer a verdict shows."""

_RIVALS: Final = {
    mode: [m for m in (Mode.EX, Mode.PR) if not compatible(m, mode)] for mode in (Mode.PR, Mode.EX)
}


class Op(NamedTuple):
    """One operation on the lock, as its program saw it. Times: any unit, one clock for all."""

    process: int
    """For the reader; what one process does is in no special order."""
    owner: Hashable
    """Who excludes whom: a node or an open file."""
    kind: Literal["acquire", "try", "release"]
    mode: Mode
    """PR or EX; a release's is not looked at."""
    invoked: float
    returned: float | None
    """None: never. A release that nobody answers (its node died, or was fenced, at `invoked`) may take
    effect at any time later."""
    outcome: Literal["ok", "busy", "failed", "unknown"]
    hold: int
    """Ties a release to its acquire or trylock; no two of those that may hold have the same."""
    place: float = 0.0
    """How long after `returned` a failed acquire may still stand in the queue (glossary: place)."""


class Verdict(NamedTuple):
    """`ok` and not `complete`: the budget ran out, nothing is claimed."""

    ok: bool
    why: str
    """One sentence; empty if there is nothing to say."""
    around: tuple[Op, ...]
    """The few operations that cannot be ordered, by their invocation."""
    steps: int
    complete: bool


class _Request(NamedTuple):
    """An acquire or trylock, with what its release tells of it."""

    op: Op
    certain: bool
    """It had the lock, at least from its return until `left`."""
    left: float
    """When it began to be released; no effect before that."""
    gone: float
    """From when on it is in nobody's way."""
    release: Op | None


class _Step(enum.IntEnum):
    """What happens at an instant, in the order that leaves most possible."""

    ASK = 0
    LEAVE = 1
    TAKE = 2
    REFUSE = 3
    GONE = 4


def judge(ops: Sequence[Op], budget: int = 200_000) -> Verdict:
    """Judge the operations on one lock, in any order; each costs two steps or few more.

    Raises `ValueError` for what is no history: a release of what nobody acquired, an operation that
    returned before its invocation.
    """
    requests = _requests(ops)
    overlap = _overlap(requests)
    if overlap is not None:
        first, second = sorted(overlap, key=lambda r: r.op.invoked)
        why = f"{_held(first)}, and {_held(second)}: they exclude each other"
        return Verdict(False, why, _with_releases(overlap), 0, True)
    return _Search(requests).run(budget)


# -- reading -----------------------------------------------------------------------------------


def _requests(ops: Sequence[Op]) -> list[_Request]:
    """The acquires and trylocks that tell of anything, each with its release."""
    releases: dict[int, Op] = {}
    for op in ops:
        _check(op)
        if op.kind == "release" and op.outcome != "failed":
            if op.hold in releases:
                raise ValueError(f"hold {op.hold} is released twice: {op}")
            releases[op.hold] = op
    found = []
    numbers: set[int] = set()
    for op in ops:
        if op.kind == "release" or (op.kind == "try" and op.outcome == "failed"):
            continue  # of a failed trylock nothing is known, and nobody waits behind it
        if op.outcome in ("busy", "failed"):
            found.append(_Request(op, False, math.inf, _end(op) + op.place, None))
            continue
        if op.hold in numbers:
            raise ValueError(f"hold {op.hold} is acquired twice: {op}")
        numbers.add(op.hold)
        found.append(_request(op, releases.pop(op.hold, None)))
    for stray in releases.values():
        raise ValueError(f"nobody acquired what this releases: {stray}")
    return found


def _request(op: Op, release: Op | None) -> _Request:
    """One that was ok, or may have been."""
    if release is None:
        return _Request(op, op.outcome == "ok", math.inf, math.inf, None)
    if release.owner != op.owner or release.invoked < op.invoked:
        raise ValueError(f"hold {op.hold} is released by another or too early: {release}")
    # One that returned only after it was lost promises nothing of any instant: as if unknown.
    certain = op.outcome == "ok" and _end(op) <= release.invoked
    gone = math.inf if release.outcome == "unknown" else _end(release)
    return _Request(op, certain, release.invoked, gone, release)


def _check(op: Op) -> None:
    if op.returned is None:
        possible = op.kind == "release" or op.outcome == "unknown"
    else:
        possible = op.returned >= op.invoked
    if op.outcome == "busy":
        possible &= op.kind == "try"
    if not possible or op.mode is Mode.NL or op.place < 0:
        raise ValueError(f"no operation of a lock: {op}")


# -- exclusion ---------------------------------------------------------------------------------


def _overlap(requests: Sequence[_Request]) -> tuple[_Request, _Request] | None:
    """Two holds of different owners that exclude each other, both there at one instant for certain.

    Without busy trylocks this is all there is to ask: if no two such holds overlap, each acquire can
    take effect at its return and each release at its invocation.
    """
    spans = sorted((_end(r.op), r.left, i) for i, r in enumerate(requests) if r.certain)
    crowd = _Crowd(requests)
    ends: list[tuple[float, int]] = []
    for begin, end, i in spans:
        while ends and ends[0][0] <= begin:
            crowd.discard(heapq.heappop(ends)[1])
        rival = next(crowd.rivals(requests[i].op), None)
        if rival is not None:
            return requests[rival], requests[i]
        crowd.add(i)
        heapq.heappush(ends, (end, i))
    return None


class _Crowd:
    """Some of the requests, by mode and owner: who among them is in an operation's way?"""

    def __init__(self, requests: Sequence[_Request]) -> None:
        self._requests = requests
        self.of: dict[Mode, dict[Hashable, set[int]]] = {Mode.PR: {}, Mode.EX: {}}

    def copy(self) -> _Crowd:
        new = _Crowd(self._requests)
        for mode, owners in self.of.items():
            new.of[mode] = {owner: set(members) for owner, members in owners.items()}
        return new

    def add(self, i: int) -> None:
        op = self._requests[i].op
        self.of[op.mode].setdefault(op.owner, set()).add(i)

    def has(self, i: int) -> bool:
        op = self._requests[i].op
        return i in self.of[op.mode].get(op.owner, ())

    def discard(self, i: int) -> bool:
        """Whether it was there."""
        there = self.has(i)
        if there:
            op = self._requests[i].op
            owners = self.of[op.mode]
            owners[op.owner].remove(i)
            if not owners[op.owner]:
                del owners[op.owner]
        return there

    def rivals(self, op: Op) -> Iterator[int]:
        """The members of other owners that exclude `op`."""
        for mode in _RIVALS[op.mode]:
            for owner, members in self.of[mode].items():
                if owner != op.owner:
                    yield from members

    def members(self) -> Iterator[int]:
        for owners in self.of.values():
            for members in owners.values():
                yield from members


# -- the pass over the times -------------------------------------------------------------------


class _State:
    """The lock at one instant, in one of the orders that are possible so far."""

    def __init__(self, requests: Sequence[_Request]) -> None:
        self.requests = requests
        self.waiting = _Crowd(requests)
        """Acquires that have not taken effect, and whatever may have."""
        self.holding = _Crowd(requests)
        self.leaving = _Crowd(requests)
        """Holds whose release was invoked and has not yet taken effect."""
        self.trying: set[int] = set()
        """Trylocks that will be ok and have not taken effect."""
        self.unexplained = _Crowd(requests)
        """Trylocks that will be busy, without a reason so far."""
        self.moved_for: int | None = None
        """The last busy trylock for which another was moved."""

    def copy(self) -> _State:
        new = _State(self.requests)
        new.waiting, new.holding = self.waiting.copy(), self.holding.copy()
        new.leaving, new.unexplained = self.leaving.copy(), self.unexplained.copy()
        new.trying = set(self.trying)
        new.moved_for = self.moved_for
        return new

    def key(self) -> tuple[frozenset[int], ...]:
        """All that the choices made so far can have changed."""
        crowds = (self.holding, self.leaving, self.unexplained)
        return tuple(frozenset(crowd.members()) for crowd in crowds)

    def explained(self, op: Op) -> bool:
        """Whether a busy trylock has a reason at this instant."""
        crowds = (self.holding, self.leaving, self.waiting)
        if op.owner not in self.waiting.of[Mode.EX]:
            return any(True for c in crowds for _ in c.rivals(op))
        return any(self.requests[i].op.owner != op.owner for i in self.trying) or any(
            owner != op.owner for c in crowds for owners in c.of.values() for owner in owners
        )

    def _explain(self, new: Op, *, a_reason: bool = True) -> None:
        """`new` has begun or taken effect; busy trylocks that had no reason may have one now."""
        for i in list(self.unexplained.rivals(new)) if a_reason else ():
            self.unexplained.discard(i)
        # Behind an EX of one's own anybody else is a reason, for all of one owner alike.
        for busy in filter(None, self.unexplained.of.values()):
            for owner in [o for o in self.waiting.of[Mode.EX] if o in busy]:
                if self.explained(self.requests[next(iter(busy[owner]))].op):
                    del busy[owner]

    def ask(self, i: int) -> None:
        request = self.requests[i]
        if request.op.outcome == "busy":
            if not self.explained(request.op):
                self.unexplained.add(i)
            return
        trying = request.op.kind == "try" and request.certain
        if trying:
            self.trying.add(i)
        else:
            self.waiting.add(i)
        self._explain(request.op, a_reason=not trying)

    def take(self, i: int) -> bool:
        """The request takes effect, at its return at the latest; False if it cannot."""
        op = self.requests[i].op
        if i not in self.trying and not self.waiting.discard(i):
            return True  # a trylock that was moved
        if any(True for _ in self.holding.rivals(op)):
            return False
        self.trying.discard(i)
        for rival in list(self.leaving.rivals(op)):
            self.leaving.discard(rival)
        self.holding.add(i)
        self._explain(op)
        return True

    def leave(self, i: int) -> None:
        if self.holding.discard(i):
            self.leaving.add(i)

    def gone(self, i: int) -> None:
        self.waiting.discard(i)
        self.leaving.discard(i)

    def moves(self, i: int) -> Iterator[_State]:
        """What follows if a trylock takes effect before busy `i` returns, and is its reason. Of those
        with one owner and mode the first to return is the best: it would hold soonest anyway."""
        best: dict[tuple[Hashable, Mode], int] = {}
        for t in sorted(self.trying, key=lambda t: _end(self.requests[t].op)):
            op = self.requests[t].op
            best.setdefault((op.owner, op.mode), t)
        for t in best.values():
            new = self.copy()
            new.moved_for = i
            if new.take(t) and not new.unexplained.has(i):
                yield new


class _Search:
    def __init__(self, requests: Sequence[_Request]) -> None:
        self.requests = requests
        self.events = sorted(self._events())
        self.steps = 0

    def _events(self) -> Iterator[tuple[float, _Step, float, float, int]]:
        for i, r in enumerate(self.requests):
            yield r.op.invoked, _Step.ASK, 0, 0, i
            if r.op.outcome == "busy":
                yield _end(r.op), _Step.REFUSE, 0, 0, i
                continue
            if r.certain:
                # Holds that end as they begin come first: others may begin at the same instant.
                # Of two such the one that may linger comes last.
                yield _end(r.op), _Step.TAKE, r.left, r.gone, i
                yield r.left, _Step.LEAVE, 0, 0, i
            yield r.gone, _Step.GONE, 0, 0, i

    def run(self, budget: int) -> Verdict:
        """Depth first: each entry of `stack` yields the states to follow from one event on."""
        stack = [(0, iter([_State(self.requests)]))]
        seen: set[Hashable] = set()
        furthest, blamed = -1, -1
        while stack:
            begin, states = stack[-1]
            state = next(states, None)
            if state is None:
                stack.pop()
                continue
            key = begin, state.key()
            self.steps += 1 + sum(map(len, key[1]))
            if key in seen:
                continue
            seen.add(key)
            at, busy = self._follow(begin, state, budget)
            if self.steps > budget:
                return Verdict(True, "the budget ran out: nothing is claimed", (), budget, False)
            if busy is None:
                return Verdict(True, "", (), self.steps, True)
            if at > furthest:
                furthest, blamed = at, busy
            if self.events[at][1] is _Step.REFUSE:
                if not self._reasons(self.requests[busy].op):
                    return self._refuted(self.requests[busy].op)
                stack.append((at, state.moves(busy)))
        return self._refuted(self.requests[blamed].op)

    def _follow(self, at: int, state: _State, budget: int) -> tuple[int, int | None]:
        """Go on from event `at`: where it ends, and the busy trylock that ends it."""
        while at < len(self.events) and self.steps <= budget:
            _, step, _, _, i = self.events[at]
            self.steps += 1
            match step:
                case _Step.ASK:
                    state.ask(i)
                case _Step.LEAVE:
                    state.leave(i)
                case _Step.TAKE:
                    if not state.take(i):
                        assert state.moved_for is not None  # else `_overlap` had found it
                        return at, state.moved_for
                    if self.requests[i].left <= _end(self.requests[i].op):
                        state.leave(i)
                case _Step.REFUSE:
                    if state.unexplained.has(i):
                        return at, i
                case _Step.GONE:
                    state.gone(i)
            at += 1
        return at, None

    def _reasons(self, busy: Op) -> list[_Request]:
        """Whatever might be the reason of a busy trylock, in some order."""
        met = [
            r
            for r in self.requests
            if r.op.outcome != "busy" and r.op.invoked <= _end(busy) and busy.invoked <= r.gone
        ]
        behind = any(r.op.owner == busy.owner and r.op.mode is Mode.EX for r in met)
        return [
            r
            for r in met
            if r.op.owner != busy.owner and (behind or not compatible(r.op.mode, busy.mode))
        ]

    def _refuted(self, busy: Op) -> Verdict:
        """The verdict on a busy trylock that has no reason in any order."""
        why = (
            f"{busy.owner}'s {_mode(busy)} trylock from {busy.invoked:.10g} to {_end(busy):.10g} "
            "was answered busy, but "
        )
        near = self._reasons(busy)
        if near:
            names = " or ".join(dict.fromkeys(str(r.op.owner) for r in near[:AROUND]))
            why += f"in no order of the operations did {names} have the lock or wait for it then"
        else:
            why += "nobody else had the lock, waited for it or may have had it in a mode against it"
            near = [
                r
                for r in self.requests
                if r.op.outcome != "busy"
                and r.op.owner != busy.owner
                and not compatible(r.op.mode, busy.mode)
            ]
            near.sort(key=lambda r: max(r.op.invoked - _end(busy), busy.invoked - r.gone))
        around = {busy, *_with_releases(near[:AROUND])}
        return Verdict(False, why, _ordered(around), self.steps, True)


# -- words -------------------------------------------------------------------------------------


def _end(op: Op) -> float:
    return math.inf if op.returned is None else op.returned


def _ordered(ops: Iterable[Op]) -> tuple[Op, ...]:
    return tuple(sorted(ops, key=lambda op: (op.invoked, _end(op))))


def _with_releases(requests: Iterable[_Request]) -> tuple[Op, ...]:
    return _ordered(op for r in requests for op in (r.op, r.release) if op is not None)


def _mode(op: Op) -> str:
    return "exclusive" if op.mode is Mode.EX else "shared"


def _held(r: _Request) -> str:
    until = "the end" if r.left == math.inf else f"it began to release it at {r.left:.10g}"
    return f"{r.op.owner} had the lock {_mode(r.op)} from {_end(r.op):.10g} until {until}"
