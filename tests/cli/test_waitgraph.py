"""Who waits for whom: the edges and the circles, without a cluster."""

from __future__ import annotations

from typing import Any

from dlmfs import waitgraph
from dlmfs.waitgraph import Link, Party


def claim(
    number: int, pid: int, mode: str = "EX", thread: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "id": number, "pid": pid, "thread": thread or pid, "mode": mode, "try": False,
        "before_others": True, **more,
    }  # fmt: skip


def lock(name: str, queue: str = "", **claims: tuple[list[Any], list[Any]]) -> dict[str, Any]:
    """`queue`: nodes in order; claims: by node, holders and waiters."""
    return {
        "domain": "dom",
        "lock": name,
        "queue": [{"node": node, "mode": "EX", "try": False} for node in queue.split()],
        "claims": {n: {"holders": h, "waiters": w} for n, (h, w) in claims.items()},
    }


def nodes(names: str, owner: str = "file") -> dict[str, Any]:
    return {n: {"node": n, "holder_rule": owner, "place": f"host-{n}"} for n in names.split()}


def found(
    locks: list[dict[str, Any]], known: dict[str, Any], links: list[Link] | None = None
) -> list[waitgraph.Cycle]:
    edges = [edge for each in locks for edge in waitgraph.edges(each, known)]
    return waitgraph.cycles(edges, links or [])


def test_two_processes_across_two_nodes() -> None:
    x = lock("x", "b", a=([claim(1, 10)], []), b=([], [claim(2, 20)]))
    y = lock("y", "a", b=([claim(3, 20)], []), a=([], [claim(4, 10)]))
    (cycle,) = found([x, y], nodes("a b"))
    assert cycle.certain
    assert [(e.waiter.pid, e.blocker.pid) for e in cycle.edges] == [(20, 10), (10, 20)]


def test_a_straight_chain_is_no_circle() -> None:
    x = lock("x", "b", a=([claim(1, 10)], []), b=([], [claim(2, 20)]))
    y = lock("y", "c", b=([claim(3, 20)], []), c=([], [claim(4, 30)]))
    assert found([x, y], nodes("a b c")) == []


def test_the_same_number_on_another_host_is_another_process() -> None:
    x = lock("x", "b", a=([claim(1, 10)], []), b=([], [claim(2, 20)]))
    y = lock("y", "c", b=([claim(3, 20)], []), c=([], [claim(4, 10)]))
    assert found([x, y], nodes("a b c")) == []
    together = nodes("a b c")
    together["c"]["place"] = together["a"]["place"]
    assert len(found([x, y], together)) == 1


def test_another_thread_might_give_it_back() -> None:
    x = lock("x", "b", a=([claim(1, 10)], []), b=([], [claim(2, 20)]))
    y = lock("y", "a", b=([claim(3, 20)], []), a=([], [claim(4, 10, thread=11)]))
    (cycle,) = found([x, y], nodes("a b"))
    assert not cycle.certain
    assert set(cycle.by) == {"itself", "thread"}


def test_a_process_waits_for_itself_where_each_file_is_an_owner() -> None:
    x = lock("x", a=([claim(1, 10)], [claim(2, 10)]))
    (cycle,) = found([x], nodes("a"))
    assert cycle.certain
    assert len(cycle.edges) == 1
    assert found([x], nodes("a", "node")) == [], "under holder=node they share it"


def test_shared_claims_do_not_wait_for_each_other() -> None:
    x = lock("x", "b", a=([claim(1, 10, "PR")], []), b=([], [claim(2, 20, "PR")]))
    y = lock("y", "a", b=([claim(3, 20)], []), a=([], [claim(4, 10)]))
    assert found([x, y], nodes("a b")) == []


def test_who_stands_ahead_in_the_queue_is_waited_for() -> None:
    """a and c would share x; b's exclusive wish stands between them, and b waits for a."""
    x = lock(
        "x",
        "b c",
        a=([claim(1, 10, "PR")], []),
        b=([], [claim(2, 20)]),
        c=([], [claim(3, 30, "PR")]),
    )
    y = lock("y", "a", c=([claim(4, 30)], []), a=([], [claim(5, 10)]))
    (cycle,) = found([x, y], nodes("a b c"))
    assert [edge.why for edge in cycle.edges].count("ahead") == 1
    assert cycle.certain
    other_order = lock(
        "x",
        "c b",
        a=([claim(1, 10, "PR")], []),
        b=([], [claim(2, 20)]),
        c=([], [claim(3, 30, "PR")]),
    )
    assert found([other_order, y], nodes("a b c")) == []


def test_trylocks_keep_nobody_waiting() -> None:
    x = lock("x", "b", a=([claim(1, 10)], []), b=([], [claim(2, 20)]))
    x["queue"][0]["try"] = True
    y = lock("y", "b a", b=([], [claim(3, 20)]), a=([], [claim(4, 10)]))
    y["queue"][0]["try"] = True
    assert found([x, y], nodes("a b")) == []


def test_a_child_that_inherited_or_not() -> None:
    x = lock("x", a=([claim(1, 10)], [claim(2, 12)]))
    party, child = Party("host-a", 10), Party("host-a", 12)
    (sure,) = found([x], nodes("a"), [Link(party, child, "inherited")])
    assert sure.certain
    (perhaps,) = found([x], nodes("a"), [Link(party, child, "child")])
    assert not perhaps.certain
    assert found([x], nodes("a")) == []


def test_a_crowd_is_looked_through_at_once() -> None:
    crowd = [claim(100 + i, 100 + i) for i in range(16)]
    names = " ".join(f"n{i}" for i in range(40))
    waiting: dict[str, Any] = {
        n: ([], [claim(i * 100 + j, i * 100 + j) for j in range(16)])
        for i, n in enumerate(names.split())
    }
    x = lock("x", names, a=([claim(1, 10)], crowd), **waiting)
    y = lock("y", "a", b=([claim(3, 20)], []), a=([], [claim(4, 10)]))
    z = lock("z", "b", a=([claim(5, 10)], []), b=([], [claim(6, 20)]))
    (cycle,) = found([x, y, z], nodes(f"a b {names}"))
    assert {edge.lock for edge in cycle.edges} == {"y", "z"}


def report(waiting: int) -> dict[str, Any]:
    """An answer of `why` with the deadlock of two; `waiting`: the open file that waits for x."""
    x = lock("x", "b", a=([claim(1, 10)], []), b=([], [claim(waiting, 20)]))
    y = lock("y", "a", b=([claim(3, 20)], []), a=([], [claim(4, 10)]))
    known: dict[str, Any] = nodes("a b") | {"c": {"silent": {"why": "dead"}}}
    return {"locks": [x, y], "nodes": known, "waits": []}


def test_a_deadlock_counts_if_the_same_open_files_are_in_it_twice() -> None:
    first, again, other = (waitgraph.deadlocks(report(number)) for number in (2, 2, 7))
    assert [len(found) for found in (first, again, other)] == [1, 1, 1]
    assert waitgraph.in_both(first, again) == again
    assert waitgraph.in_both(first, other) == [], "the same processes, but they went on between"
