"""What the answers of a daemon look like, and whether one does: the one place that looks.

An answer may come from another version, or from a program that another user put in a daemon's place.
What has passed here can be shown by every command without a further question; fields that are not named
here are left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from dlmfs.model import LVB_SIZE

NUMBER_MAX: Final = 1 << 64

Facts = dict[str, Any]
Shape = Any
"""str, int, float or bool; a set of words; a predicate; Maybe, Each, Named; or a dict of fields, where a
name that ends in "?" may be missing."""


class Maybe(NamedTuple):
    """None, or of that shape."""

    shape: Shape


class Each(NamedTuple):
    """A list of such, of at most `most`."""

    shape: Shape
    most: int = 100_000


class Named(NamedTuple):
    """A dict from any name to such, of at most `most`."""

    shape: Shape
    most: int = 100_000


def misfit(value: object, shape: Shape, where: str = "it") -> str | None:
    """Where a value is not of a shape; None if it is."""
    if isinstance(shape, Maybe):
        return None if value is None else misfit(value, shape.shape, where)
    if isinstance(shape, dict):
        return _misfit_fields(value, shape, where)
    if isinstance(shape, Each):
        if not isinstance(value, list) or len(value) > shape.most:
            return where
        return _first(misfit(each, shape.shape, f"{where}[{i}]") for i, each in enumerate(value))
    if isinstance(shape, Named):
        if not isinstance(value, dict) or len(value) > shape.most:
            return where
        return _first(misfit(each, shape.shape, f"{where}[...]") for each in value.values())
    return None if _is_plain(value, shape) else where


def _first(found: Any) -> str | None:
    return next((each for each in found if each is not None), None)


def _misfit_fields(value: object, shape: Facts, where: str) -> str | None:
    if not isinstance(value, dict):
        return where
    for field, its in shape.items():
        name = field.removesuffix("?")
        if name in value or not field.endswith("?"):
            wrong = f"{where}.{name}"
            found = misfit(value[name], its, wrong) if name in value else wrong
            if found is not None:
                return found
    return None


def _is_plain(value: object, shape: Shape) -> bool:
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if shape is int or shape is float:
        number = isinstance(value, int | (float if shape is float else int))
        return number and not isinstance(value, bool) and _is_sane(value)
    if isinstance(shape, type):
        return isinstance(value, shape)
    return bool(shape(value))


def _is_sane(number: Any) -> bool:
    return (
        math.isfinite(number) and abs(number) < NUMBER_MAX
        if isinstance(number, float)
        else (-NUMBER_MAX < number < NUMBER_MAX)
    )


# -- the answers -----------------------------------------------------------------------------------------


def _is_value(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{2 * LVB_SIZE}}}", value) is not None


LEVEL: Final = {"NL", "PR", "EX"}
MODE: Final = {"PR", "EX"}
MARK: Final = Maybe({"node": str, "token": int})
MEMBER: Final = {"node": str, "level": LEVEL, "token": int, "alive": bool}
WISH: Final = {"node": str, "mode": MODE, "try": bool, "convert": bool}
CLAIM: Final = {"mode": MODE, "pid": int, "command": str, "since_s": float, "token": Maybe(int)}
BAD: Final = {"bad_records": Each(str), "more_bad_records": int}
FAULT: Final = {"where": str, "what": str, "at": float, "times": int}
STATUS: Final = {
    **BAD,
    "version": str,
    "node": str,
    "pid": int,
    "source": str,
    "mountpoint": str,
    "holder_rule": str,
    "options": Maybe(Each(str)),
    "uptime_s": float,
    "lease": {
        "state": str,
        "reason": Maybe(str),
        "ttl_s": Maybe(float),
        "left_s": Maybe(float),
        "fences": int,
    },
    "ending": Maybe({"phase": str, "reason": str}),
    "faults": {"count": int, "last": Each(FAULT)},
    "log": Maybe({"to": str, "lately": Each({"at": float, "level": str, "message": str})}),
    "watchdog": Maybe({"on_lost": str, "ended": bool, "missing": Each(int)}),
    "store": {
        "sessions?": Each({"node": str, "pid": int, "own": bool, "stopped": bool}),
        "waiting_for_pid?": Maybe(int),
        "path?": str,
        "filesystem?": str,
        "durable?": bool,
        "tokens?": Maybe(str),
        "warning?": Maybe(str),
        "trouble?": Maybe(str),
        "trouble_kind?": Maybe(str),
        "certificates?": Each({"option": str, "begins": float, "ends": float}),
        "lost?": Maybe(str),
        "error?": Maybe(str),
    },
    "domains": Each(
        {
            "name": str,
            "state": str,
            "reason": Maybe(str),
            "members": Each(str),
            "more_members": int,
            **BAD,
            "locks": Each(
                {
                    "name": str,
                    "level": LEVEL,
                    "phase": str,
                    "holders": Each(CLAIM),
                    "more_holders": int,
                    "waiters": Each(CLAIM),
                    "more_waiters": int,
                    "wanted_by": Each({"node": str, "mode": MODE, "try": bool}),
                    "more_wanted_by": int,
                }
            ),
            "count": int,
            "busy": int,
            "hidden": int,
        }
    ),
    "hidden_domains": int,
}
INFO: Final = {
    "domain": str,
    "lock": str,
    "mode": LEVEL,
    "token": Maybe(int),
    "lvb_hex": _is_value,
    "abandoned": MARK,
    "members": Each(MEMBER),
    "waiters": Each(WISH),
    "local_holders": Each(CLAIM),
    "more_local_holders": int,
    "local_waiters": Each(CLAIM),
    "more_local_waiters": int,
}
HINDRANCE: Final = {"state": str, "reason": Maybe(str), "trouble": Maybe(str), "held": bool}
NODES: Final = Each(
    {
        "node": str,
        "own": bool,
        "host": Maybe(str),
        "pid": Maybe(int),
        "mountpoint": Maybe(str),
        "domains": Each(str),
        "more_domains": int,
    }
)
PROCESS: Final = {
    "id": int,
    "mode": MODE,
    "try": bool,
    "since_s": float,
    "thread": int,
    "pid": int,
    "command": str,
    "run": str,
    "gone": bool,
}
"""A claim as `why` and `top` tell it."""
SILENT: Final = {
    "host": Maybe(str),
    "pid": Maybe(int),
    "left_s": Maybe(float),
    "why": str,
    "says": str,
}
ANSWERED: Final = {
    "node": str,
    "version": str,
    "state": str,
    "reason": Maybe(str),
    "holder_rule": str,
    "host": str,
    "place": str,
    "pid": int,
    "mountpoint": str,
}
WAITER: Final = {**PROCESS, "before_others": bool}
WHY: Final = {
    "domain": str,
    "lock": str,
    "node": str,
    "trouble": Maybe(str),
    "refused?": Maybe(str),
    "more": int,
    "hidden": int,
    "nodes": Named({"silent?": SILENT}),
    "locks": Each(
        {
            "domain": str,
            "lock": str,
            "nodes": Each(str),
            "members": Each(MEMBER),
            "queue": Each(WISH),
            "abandoned": MARK,
            "claims": Named(
                {
                    "level": LEVEL,
                    "phase": str,
                    "holders": Each(PROCESS, 64),
                    "more_holders": int,
                    "waiters": Each(WAITER, 64),
                    "more_waiters": int,
                },
                1000,
            ),
        },
        128,
    ),
    "waits": Each(
        {
            "node": str,
            "pid": int,
            "by": {"itself", "inherited", "thread", "child"},
            "domain": str,
            "lock": str,
            "claim": PROCESS,
        }
    ),
}
HEALTH: Final = {
    "version": str,
    "read_ms": Each(float),
    "nodes": Each(
        {
            "node": str,
            "own": bool,
            "host": Maybe(str),
            "pid": Maybe(int),
            "ttl_s": Maybe(float),
            "left_s": Maybe(float),
            "silent": Maybe(SILENT),
            "version?": Maybe(str),
            "state?": Maybe(str),
            "reason?": Maybe(str),
            "holder_rule?": Maybe(str),
        }
    ),
    "evicted": Each(str),
    "bad_records": Each(str),
    "domains": Each(
        {
            "domain": str,
            "nodes": Each(str),
            "more_nodes": int,
            "locks": int,
            "ownerless": Each(str),
            "more_ownerless": int,
            "abandoned": Named(str),
            "more_abandoned": int,
        }
    ),
    "heads": {"all", "own"},
    "heads_max": Maybe(int),
}
TOP: Final = {
    "node": str,
    "mountpoint": str,
    "source": str,
    "holder_rule": str,
    "state": str,
    "reason": Maybe(str),
    "busy": int,
    "hidden": int,
    "locks": Each(
        {
            "domain": str,
            "lock": str,
            "level": LEVEL,
            "holders": int,
            "holder": Maybe(PROCESS),
            "held_by": Each(str),
            "waiters": int,
            "wanted_by": Each(str),
            "longest_s": Maybe(float),
            "grants_per_s": Maybe(float),
        }
    ),
}


def _why(answer: object) -> str | None:
    """Besides: whatever claims are told of was told by a node that is told of."""
    wrong = misfit(answer, WHY)
    if wrong is not None:
        return wrong
    assert isinstance(answer, dict)
    names = {name for lock in answer["locks"] for name in lock["claims"]}
    names |= {row["node"] for row in answer["waits"]}
    return _first(
        misfit(answer["nodes"].get(name), ANSWERED, "it.nodes[...]") for name in sorted(names)
    )


def _health(answer: object) -> str | None:
    if isinstance(answer, dict) and isinstance(answer.get("trouble"), str) and answer["trouble"]:
        return None
    return misfit(answer, {**HEALTH, "trouble": Maybe(str)})


def _of(shape: Shape) -> Callable[[object], str | None]:
    return lambda answer: misfit(answer, shape)


BRIEF: Final = _of(
    {
        **{key: STATUS[key] for key in ("version", "node", "pid", "source", "holder_rule")},
        **{key: STATUS[key] for key in ("uptime_s", "lease", "ending")},
        "run": str,
    }
)
"""What a mount's attribute `user.dlmfs.status` says."""

ANSWERS: Final[dict[str, Callable[[object], str | None]]] = {
    "status": _of(STATUS),
    "info": _of(INFO),
    "hindrance": _of(HINDRANCE),
    "nodes": _of(NODES),
    "why": _why,
    "health": _health,
    "top": _of(TOP),
    "evict": _of({"node": str, "how": {"left", "expired", "ended", "killed"}, "after_s": float}),
    "remove-domain": _of(int),
}
"""By question: where its answer is not as it should be, or None."""
