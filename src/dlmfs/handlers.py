"""What can be asked of a daemon: one table, with what each question costs and whom it is for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from dlmfs import health, report, why
from dlmfs.control_server import Cost, Handler
from dlmfs.engine import admin
from dlmfs.permission import Asker, Sight

if TYPE_CHECKING:
    from dlmfs.node import Node

Facts = dict[str, Any]
Answer = Callable[["Node", Sight, Facts], Awaitable[object]]


async def _status(node: Node, sight: Sight, _request: Facts) -> object:
    return await report.status(node, sight)


async def _info(node: Node, sight: Sight, request: Facts) -> object:
    return await report.info(node, sight, str(request["domain"]), str(request["lock"]))


async def _hindrance(node: Node, sight: Sight, request: Facts) -> object:
    return await report.hindrance(node, sight, str(request["domain"]), str(request["lock"]))


async def _nodes(node: Node, sight: Sight, _request: Facts) -> object:
    return await report.nodes(node, sight)


async def _why(node: Node, sight: Sight, request: Facts) -> object:
    return await why.why(node, sight, str(request["domain"]), str(request["lock"]))


async def _health(node: Node, sight: Sight, _request: Facts) -> object:
    return await health.health(node, sight)


async def _top(node: Node, sight: Sight, request: Facts) -> object:
    wanted = str(request.get("filter", ""))
    return await node.traffic.look(sight, wanted, idle=bool(request.get("idle")))


async def _evict(node: Node, _sight: Sight, request: Facts) -> object:
    name = str(request["node"])
    return await admin.evict(node.transact, node.store, name, node.membership.name)


async def _remove_domain(node: Node, _sight: Sight, request: Facts) -> object:
    return await admin.remove_domain(node.transact, str(request["domain"]))


_TABLE: Final[dict[str, tuple[Answer, Cost, bool]]] = {
    # question: who answers it, at what cost, and whether only root and the owner may ask
    "status": (_status, Cost.MUCH, False),
    "info": (_info, Cost.MUCH, False),
    "hindrance": (_hindrance, Cost.MUCH, False),
    "nodes": (_nodes, Cost.MUCH, False),
    "why": (_why, Cost.CLUSTER, False),
    "health": (_health, Cost.CLUSTER, False),
    "top": (_top, Cost.MUCH, False),
    "evict": (_evict, Cost.CLUSTER, True),
    "remove-domain": (_remove_domain, Cost.CLUSTER, True),
}


def handlers(node: Node) -> dict[str, Handler]:
    """The questions of one node's control socket."""
    return {
        name: Handler(partial(_answer, node, answer), cost, is_admin)
        for name, (answer, cost, is_admin) in _TABLE.items()
    }


def _answer(node: Node, answer: Answer, asker: Asker, request: Facts) -> Awaitable[object]:
    return answer(node, Sight(asker, node.fs.tree, secret=node.fs.secret), request)
