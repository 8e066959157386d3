"""Putting a question to other nodes, and what can be said of those that do not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dlmfs import identity
from dlmfs.engine.questions import PATIENCE_S, Answers
from dlmfs.engine.records import decode_node
from dlmfs.errors import BadState, DlmfsError
from dlmfs.store.base import KeyValue

if TYPE_CHECKING:
    from dlmfs.node import Node

STORE_S: Final = 5.0
"""How long the store may take. Its own patience follows from the lease time, which may be an hour."""
STALE: Final = 0.7
"""A living node renews its lease before less than this part of it is left."""

Facts = dict[str, Any]


async def ask(
    node: Node, records: Mapping[str, KeyValue], names: Sequence[str], question: Facts
) -> Answers:
    """The answers of the nodes `names`, of whom `records` are the records. Never longer than
    `PATIENCE_S + STORE_S`; where the question could not be put, {"unasked": why} of each."""
    answered: asyncio.Future[Answers | DlmfsError] = node.loop.create_future()

    def done(result: Answers | DlmfsError) -> None:
        if not answered.done():
            answered.set_result(result)

    asked = {name: records[name].create_revision for name in names}
    node.membership.questions.ask(asked, question, done)
    try:
        async with asyncio.timeout(PATIENCE_S + STORE_S):
            result = await answered
    except TimeoutError:
        return dict.fromkeys(names)
    if isinstance(result, DlmfsError):
        return {name: {"unasked": str(result)} for name in names}
    return result


def facts_of(kv: KeyValue) -> Facts:
    """What a node's record says of it; nothing if it cannot be read."""
    with contextlib.suppress(BadState):
        return decode_node(kv)
    return {}


def place(kv: KeyValue) -> str:
    found = facts_of(kv)
    return f"{found.get('boot')}/{found.get('pidns')}"


async def silent(node: Node, kv: KeyValue, answer: Facts | None) -> Facts | None:
    """What is to be said of a node by way of its answer, which may be that there is none; None: it has
    answered."""
    if answer is None:
        return await silence(node, kv)
    if "unasked" in answer:
        return unheard("unasked", str(answer["unasked"]))
    if "gone" in answer:
        return unheard("gone", "it has just left")
    if "error" in answer:
        return unheard("refused", f"it cannot say: {answer['error']}")
    return None


def unheard(why_not: str, says: str) -> Facts:
    return {"host": None, "pid": None, "left_s": None, "why": why_not, "says": says}


async def silence(node: Node, kv: KeyValue) -> Facts:
    """What can be known of a node that does not answer: `why` in a word and what it `says` in more, its
    daemon's `host` and `pid`, and `left_s`, the seconds until its lease ends if it is not renewed
    (None: it has none that can)."""
    found = facts_of(kv)
    left_s = await lease_left(node, kv.lease)
    told = {"host": found.get("host"), "pid": found.get("pid"), "left_s": left_s}
    pid, ttl_s = told["pid"], float(found.get("ttl") or 0)
    if identity.is_over(found):
        return told | {"why": "dead", "says": f"its daemon (pid {pid}) is dead"}
    state = identity.state_here(found)
    if state is not None and state in "Tt":
        return told | {"why": "stopped", "says": f"its daemon (pid {pid}) is stopped"}
    if left_s is not None and left_s < ttl_s * STALE:
        return told | {
            "why": "unreachable",
            "says": f"it has not renewed its lease for {ttl_s - left_s:.0f} s: dead, stopped or cut off",
        }
    if state is not None:
        return told | {"why": "busy", "says": f"its daemon (pid {pid}) runs, but does not answer"}
    return told | {"why": "silent", "says": "it does not answer: stopped, or of an older version?"}


async def lease_left(node: Node, lease: int) -> float | None:
    """Seconds until the lease ends if nobody renews it; None if it cannot, or it is not known."""
    answer: asyncio.Future[float | DlmfsError | None] = node.loop.create_future()

    def done(result: float | DlmfsError | None) -> None:
        if not answer.done():
            answer.set_result(result)

    node.store.lease_left(lease, done)
    try:
        async with asyncio.timeout(STORE_S):
            result = await answer
    except TimeoutError:
        return None
    return None if isinstance(result, DlmfsError) else result
