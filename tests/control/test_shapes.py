"""An answer that has the shape it should have can be shown, whatever stands in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlmfs import waitgraph
from dlmfs.cli import info, nodes, status, top, why
from dlmfs.cli.checks import mounted
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.handlers import _TABLE
from dlmfs.shapes import (
    ANSWERED,
    ANSWERS,
    HEALTH,
    HINDRANCE,
    INFO,
    NODES,
    SILENT,
    STATUS,
    TOP,
    WHY,
    Each,
    Maybe,
    Named,
    misfit,
)

Facts = dict[str, Any]
ODD: tuple[object, ...] = (
    None, True, 0, -1, 1.5, 1e300, 1 << 63, 1 << 70, "", "\x1b[31m\n", "PR", "0" * 128, [], {}, [None],
    [[]], {"a": None}, float("inf"), float("nan"),
)  # fmt: skip
ENTRY = MountEntry(1, 0, "/m", "local", "fuse.dlmfs", "0:1", (), ("user_id=0",))


def example(shape: Any) -> Any:
    """The simplest value of a shape that has something in everything."""
    if isinstance(shape, Maybe):
        return example(shape.shape)
    if isinstance(shape, Each):
        return [example(shape.shape)]
    if isinstance(shape, Named):
        return {"n": example(shape.shape)}
    if isinstance(shape, dict):
        return {name.removesuffix("?"): example(its) for name, its in shape.items()}
    if isinstance(shape, set):
        return min(shape)
    return {str: "n", int: 3, float: 1.5, bool: True}.get(shape, "00" * 64)


def node_facts() -> Facts:
    return {**example(ANSWERED), "silent": example(SILENT)}


def _story(answer: Facts) -> list[str]:
    return why.story(answer | {"deadlocks": waitgraph.deadlocks(answer)})


def _table(answer: Facts) -> list[str]:
    view = top.View("waiters", "", reverse=False, idle=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top, "ask", lambda *_args, **_more: copy.deepcopy(answer))
        patch.setattr(top, "entries", lambda _mountpoint: ([ENTRY], []))
        seen = top.sample(None, view)
    return [*top.heading(seen, view), *(top.line(row) for row in seen["locks"])]


def _space(answer: Facts) -> list[str]:
    found = list(mounted._space("m", "m", answer, example(STATUS)))
    return [f"{each.says}{each.mend}" for each in found]


def _state(answer: Facts) -> list[str]:
    found = [mounted._version("m", "m", answer), mounted._lease("m", answer)]
    found += [*mounted._store("m", answer["store"]), *mounted._faults("m", answer)]
    return status.render(answer, everything=True) + [each.says for each in found]


SHOWN: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "status": (example(STATUS), _state),
    "info": (example(INFO), info.render),
    "hindrance": (example(HINDRANCE), str),
    "nodes": (example(NODES), lambda answer: [nodes.render(row) for row in answer]),
    "why": ({**example(WHY), "nodes": {"n": node_facts()}}, _story),
    "health": ({**example(HEALTH), "trouble": None}, _space),
    "top": (example(TOP), _table),
    "evict": ({"node": "n", "how": "left", "after_s": 1.0}, str),
    "remove-domain": (3, str),
}


def changed(value: Any) -> Iterator[Any]:
    """The value with one thing in it replaced by something odd, left out, or doubled."""
    yield from ODD
    if isinstance(value, dict):
        for key, its in value.items():
            yield {k: v for k, v in value.items() if k != key}
            for other in changed(its):
                yield {**value, key: other}
    elif isinstance(value, list) and value:
        yield value * 3
        for other in changed(value[0]):
            yield [other, *value[1:]]


def test_every_kind_of_answer_is_here() -> None:
    assert set(SHOWN) == set(ANSWERS) == set(_TABLE)


@pytest.mark.parametrize("question", sorted(SHOWN))
def test_what_fits_can_be_shown(question: str) -> None:
    answer, show = SHOWN[question]
    assert ANSWERS[question](answer) is None
    show(copy.deepcopy(answer))
    fitting = odd = 0
    for other in changed(answer):
        if ANSWERS[question](other) is not None:
            odd += 1
            continue
        fitting += 1
        show(copy.deepcopy(other))
    assert fitting
    assert odd > len(ODD) // 2


def test_a_misfit_is_named() -> None:
    other = copy.deepcopy(SHOWN["status"][0])
    other["domains"][0]["locks"][0]["holders"][0]["pid"] = "7"
    assert misfit(other, STATUS) == "it.domains[0].locks[0].holders[0].pid"
    assert json.dumps(other)
