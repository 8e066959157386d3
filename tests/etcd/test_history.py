"""The reader of histories finds what it is there to find."""

from __future__ import annotations

import pytest

from tests.etcd.history import Attempt, History, Reading, faults


def attempt(number: int, count: int, **more: object) -> Attempt:
    """The attempt `number`, at that time, in a history where all goes well."""
    facts: dict[str, object] = {
        "token": number,
        "after": number - 1,
        "granted": float(number),
        "written": number + 0.2,
        "used": number + 0.5,
        "found": number,
    }
    return Attempt(f"w{number}", number, count=count, **(facts | more))  # type: ignore[arg-type]


def judge(*attempts: Attempt, readings: tuple[Reading, ...] = (), **more: object) -> list[str]:
    last = attempts[-1]
    facts: dict[str, object] = {
        "accepted": [(a.token, a.count) for a in attempts if a.written],
        "final": (last.count, last.number),
    }
    history = History({a.number: a for a in attempts}, list(readings))
    return faults(history, **(facts | more))  # type: ignore[arg-type]


def test_a_good_history() -> None:
    reading = Reading("r", 2.6, 2.7, 2, 2)
    assert judge(*(attempt(n, n) for n in range(1, 5)), readings=(reading,)) == []


def test_an_unknown_write_may_have_happened_or_not() -> None:
    unknown = attempt(2, 2, written=None, used=None, found=None)
    assert judge(attempt(1, 1), unknown, attempt(3, 3)) == []
    assert judge(attempt(1, 1), unknown, attempt(3, 2, after=1)) == []


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ({"third": attempt(3, 2, after=1)}, "acknowledged 2 times"),
        ({"final": (2, 2)}, "count 3 was acknowledged, but the value ends at 2"),
        ({"final": (3, 7)}, "nobody wrote count 3"),
        ({"third": attempt(3, 3, found=2)}, "another's count in its place"),
        ({"third": attempt(3, 3, token=1)}, "has token 1"),
        ({"third": attempt(3, 3, granted=2.4)}, "w3 was granted the lock while w2 used it"),
        ({"accepted": [(1, 1), (3, 3), (3, 2)]}, "the register took count 2 after 3"),
        ({"readings": (Reading("r", 2.4, 2.45, 2, 2),)}, "r read while w2 had the lock"),
        ({"readings": (Reading("r", 3.6, 3.7, 2, 2),)}, "r found count 2 after 3"),
        ({"readings": (Reading("r", 3.6, 3.7, 3, 9),)}, "which nobody wrote"),
    ],
)
def test_what_must_not_be(what: dict[str, object], found: str) -> None:
    third = what.pop("third", attempt(3, 3))
    assert isinstance(third, Attempt)
    said = judge(attempt(1, 1), attempt(2, 2), third, **what)  # type: ignore[arg-type]
    assert any(found in one for one in said), said
