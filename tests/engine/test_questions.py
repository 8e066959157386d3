"""Questions between nodes, on the simulated clock: answered, unanswered, and never left behind."""

from __future__ import annotations

from typing import Any

import pytest

from dlmfs.engine import questions
from dlmfs.engine.questions import ANSWER, ASK, PATIENCE_S
from dlmfs.engine.records import NODES
from dlmfs.errors import DlmfsError
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Put, Txn
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_store import Faults
from tests.engine.hand import Steady
from tests.engine.test_lease import TTL_S, Node, run

pytestmark = pytest.mark.allow_warnings


@pytest.fixture
def loop() -> SimLoop:
    return SimLoop()


@pytest.fixture
def server(loop: SimLoop) -> MemoryServer:
    return MemoryServer(loop, start_revision=100)


def node(server: MemoryServer, name: str, reply: questions.Facts | None = None) -> Node:
    made = Node(server, name).start()
    made.member.questions.reply = lambda asked: {"node": name, "asked": asked, **(reply or {})}
    return made


class Asking:
    """One question, and what came of it."""

    def __init__(self, asker: Node, *asked: Node, question: Any = "?") -> None:
        self.loop = asker.loop
        self.start = self.loop.time()
        self.took = -1.0
        self.result: questions.Answers | DlmfsError | None = None
        names = {n.member.name: n.member.record for n in asked}
        asker.member.questions.ask(names, {"q": question}, self._done)

    def _done(self, result: questions.Answers | DlmfsError) -> None:
        assert self.result is None, "told twice"
        self.result, self.took = result, self.loop.time() - self.start

    def answers(self) -> questions.Answers:
        run(self.loop, lambda: self.result is not None)
        assert isinstance(self.result, dict), self.result
        return self.result


def letters(server: MemoryServer) -> list[bytes]:
    return [key for key in server.data if key.count(b"/") > 1]


def test_all_that_live_answer_and_nothing_stays(server: MemoryServer, loop: SimLoop) -> None:
    a, b, c = node(server, "a"), node(server, "b"), node(server, "c")
    asking = Asking(a, b, c)
    assert asking.answers() == {n: {"node": n, "asked": {"q": "?"}} for n in ("b", "c")}
    assert asking.took < 0.1
    loop.run_for(1)
    assert letters(server) == []


def test_who_is_silent_is_named_in_time_and_nothing_stays(
    server: MemoryServer, loop: SimLoop
) -> None:
    a, b, c = node(server, "a"), node(server, "b"), node(server, "c")
    b.store.cut()
    asking = Asking(a, b, c)
    answers = asking.answers()
    assert answers["b"] is None
    assert answers["c"] is not None
    assert PATIENCE_S <= asking.took < PATIENCE_S + 0.1
    assert letters(server) == []
    commits = server.commits
    b.store.heal()  # it hears of the question now, which does not stand any more
    loop.run_for(1)
    assert server.commits == commits, "answered all the same"
    assert letters(server) == []


def test_an_answer_that_the_watch_brings_late_counts(server: MemoryServer, loop: SimLoop) -> None:
    a, b = node(server, "a"), node(server, "b")
    a.store.faults = Faults(watch_delay_s=10.0)
    a.store.rng = Steady()
    assert Asking(a, b).answers()["b"] == {"node": "b", "asked": {"q": "?"}}


@pytest.mark.parametrize("deaf", ["asked", "asker"])
def test_what_falls_into_a_gap_of_the_watch_is_found(
    server: MemoryServer, loop: SimLoop, deaf: str
) -> None:
    """An idle node of a busy lock space is rarely told of anything, and the log is trimmed meanwhile."""
    a, b = node(server, "a"), node(server, "b")
    late = b if deaf == "asked" else a
    late.store.faults = Faults(watch_delay_s=0.5)
    late.store.rng = Steady()
    asking = Asking(a, b)
    awaited = ASK if deaf == "asked" else ANSWER
    run(loop, lambda: any(awaited in key for key in letters(server)))
    server.compact(server.revision)
    assert asking.answers()["b"] is not None
    assert asking.took < PATIENCE_S


def test_a_node_that_has_gone_is_told_from_a_silent_one(server: MemoryServer) -> None:
    a, b = node(server, "a"), node(server, "b")
    assert b.member.session is not None
    server.expire(b.member.session.lease)
    asking = Asking(a, b)
    assert asking.answers() == {"b": {"gone": True}}
    assert asking.took < 0.1


def test_a_version_that_knows_no_questions_is_silent(server: MemoryServer, loop: SimLoop) -> None:
    a, b = node(server, "a"), node(server, "b")
    b.member.questions.told = lambda event: None  # type: ignore[method-assign]
    assert Asking(a, b).answers() == {"b": None}
    assert letters(server) == []


@pytest.mark.parametrize(
    "bad", [b"", b"{", b"[]", b'{"v":99}', b'{"v":1}', b'{"v":1,"question":7}']
)
def test_a_bad_question_harms_nobody(server: MemoryServer, loop: SimLoop, bad: bytes) -> None:
    a, b = node(server, "a"), node(server, "b")
    b.member.questions.reply = lambda asked: {"first": asked["q"]}
    assert a.member.session is not None
    lease = a.member.session.lease
    server.apply(Txn((), (Put(NODES + b"b" + ASK + b"a/1.1", bad, lease),)))
    server.apply(Txn((), (Put(NODES + b"b" + ASK + b"a", bad, lease),)))
    server.apply(Txn((), (Put(NODES + b"b" + ASK + b"a/2.2", bad, 0),)))
    loop.run_for(1)
    assert b.member.serving()
    assert NODES + b"b" + ASK + b"a/2.2" in server.data, "an answer without a lease was put"
    assert Asking(a, b).answers() == {"b": {"first": "?"}}


def test_an_answer_that_is_too_long_says_so(server: MemoryServer) -> None:
    a, b = node(server, "a"), node(server, "b", {"all": "x" * questions.LETTER_MAX})
    answer = Asking(a, b).answers()["b"]
    assert answer is not None
    assert "too long" in answer["error"]


def test_a_fenced_node_is_told_that_it_cannot_ask(server: MemoryServer, loop: SimLoop) -> None:
    a, b = node(server, "a"), node(server, "b")
    a.store.cut()
    loop.run_for(TTL_S)
    asking = Asking(a, b)
    run(loop, lambda: asking.result is not None)
    assert isinstance(asking.result, DlmfsError)
    a.store.heal()


def test_under_any_loss_every_question_ends_and_nothing_stays(loop: SimLoop) -> None:
    server = MemoryServer(loop, start_revision=100)
    a, b, c = node(server, "a"), node(server, "b"), node(server, "c")
    heard = 0
    for n in (a, b, c):
        n.store.faults = Faults(lose_request=0.15, lose_answer=0.15, apply_late=0.1, late_s=3.0)
    for _ in range(60):
        asking = Asking(a, b, c)
        run(loop, lambda asking=asking: asking.result is not None)  # type: ignore[misc]
        assert asking.took <= PATIENCE_S + 2.0, "waited for longer than the store takes to fail"
        heard += isinstance(asking.result, dict) and any(asking.result.values())
    assert heard > 5
    for n in (a, b, c):
        n.store.faults = Faults()
    loop.run_for(20)
    late = letters(server)
    a.member.end(lambda error: None)
    loop.run_for(1)
    assert letters(server) == []
    assert len(late) <= 6, "what a late put leaves is on the asker's lease, and little"
