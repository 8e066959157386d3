"""Who waits for whom, out of what `why` tells, and who waits for himself in the end. Pure.

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
    each_file = nodes[name]["holder_rule"] == "file"
    for other, theirs in lock["claims"].items():
        if other != name or each_file:
            for holder in theirs["holders"]:
                if _conflict(holder, claim):
                    yield "holds", other, holder
    if each_file:
        for earlier in _in_the_way([(name, c) for c in own["waiters"][:place]], claim):
            yield "ahead", *earlier
    firsts = [
        (other, earlier)
        for other in _nodes_ahead(lock, name, claim)
        for earlier in lock["claims"].get(other, {}).get("waiters", [])[:1]
    ]
    for ahead in _in_the_way(firsts, claim):
        yield "ahead", *ahead


def _in_the_way(ahead: list[tuple[str, Facts]], claim: Facts) -> Iterator[tuple[str, Facts]]:
    """Those ahead that must have had it first, back to the first who waits for all before himself."""
    for node, earlier in reversed(ahead):
        if _conflict(earlier, claim) and not earlier["try"]:
            yield node, earlier
            if earlier["mode"] == "EX":
                return


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
    ways = _Ways(all_edges, links)
    following = [[on for on, _ in ways.on(edge)] for edge in all_edges]
    left = _circling(all_edges, following)
    found: dict[frozenset[Party], Cycle] = {}
    for certain in (True, False):
        for start in left[:STARTS_MAX]:
            cycle = _circle(start, ways, certain=certain)
            if cycle is not None:
                found.setdefault(frozenset(edge.waiter for edge in cycle.edges), cycle)
    return list(found.values())[:CYCLES_MAX]


def _circling(all_edges: list[Edge], following: list[list[Edge]]) -> list[Edge]:
    """The edges without those that lead nowhere and those that nothing leads to."""
    number = {id(edge): i for i, edge in enumerate(all_edges)}
    onward = [[number[id(on)] for on in some] for some in following]
    backward: list[list[int]] = [[] for _ in all_edges]
    for i, some in enumerate(onward):
        for j in some:
            backward[j].append(i)
    out: set[int] = set()
    for counts, others in ((list(map(len, onward)), backward), (list(map(len, backward)), onward)):
        todo = [i for i, count in enumerate(counts) if not count]
        while todo:
            i = todo.pop()
            out.add(i)
            for j in others[i]:
                counts[j] -= 1
                if not counts[j]:
                    todo.append(j)
    return [edge for i, edge in enumerate(all_edges) if i not in out]


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


def deadlocks(report: Facts) -> list[Facts]:
    """The deadlocks in an answer of `why`, JSON-ready; layout: docs/reference.md."""
    nodes: dict[str, Facts] = {n: told for n, told in report["nodes"].items() if "place" in told}
    known = [edge for lock in report["locks"] for edge in edges(lock, nodes)]
    links = [
        Link(
            Party(nodes[row["node"]]["place"], row["pid"]),
            party(nodes[row["node"]], row["claim"]),
            row["by"],
        )
        for row in report["waits"]
        if row["claim"]["pid"] != row["pid"]
    ]
    return [_told(cycle) for cycle in cycles(known, links)]


def _told(cycle: Cycle) -> Facts:
    rows = [
        {
            "domain": edge.domain,
            "lock": edge.lock,
            "node": edge.node,
            "waiter": edge.claim,
            "why": edge.why,
            "its_node": edge.its_node,
            "its": edge.its,
            "by": by,
        }
        for edge, by in zip(cycle.edges, cycle.by, strict=True)
    ]
    return {"certain": cycle.certain, "edges": rows}


def in_both(before: list[Facts], now: list[Facts]) -> list[Facts]:
    """The deadlocks of now that stood before: the nodes are asked one after the other, and a circle in
    passing is none the second time."""
    known = {_key(cycle) for cycle in before}
    return [cycle for cycle in now if _key(cycle) in known]


def _key(cycle: Facts) -> frozenset[tuple[str, int, str, int]]:
    """The open files of a deadlock."""
    return frozenset(
        (row["node"], row["waiter"]["id"], row["its_node"], row["its"]["id"])
        for row in cycle["edges"]
    )
