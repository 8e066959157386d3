"""Who waits for whom, out of what the nodes told, and who waits for himself in the end. Pure.

Rules of this file
------------------
* An edge says only what is certain: this process cannot have the lock before that one gives it up
  (`holds`), or has had it (`ahead`: it stands before in the queue and does not go with it).
* A deadlock is a circle of such edges. One that leads through another thread or a child of a
  process, which might give the lock back for it, is marked as not certain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from dlmfs.model import Mode, compatible

Facts = dict[str, Any]
CYCLES_MAX: Final = 4
STARTS_MAX: Final = 200
CERTAIN: Final = ("itself", "inherited")


class Party(NamedTuple):
    """A process, as the graph knows it: `place` is its host and pid namespace, or its node and claim
    where the process is unknown."""

    place: str
    pid: int


class Edge(NamedTuple):
    """`waiter` (of `claim` at `node`) waits for `blocker` (of `its` at `its_node`), because that "holds"
    the lock or is "ahead"."""

    domain: str
    lock: str
    node: str
    claim: Facts
    waiter: Party
    why: str
    its_node: str
    its: Facts
    blocker: Party

    def key(self) -> tuple[str, int, str, int]:
        """Names the edge: two open files."""
        return self.node, self.claim["id"], self.its_node, self.its["id"]


class Link(NamedTuple):
    """The process `holder` waits through the claim of `waiter`: itself, or by a thread or child."""

    holder: Party
    waiter: Party
    by: str


def party(node: Facts, claim: Facts) -> Party:
    """The process of a claim."""
    if claim["pid"]:
        return Party(node["place"], claim["pid"])
    return Party(f"{node['node']}#{claim['id']}", 0)


def _conflict(a: Facts, b: Facts) -> bool:
    return not compatible(Mode[a["mode"]], Mode[b["mode"]])


def edges(lock: Facts, nodes: dict[str, Facts]) -> Iterator[Edge]:
    """The edges of one lock. `lock` has the store's `queue` and each node's `claims`; `nodes` those that
    answered."""
    claims: dict[str, Facts] = lock["claims"]
    for name, own in claims.items():
        for place, claim in enumerate(own["waiters"]):
            for why, its_node, its in _blockers(lock, nodes, name, place):
                yield Edge(
                    lock["domain"],
                    lock["lock"],
                    name,
                    claim,
                    party(nodes[name], claim),
                    why,
                    its_node,
                    its,
                    party(nodes[its_node], its),
                )


def _blockers(
    lock: Facts, nodes: dict[str, Facts], name: str, place: int
) -> Iterator[tuple[str, str, Facts]]:
    """Who stands in the way of the node's waiter number `place`."""
    own = lock["claims"][name]
    claim = own["waiters"][place]
    each_file = nodes[name]["owner"] == "file"
    for other, theirs in lock["claims"].items():
        if other != name or each_file:
            for holder in theirs["holders"]:
                if _conflict(holder, claim):
                    yield "holds", other, holder
    if each_file:
        for earlier in own["waiters"][:place]:
            if _conflict(earlier, claim) and not earlier["try"]:
                yield "ahead", name, earlier
    for other in _nodes_ahead(lock, name, claim):
        first = lock["claims"].get(other, {}).get("waiters", [])[:1]
        for earlier in first:
            if _conflict(earlier, claim):
                yield "ahead", other, earlier


def _nodes_ahead(lock: Facts, name: str, claim: Facts) -> list[str]:
    """The nodes whose wishes come before this waiter."""
    queue = [wish for wish in lock["queue"] if not wish["try"]]
    names = [wish["node"] for wish in queue]
    if name in names:
        return names[: names.index(name)]
    # It has no wish: it waits for its own node's turn to come, or for the node's other holders.
    return [] if claim["before_others"] else names


class Cycle(NamedTuple):
    """A deadlock: each edge's blocker waits by the next edge's claim, the last one's by the first's;
    `by` says how, one for each edge (see `facts.waits`)."""

    edges: tuple[Edge, ...]
    by: tuple[str, ...]

    @property
    def certain(self) -> bool:
        return all(how in CERTAIN for how in self.by)

    def key(self) -> frozenset[tuple[str, int, str, int]]:
        return frozenset(edge.key() for edge in self.edges)


class _Ways:
    """Which edges go on from which."""

    def __init__(self, all_edges: list[Edge], links: list[Link]) -> None:
        self._from: dict[Party, list[Edge]] = {}
        for edge in all_edges:
            self._from.setdefault(edge.waiter, []).append(edge)
        self._links: dict[Party, dict[Party, str]] = {}
        for link in links:
            self._links.setdefault(link.holder, {})[link.waiter] = link.by

    def on(self, edge: Edge) -> Iterator[tuple[Edge, str]]:
        """The edges by which the blocker of this one waits, and how it does."""
        for following in self._from.get(edge.blocker, ()):
            if edge.why == "ahead":
                same = edge.its["id"] == following.claim["id"] and edge.its_node == following.node
            else:
                same = edge.its["thread"] == following.claim["thread"]
            yield following, "itself" if same else "thread"
        for party_, by in self._links.get(edge.blocker, {}).items():
            for following in self._from.get(party_, ()):
                yield following, by


def cycles(all_edges: list[Edge], links: list[Link]) -> list[Cycle]:
    """The deadlocks, each set of processes once, the certain ones first."""
    left = all_edges
    while True:  # what leads nowhere, and what nothing leads to, is in no circle
        ways = _Ways(left, links)
        led_to = {id(on) for edge in left for on, _ in ways.on(edge)}
        kept = [e for e in left if id(e) in led_to and next(ways.on(e), None) is not None]
        if len(kept) == len(left):
            break
        left = kept
    found: dict[frozenset[Party], Cycle] = {}
    for certain in (True, False):
        for start in left[:STARTS_MAX]:
            cycle = _circle(start, ways, certain=certain)
            if cycle is not None:
                found.setdefault(frozenset(edge.waiter for edge in cycle.edges), cycle)
    return list(found.values())[:CYCLES_MAX]


def _circle(start: Edge, ways: _Ways, *, certain: bool) -> Cycle | None:
    """The shortest way from an edge back to itself."""
    todo = [Cycle((start,), ())]
    seen = {id(start)}
    while todo:
        so_far = todo.pop(0)
        for edge, by in ways.on(so_far.edges[-1]):
            if certain and by not in CERTAIN:
                continue
            if edge is start:
                return Cycle(so_far.edges, (*so_far.by, by))
            if id(edge) not in seen:
                seen.add(id(edge))
                todo.append(Cycle((*so_far.edges, edge), (*so_far.by, by)))
    return None
