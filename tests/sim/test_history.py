"""The judge of lock histories: each rule both ways, then against a correct lock and a slow judge."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dlmfs.model import Mode
from dlmfs.sim.history import Op, Verdict, judge

from .locks import Plan, history, possible

PR, EX = Mode.PR, Mode.EX
Outcome = Literal["ok", "busy", "failed", "unknown"]


def acquire(
    owner: str,
    mode: Mode,
    invoked: float,
    returned: float | None,
    outcome: Outcome = "ok",
    *,
    hold: int = 0,
    place: float = 0,
) -> Op:
    return Op(1, owner, "acquire", mode, invoked, returned, outcome, hold, place)


def attempt(owner: str, mode: Mode, invoked: float, *rest: Any, hold: int = 0) -> Op:
    """`rest`: returned, and the outcome if it is not ok."""
    returned, outcome = [*rest, "ok"][:2]
    return Op(1, owner, "try", mode, invoked, returned, outcome, hold)


def release(
    owner: str, invoked: float, returned: float | None, outcome: Outcome = "ok", *, hold: int = 0
) -> Op:
    return Op(1, owner, "release", EX, invoked, returned, outcome, hold)


A_HOLDS_3_TO_7 = [acquire("a", EX, 1, 3), release("a", 7, 9)]
A_SHARES_3_TO_7 = [acquire("a", PR, 1, 3), release("a", 7, 9)]

POSSIBLE = {
    "nothing": [],
    "shared with shared": [*A_SHARES_3_TO_7, acquire("b", PR, 4, 5, hold=1)],
    "in turn": [*A_HOLDS_3_TO_7, acquire("b", EX, 4, 8, hold=1)],
    "a tie": [*A_HOLDS_3_TO_7, acquire("b", EX, 4, 7, hold=1)],
    "a tie of three": [
        acquire("a", EX, 0, 5),
        release("a", 5, 6),
        acquire("b", EX, 0, 5, hold=1),
        release("b", 5, 6, hold=1),
        acquire("c", EX, 0, 5, hold=2),
    ],
    "converted": [
        acquire("a", PR, 0, 1),
        acquire("a", EX, 2, 3, hold=1),
        release("a", 4, 5, hold=1),
        acquire("b", PR, 4, 6, hold=2),
    ],
    "failed takes no effect": [*A_HOLDS_3_TO_7, acquire("b", EX, 4, 5, "failed", hold=1)],
    "unknown may never take effect": [
        *A_HOLDS_3_TO_7,
        acquire("b", EX, 4, None, "unknown", hold=1),
    ],
    "a release in its time": [*A_HOLDS_3_TO_7, acquire("b", EX, 8, 9, hold=1)],
    "implied release": [
        acquire("a", EX, 1, 3),
        release("a", 7, None),
        acquire("b", EX, 90, 91, hold=1),
    ],
    "lost before it returned": [
        acquire("a", EX, 0, 9),
        release("a", 4, None),
        acquire("b", EX, 5, 6, hold=1),
    ],
    "a release that failed is none": [
        acquire("a", EX, 1, 3),
        release("a", 4, 5, "failed"),
        release("a", 6, 7),
        acquire("b", EX, 5, 6, hold=1),
    ],
    "busy: held": [*A_HOLDS_3_TO_7, attempt("b", PR, 4, 5, "busy", hold=1)],
    "busy: being released": [*A_HOLDS_3_TO_7, attempt("b", PR, 8, 9, "busy", hold=1)],
    "busy: a release nobody answered": [
        acquire("a", EX, 1, 3),
        release("a", 7, None),
        attempt("b", PR, 90, 91, "busy", hold=1),
    ],
    "busy: a release of unknown outcome": [
        acquire("a", EX, 1, 3),
        release("a", 7, 8, "unknown"),
        attempt("b", PR, 90, 91, "busy", hold=1),
    ],
    "busy: somebody waits": [
        *A_SHARES_3_TO_7,
        acquire("b", EX, 4, 8, hold=1),
        attempt("c", PR, 5, 6, "busy", hold=2),
    ],
    "busy: somebody waits in vain": [
        *A_SHARES_3_TO_7,
        acquire("b", EX, 4, 6, "failed", hold=1),
        attempt("c", PR, 6, 7, "busy", hold=2),
    ],
    "busy: a kept place": [
        acquire("b", EX, 4, 6, "failed", hold=1, place=1),
        attempt("c", PR, 7, 8, "busy", hold=2),
    ],
    "busy: somebody may have it": [
        acquire("b", EX, 4, 6, "unknown"),
        attempt("c", PR, 90, 91, "busy", hold=2),
    ],
    "busy: a try may have it": [
        attempt("b", EX, 4, None, "unknown"),
        attempt("c", PR, 90, 91, "busy", hold=2),
    ],
    "busy: a try at the same time": [
        attempt("a", EX, 0, 9),
        attempt("b", PR, 1, 2, "busy", hold=1),
    ],
    "busy: which of two tries was it": [
        # b's own does not explain it, a's does; and one is moved for each of two.
        attempt("b", PR, 0, 8, hold=1),
        attempt("a", PR, 0, 9, hold=2),
        attempt("b", EX, 1, 2, "busy", hold=3),
        attempt("a", EX, 3, 4, "busy", hold=4),
    ],
    "busy: behind its own owner's EX": [
        *A_SHARES_3_TO_7,
        acquire("b", EX, 4, 8, hold=1),
        attempt("b", PR, 5, 6, "busy", hold=2),
    ],
    "failed try says nothing": [attempt("b", PR, 5, 6, "failed")],
}

IMPOSSIBLE = {
    "exclusive in exclusive": [*A_HOLDS_3_TO_7, acquire("b", EX, 4, 5, hold=1)],
    "shared in exclusive": [*A_HOLDS_3_TO_7, acquire("b", PR, 4, 5, hold=1)],
    "exclusive in shared": [*A_SHARES_3_TO_7, acquire("b", EX, 4, 6, hold=1)],
    "a try in a hold": [*A_HOLDS_3_TO_7, attempt("b", PR, 4, 5, hold=1)],
    "for an instant": [
        *A_HOLDS_3_TO_7,
        acquire("b", PR, 4, 5, hold=1),
        release("b", 5, 5, hold=1),
    ],
    "never released": [acquire("a", EX, 1, 3), acquire("b", EX, 90, 91, hold=1)],
    "a release that failed": [
        acquire("a", EX, 1, 3),
        release("a", 4, 5, "failed"),
        acquire("b", EX, 5, 6, hold=1),
    ],
    "converted beside another": [
        acquire("a", PR, 0, 1),
        acquire("b", PR, 0, 1, hold=1),
        acquire("a", EX, 2, 3, hold=2),
    ],
    "converted, and another got in": [
        acquire("a", PR, 0, 1),
        acquire("a", EX, 2, 3, hold=1),
        acquire("b", PR, 4, 6, hold=2),
        release("a", 7, 8, hold=1),
    ],
    "busy: nobody": [attempt("b", PR, 4, 5, "busy")],
    "busy: merely cached": [*A_HOLDS_3_TO_7, attempt("b", PR, 10, 11, "busy", hold=1)],
    "busy: too early": [*A_HOLDS_3_TO_7, attempt("b", PR, 0, 0.5, "busy", hold=1)],
    "busy: compatible": [*A_SHARES_3_TO_7, attempt("b", PR, 4, 5, "busy", hold=1)],
    "busy: its own owner": [*A_HOLDS_3_TO_7, attempt("a", EX, 4, 5, "busy", hold=1)],
    "busy: a shared wait": [
        *A_SHARES_3_TO_7,
        acquire("b", PR, 4, 8, hold=1),
        attempt("c", PR, 5, 6, "busy", hold=2),
    ],
    "busy: waited in vain before": [
        acquire("b", EX, 4, 5, "failed", hold=1, place=0.5),
        attempt("c", PR, 6, 7, "busy", hold=2),
    ],
    "busy: it was a refused or failed try": [
        attempt("a", EX, 4, 9, "failed"),
        *[attempt(o, EX, 4, 9, "busy") for o in "bc"],
    ],
    "busy: the unknown was released": [
        acquire("b", EX, 4, None, "unknown"),
        release("b", 5, 6),
        attempt("c", PR, 7, 8, "busy", hold=2),
    ],
    "busy: somebody else got it since": [
        # a's release is unanswered, but b had the lock shared after it.
        acquire("a", EX, 1, 3),
        release("a", 4, None),
        acquire("b", PR, 4, 5, hold=1),
        attempt("c", PR, 6, 7, "busy", hold=2),
    ],
    "busy: the try came after another's hold": [
        # a's try could explain it only before d's hold, which excludes it.
        attempt("a", EX, 0, 9),
        attempt("b", PR, 1, 2, "busy", hold=1),
        acquire("d", PR, 3, 4, hold=2),
        release("d", 5, 6, hold=2),
    ],
    "busy: a try that came meanwhile, and another's hold after it": [
        attempt("a", EX, 1.5, 9),
        attempt("b", PR, 1, 2, "busy", hold=1),
        acquire("d", PR, 3, 4, hold=2),
        release("d", 5, 6, hold=2),
    ],
    "busy: behind its own owner's EX, and nobody else": [
        acquire("b", EX, 4, 8, hold=1),
        attempt("b", PR, 5, 6, "busy", hold=2),
    ],
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible(name: str) -> None:
    for ops in (POSSIBLE[name], POSSIBLE[name][::-1]):
        verdict = judge(ops)
        assert verdict.ok, verdict.why
        assert verdict.complete
        assert not verdict.why
        assert not verdict.around


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible(name: str) -> None:
    for ops in (IMPOSSIBLE[name], IMPOSSIBLE[name][::-1]):
        verdict = judge(ops)
        assert not verdict.ok
        assert verdict.complete
        assert verdict.why
        assert set(verdict.around) <= set(ops)


NOT_A_LOCKS = {
    "returned before": [acquire("a", EX, 3, 2)],
    "ok and never returned": [acquire("a", EX, 3, None)],
    "failed and never returned": [acquire("a", EX, 3, None, "failed")],
    "a busy acquire": [acquire("a", EX, 3, 4, "busy")],
    "no mode": [acquire("a", Mode.NL, 3, 4)],
    "a negative place": [acquire("a", EX, 3, 4, "failed", place=-1)],
    "released by another": [acquire("a", EX, 3, 4), release("b", 5, 6)],
    "released twice": [*A_HOLDS_3_TO_7, release("a", 8, 9)],
    "released before": [acquire("a", EX, 3, 4), release("a", 2, 6)],
    "released by nobody's acquire": [release("a", 2, 6)],
    "a busy try's hold": [attempt("a", EX, 3, 4, "busy"), release("a", 5, 6)],
    "one number for two": [acquire("a", EX, 1, 2), acquire("a", EX, 3, 4), release("a", 8, 9)],
}


@pytest.mark.parametrize("name", NOT_A_LOCKS)
def test_what_is_no_history(name: str) -> None:
    with pytest.raises(ValueError, match=r"hold|operation|releases"):
        judge(NOT_A_LOCKS[name])


# -- what a reader is told ---------------------------------------------------------------------


def test_an_overlap_is_told_as_a_sentence() -> None:
    ops = [*A_HOLDS_3_TO_7, acquire("b", PR, 4, 5, hold=1), acquire("c", PR, 20, 21, hold=2)]
    verdict = judge(ops)
    assert verdict.why == (
        "a had the lock exclusive from 3 until it began to release it at 7, and "
        "b had the lock shared from 5 until the end: they exclude each other"
    )
    assert verdict.around == (ops[0], ops[2], ops[1])


def test_a_busy_without_a_reason_is_told_with_its_neighbours() -> None:
    ops = [*A_HOLDS_3_TO_7, attempt("b", PR, 10, 11, "busy", hold=1)]
    verdict = judge(ops)
    assert verdict.why == (
        "b's shared trylock from 10 to 11 was answered busy, but nobody else had the lock, "
        "waited for it or may have had it in a mode against it"
    )
    assert verdict.around == tuple(ops)


def test_a_reason_that_fits_no_order_is_named() -> None:
    ops = IMPOSSIBLE["busy: somebody else got it since"]
    verdict = judge(ops)
    assert verdict.why == (
        "c's shared trylock from 6 to 7 was answered busy, but in no order of the operations "
        "did a have the lock or wait for it then"
    )
    assert set(verdict.around) == {ops[0], ops[1], ops[3]}


def test_a_moved_trylock_that_fails_later_is_told_of_the_busy_one() -> None:
    verdict = judge(IMPOSSIBLE["busy: the try came after another's hold"])
    assert verdict.why.startswith("b's shared trylock from 1 to 2 was answered busy")


# -- many --------------------------------------------------------------------------------------

PLANS = st.builds(
    Plan,
    clients=st.integers(1, 12),
    owners=st.integers(1, 12),
    operations=st.integers(1, 80),
    shared=st.sampled_from([0, 0.3, 0.7, 1]),
    trying=st.sampled_from([0, 0.3, 0.9]),
    interrupted=st.sampled_from([0, 0.4]),
    lost=st.sampled_from([0, 0.05, 0.4]),
    unanswered=st.sampled_from([0, 0.4]),
    think=st.integers(0, 8),
    delay=st.integers(0, 8),
)
SEEDS = st.integers(0, 2**32)


@given(SEEDS, PLANS)
@settings(max_examples=200, deadline=None)
def test_a_correct_lock_is_accepted(seed: int, plan: Plan) -> None:
    verdict = judge(history(seed, plan))
    assert verdict.ok, verdict.why
    assert verdict.complete


def _holds(ops: list[Op]) -> list[tuple[Op, float]]:
    """What was held for certain, and until when."""
    until = {op.hold: op.invoked for op in ops if op.kind == "release"}
    return [
        (op, until.get(op.hold, (op.returned or 0) + 10))
        for op in ops
        if op.kind != "release" and op.outcome == "ok"
    ]


@given(SEEDS, PLANS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_stranger_in_a_hold_is_found(seed: int, plan: Plan, data: st.DataObject) -> None:
    ops = history(seed, plan)
    holds = [(op, end) for op, end in _holds(ops) if (op.returned or 0) < end]
    assume(holds)
    op, end = data.draw(st.sampled_from(holds))
    assert op.returned is not None
    middle = (op.returned + end) / 2
    mode = data.draw(st.sampled_from([PR, EX])) if op.mode is EX else EX
    stranger = acquire("stranger", mode, op.returned, middle, hold=-1)
    verdict = judge([*ops, stranger, release("stranger", middle, end + 5, hold=-1)])
    assert not verdict.ok
    assert stranger in verdict.around
    assert any(hold in verdict.around for hold, _ in holds)


@given(SEEDS, PLANS, st.data())
@settings(max_examples=100, deadline=None)
def test_an_answer_too_early_is_found(seed: int, plan: Plan, data: st.DataObject) -> None:
    """Two that took turns: the later one is told that it has the lock while the earlier one does."""
    ops = history(seed, plan)
    turns = [
        (early, late)
        for (early, end), (late, _) in itertools.permutations(_holds(ops), 2)
        if early.owner != late.owner
        and EX in (early.mode, late.mode)
        and early.returned is not None
        and max(early.returned, late.invoked) + 1 < end <= (late.returned or 0)
    ]
    assume(turns)
    early, late = data.draw(st.sampled_from(turns))
    assert early.returned is not None
    told = late._replace(returned=max(early.returned, late.invoked) + 0.5)
    assert not judge([told if op is late else op for op in ops]).ok


@given(SEEDS, PLANS)
@settings(max_examples=50, deadline=None)
def test_a_busy_before_everything_is_found(seed: int, plan: Plan) -> None:
    refused = attempt("stranger", EX, -2, -1, "busy", hold=-1)
    verdict = judge([*history(seed, plan), refused])
    assert not verdict.ok
    assert refused in verdict.around


@st.composite
def _small(draw: st.DrawFn) -> list[Op]:
    """Up to six requests with any answers, at whole-numbered times."""
    ops: list[Op] = []
    few, some = st.integers(0, 3), st.integers(0, 6)
    for hold in range(draw(st.integers(1, 6))):
        owner, mode = draw(st.sampled_from("abc")), draw(st.sampled_from([EX, PR]))
        kind: Any = draw(st.sampled_from(["acquire", "try"]))
        outcomes = ["ok", "ok", "failed", "unknown", *["busy", "busy"] * (kind == "try")]
        outcome: Any = draw(st.sampled_from(outcomes))
        invoked = draw(some)
        returned: int | None = invoked + draw(some)
        place = draw(st.sampled_from([0, 2])) if outcome == "failed" else 0
        since = returned if outcome == "ok" else invoked
        if outcome == "unknown" and draw(st.booleans()):
            returned = None
        ops.append(Op(hold, owner, kind, mode, invoked, returned, outcome, hold, place))
        if outcome in ("ok", "unknown") and draw(st.booleans()):
            assert since is not None
            left = since + draw(few)
            answered = draw(st.sampled_from([left, left + 2, None]))
            said: Outcome = "ok" if answered is not None and draw(st.booleans()) else "unknown"
            ops.append(Op(hold, owner, "release", mode, left, answered, said, hold))
    return ops


@given(_small())
@example(
    [  # the reason is gone before the busy trylock returns, and with it what it stood behind
        acquire("a", EX, 0, 1),
        release("a", 2, 2),
        acquire("c", EX, 2, 3, "failed", hold=1),
        attempt("b", PR, 3, 8, hold=2),
        attempt("c", PR, 3, 8, "busy", hold=3),
    ]
)
@settings(max_examples=600, deadline=None)
def test_every_order_tried_says_the_same(ops: list[Op]) -> None:
    instants = {op.hold: op.returned for op in ops if op.kind != "release" and op.outcome == "ok"}
    ties = [
        op.invoked for op in ops if op.kind == "release" and instants.get(op.hold) == op.invoked
    ]
    assume(len(ties) == len(set(ties)))  # the tie that is decided, not searched
    verdict = judge(ops)
    assert verdict.complete
    assert verdict.ok == possible(ops), verdict.why


# -- how long it takes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan(operations=1100, clients=30, owners=30, trying=0, shared=0.2),
        Plan(operations=1100, clients=30, owners=5, trying=0.5),
        Plan(operations=1400, clients=30, owners=30, lost=0.5, unanswered=0.5),
        Plan(operations=1400, clients=100, owners=100, lost=0.3, unanswered=0.5, shared=1),
    ],
    ids=["waiters", "nodes", "unknown", "shared"],
)
def test_long_histories_take_few_steps(plan: Plan) -> None:
    ops = history(7, plan)
    assert len(ops) > 1500
    verdict = judge(ops)
    assert verdict.ok, verdict.why
    assert verdict.complete
    assert verdict.steps < 3 * len(ops)


def _rounds(owners: int) -> list[Op]:
    """In each round several trylocks could explain a busy one."""
    ops = []
    for t, owner in itertools.product(range(0, 15_000, 100), range(owners)):
        hold = t + owner
        ops += [
            attempt(f"o{owner}", PR, t, t + 50, hold=hold),
            release(f"o{owner}", t + 60, t + 61, hold=hold),
        ]
        if not owner:
            ops.append(attempt("x", EX, t + 1, t + 2, "busy", hold=-t))
    return ops


def test_choices_do_not_multiply() -> None:
    ops = _rounds(5)
    # The end is impossible whatever was chosen before, but only a search can tell.
    end = [
        acquire("a", EX, 20_000, 20_001, hold=-1),
        release("a", 20_002, None, hold=-1),
        acquire("b", PR, 20_002, 20_003, hold=-2),
        attempt("c", PR, 20_004, 20_005, "busy", hold=-3),
    ]
    verdict = judge([*ops, *end])
    assert not verdict.ok
    assert verdict.why.startswith("c's shared trylock from 20004")
    assert verdict.steps < 50 * len(ops)


def test_what_nobody_can_explain_is_not_searched_for() -> None:
    ops = [attempt(f"o{i}", PR, i, 100, hold=i) for i in range(30)]
    ops += [attempt(f"o{i}", EX, 50 + i, 51 + i, "busy", hold=-i) for i in range(30)]
    verdict = judge([*ops, attempt("x", EX, -2, -1, "busy"), attempt("x", EX, 40, 41, "busy")])
    assert verdict.why.startswith("x's exclusive trylock from -2 to -1")
    assert verdict.steps < 5 * len(ops)
    late = [release(f"o{i}", 200, 201, hold=i) for i in range(30)]
    verdict = judge([*ops, *late, attempt("x", EX, 300, 301, "busy")])
    assert verdict.why.startswith("x's exclusive trylock from 300")
    assert verdict.steps < 5 * len(ops)


def test_beyond_its_budget_it_claims_nothing() -> None:
    assert judge(IMPOSSIBLE["busy: nobody"], budget=1) == Verdict(
        True, "the budget ran out: nothing is claimed", (), 1, False
    )
