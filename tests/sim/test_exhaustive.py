"""The exhaustive small-scope check: what it proves, and that it would find what is broken.

Each trap of the protocol is put back into the real engine, and the checker must tell how it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Final

import pytest

from dlmfs.core.events import Claim
from dlmfs.core.lockres import Lockres
from dlmfs.engine import changes, leaving, queue
from dlmfs.engine import view as views
from dlmfs.engine.changes import Change
from dlmfs.engine.lock import ClusterLock, Done
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.records import Wish
from dlmfs.engine.sender import Part, Sender
from dlmfs.engine.view import View
from dlmfs.errors import DlmfsError, OutcomeUnknown
from dlmfs.model import HolderRule
from dlmfs.sim.exhaustive.check import SCOPES, Limit, check, fingerprint
from dlmfs.sim.exhaustive.choices import Explorer
from dlmfs.sim.exhaustive.snapshot import BASE, freeze, shape, thaw
from dlmfs.sim.exhaustive.world import Scope
from dlmfs.store.base import Compare, Txn, TxnDone, TxnResult

QUICK: Final = [scope for scope in SCOPES if scope.quick]
ENOUGH: Final = Limit(seconds=100.0)


def scope_named(name: str) -> Scope:
    return next(scope for scope in SCOPES if scope.name == name)


# -- what holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", QUICK, ids=lambda scope: str(scope.name))
def test_every_interleaving_of_a_quick_scope_keeps_the_promises(scope: Scope) -> None:
    result = check(scope, ENOUGH)
    assert result.violation is None, str(result.violation)
    assert result.complete


def test_an_end_before_all_is_seen_is_no_proof() -> None:
    result = check(scope_named("lost answers"), Limit(states=100))
    assert not result.complete
    assert result.violation is None


def test_scopes_have_names_of_their_own() -> None:
    assert len({scope.name for scope in SCOPES}) == len(SCOPES)


# -- that it would find what is broken ----------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def without_guard(keep: Callable[[int, Compare], bool]) -> Break:
    """The compares of rule 5 but for some, each given with its place."""
    real = changes._guards

    def guards(view: View, granted: list[Wish]) -> tuple[Compare, ...]:
        return tuple(c for i, c in enumerate(real(view, granted)) if keep(i, c))

    return lambda patch: patch.setattr(changes, "_guards", guards)


def unknown_is_failed(patch: pytest.MonkeyPatch) -> None:
    """Trap 1: a time-out is taken for "not applied"; the program does not hear of it."""
    real = Sender._take_in

    def take_in(self: Sender, parts: list[Part], result: TxnResult | DlmfsError) -> None:
        if isinstance(result, OutcomeUnknown):
            for part in parts:
                part.lock.resume()
        else:
            real(self, parts, result)

    patch.setattr(Sender, "_take_in", take_in)


def no_epoch(patch: pytest.MonkeyPatch) -> None:
    """Trap 1: what was lost is read anew, but may still apply later."""

    def revive(self: Lockspace) -> None:
        for lock in list(self.locks.values()):
            lock.resume()

    patch.setattr(Lockspace, "revive", revive)


def one_compare_list(patch: pytest.MonkeyPatch) -> None:
    """Trap 7: the guard and the choice in one list, so `otherwise` runs under an old epoch, too."""
    real = Lockspace.commit

    def wrapped(done: TxnDone, result: TxnResult | DlmfsError) -> None:
        if isinstance(result, TxnResult):
            result = TxnResult(True, result.revision, (result,))
        done(result)

    def commit(self: Lockspace, txn: Txn, done: TxnDone) -> None:
        if len(txn.then) == 1 and isinstance(inner := txn.then[0], Txn):
            txn = Txn(txn.compares + inner.compares, inner.then, inner.otherwise)
            done = partial(wrapped, done)
        real(self, txn, done)

    patch.setattr(Lockspace, "commit", commit)


def deaf_waiter(patch: pytest.MonkeyPatch) -> None:
    """Trap 2: once it waits, a waiter waits for mail alone."""
    real = ClusterLock._ask

    def ask(self: ClusterLock) -> None:
        if not self.local.told:
            real(self)

    patch.setattr(ClusterLock, "_ask", ask)


def conversions_in_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    """Trap 4."""

    def ordered(wishes: Iterable[Wish]) -> list[Wish]:
        return sorted(wishes, key=lambda w: w.revision)

    patch.setattr(queue, "ordered", ordered)
    patch.setattr(views, "ordered", ordered)


def old_answers(patch: pytest.MonkeyPatch) -> None:
    """Trap 8: whatever was read last is believed."""
    real = View.adopt

    def adopt(self: View, result: TxnResult, *, asking: bool) -> None:
        space, told = self.space, self.space.revision
        self.head_at, self.wishes_at, space.revision = -1, 0, 0
        real(self, result, asking=asking)
        space.revision = told

    patch.setattr(View, "adopt", adopt)


def only_the_dead_are_left(patch: pytest.MonkeyPatch) -> None:
    """Trap 9: an unlink that does not ask whether the others still live."""
    real = changes.leave

    def leave(view: View) -> Change:
        change = real(view)
        guards = changes._guards(view, change.granted)
        return change._replace(txn=change.txn._replace(compares=guards))

    patch.setattr(changes, "leave", leave)


def leave_with_levels(patch: pytest.MonkeyPatch) -> None:
    """Trap 12: a clean leave that gives nothing back."""
    patch.setattr(leaving, "leave", leaving._look)


def own_dead_self_kept(patch: pytest.MonkeyPatch) -> None:
    """A node that is back writes its place over that of its dead self (rule 14)."""
    real = View.is_dead

    def is_dead(self: View, node: str, incarnation: int) -> bool:
        return node != self.space.node and real(self, node, incarnation)

    patch.setattr(View, "is_dead", is_dead)


def silent_to_trylocks(patch: pytest.MonkeyPatch) -> None:
    """Promise 6: a holder in use that refuses no trylock."""

    def refuse(self: ClusterLock) -> None:
        self.local.refuse_try = False
        self._step()

    patch.setattr(ClusterLock, "_refuse_trylocks", refuse)


def no_notice(patch: pytest.MonkeyPatch) -> None:
    """Holders are not told that somebody waits."""
    patch.setattr(Lockres, "contended", property(lambda _self: False))


def waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Nobody gives an idle lock away: the plainest lost wake-up."""

    def give_up(_self: Lockres) -> bool:
        return False

    patch.setattr(Lockres, "_give_up", give_up)


def one_token_for_all(patch: pytest.MonkeyPatch) -> None:
    """Trap 11: under holder=file a local grant has no number of its own."""
    real = Lockres._hold

    def hold(self: Lockres, claim: Claim) -> None:
        self._counter, self._last_exclusive = -1, True
        real(self, claim)

    patch.setattr(Lockres, "_hold", hold)


def answered_before_durable(patch: pytest.MonkeyPatch) -> None:
    """Promise 4: a write that returns before its commit."""
    real = ClusterLock.write_lvb

    def write(self: ClusterLock, offset: int, data: bytes, done: Done) -> None:
        done(None)
        real(self, offset, data, lambda _error: None)

    patch.setattr(ClusterLock, "write_lvb", write)


TWO: Final = (("ex close",), ("ex close",))
TRAPS: Final[list[tuple[str, Break, Scope, str]]] = [
    (
        "no range compare",
        without_guard(lambda _, c: not c.prefix),
        Scope("", (("pr ex close close",), ("pr close",))),
        "whose wish stands before it",
    ),
    (
        "grant without wish compare",
        without_guard(lambda i, _: i < 2),
        Scope("", (("ex close",), ("ex? close",))),
        "does not wish for it",
    ),
    (
        "plain write without compare",
        without_guard(lambda i, _: i > 0),
        Scope("", (("ex put close",), ("ex put close",))),
        "exclude each other",
    ),
    ("unknown as failed", unknown_is_failed, Scope("", TWO, losses=1), ""),
    ("no epoch", no_epoch, Scope("", TWO, losses=1, before=((0, 0),)), "stays in the store"),
    (
        "one compare list",
        one_compare_list,
        Scope("", TWO, losses=1, before=((0, 0),), faulty=(1,)),
        "stays in the store",
    ),
    (
        "waiter that never acts",
        deaf_waiter,
        Scope("", (("pr close",), ("ex? close",), ("pr close",)), before=((0, 0), (1, 0))),
        "waits for ever",
    ),
    (
        "conversions in order of arrival",
        conversions_in_order_of_arrival,
        Scope("", (("pr ex close close",), ("ex close",))),
        "waits for ever",
    ),
    (
        "old answers",
        old_answers,
        Scope("", (("ex close", "ex close"), ("ex close", "ex close")), before=((0, 0),)),
        "does not hear",
    ),
    (
        "only the dead are left",
        only_the_dead_are_left,
        Scope("", (("ex close unlink",), ("pr close",)), deaths=1, faulty=(1,)),
        "to the dead alone",
    ),
    (
        "leave with levels",
        leave_with_levels,
        Scope("", (("ex close leave",), ("pr close",))),
        "looks like a death",
    ),
    (
        "own dead self kept",
        own_dead_self_kept,
        Scope("", (("ex close", "pr close"), ("ex close",)), deaths=1, rejoins=1, faulty=(0,)),
        "waits for ever",
    ),
    (
        "silent to trylocks",
        silent_to_trylocks,
        Scope("", (("try-ex close",), ("ex close",))),
        "waits for a user",
    ),
    (
        "one token for all",
        one_token_for_all,
        Scope("", (("ex close", "ex close"), ("pr close",)), rule=HolderRule.FILE),
        "has token",
    ),
    (
        "answered before durable",
        answered_before_durable,
        Scope("", (("ex put close",), ("pr get close",))),
        "nobody committed",
    ),
    ("no notice", no_notice, Scope("", TWO), "does not hear"),
    ("nothing is given away", waits_for_ever, Scope("", TWO), "waits for ever"),
]


@pytest.mark.parametrize(
    ("break_it", "scope", "says"), [it[1:] for it in TRAPS], ids=[it[0] for it in TRAPS]
)
def test_a_trap_put_back_is_found(
    break_it: Break, scope: Scope, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    result = check(scope, ENOUGH)
    assert result.violation is not None
    assert says in result.violation.problem
    assert not result.complete


def test_a_violation_is_told_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    silent_to_trylocks(monkeypatch)
    violation = check(Scope("", (("try-ex close",), ("ex close",)))).violation
    assert violation is not None
    told = str(violation)
    assert told.startswith("  1. n0: program 0: try-ex a")
    assert "store: applies n1's transaction" in told
    assert told.endswith(f"==> {violation.problem}")
    assert len(violation.choices) == sum(line.lstrip()[:1].isdigit() for line in violation.story)


# -- that it explores the real thing --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lost answers", "a node returns", "leave", "gap in the watch", "two locks"]
)
def test_copies_behave_as_the_objects_they_were_made_of(name: str) -> None:
    """The same choices, once on thawed copies and once on objects never copied."""
    scope = scope_named(name)
    rng = Random(name)
    copied = Explorer(scope)
    for _ in range(20):
        real = Explorer(scope, copying=False, names=copied.names)
        a, b = copied.start(), real.start()
        while choices := copied.choices(a):
            assert choices == real.choices(b)
            choice = rng.choice(choices)
            a, b = copied.take(a, choice).world, real.take(b, choice).world
            assert fingerprint(copied, a) == fingerprint(real, b)


def test_a_copy_shares_nothing_with_its_original() -> None:
    count, calls = 0, [print]

    def grow() -> int:
        nonlocal count
        count += 1
        return count

    def shrink() -> int:
        nonlocal count
        count -= 1
        return count

    pair = [grow, shrink, partial(grow), calls]
    first, second = thaw(freeze(pair)), thaw(freeze(pair))
    assert [first[0](), first[2](), first[1]()] == [1, 2, 1]
    assert second[0]() == 1
    assert count == 0
    assert first[3] is not calls


def test_a_shape_tells_apart_what_is_not_alike() -> None:
    def call(argument: object) -> Callable[[], object]:
        return lambda: argument

    assert shape(call(1)) == shape(thaw(freeze(call(1))))
    assert shape(call(1)) != shape(call(2))
    assert shape(partial(print, 1)) != shape(partial(print, 2))
    assert shape(True) != shape(1)
    both: list[object] = [[]]
    assert shape([both, both]) != shape([[[]], [[]]])
    assert shape(BASE + 1) != shape(BASE + 2)
    assert shape(BASE + 1).atoms == shape(BASE + 2).atoms
