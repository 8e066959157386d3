"""Questions between nodes: letters in the store, beside the lock protocol and never in its way.

    n/<asked>/ask/<asker>/<number>     a question
    n/<asker>/answer/<number>/<asked>  its answer

Rules of this file
------------------
* Nothing of the lock protocol reads these keys, compares them or waits for them. They lie in the
  range that each node watches for its own record anyway, so they wake nobody else.
* Both are on the asker's lease, and an answer is put only while its question stands. The asker
  deletes both when it has read, or waited, enough; what it cannot delete goes with it.
* Room and time are bounded, and whoever does not answer in time is reported as silent: it is
  stopped, cut off, or of a version that knows no questions.
* A question must not harm whom it is put to: what cannot be answered is refused in words.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from dlmfs.engine.fields import FORMAT, Fields, node_name, parse
from dlmfs.engine.records import NODES
from dlmfs.errors import BadState, DlmfsError, OutcomeUnknown, Unavailable
from dlmfs.store.base import (
    Delete,
    Event,
    KeyValue,
    Put,
    Range,
    Txn,
    TxnResult,
    created_at,
)

if TYPE_CHECKING:
    from dlmfs.engine.membership import Membership
    from dlmfs.timing import Timer

ASK: Final = b"/ask/"
ANSWER: Final = b"/answer/"
PATIENCE_S: Final = 2.0
"""How long an answer may take. On a healthy cluster it is there after two commits."""
ASKED_MAX: Final = 40
"""Nodes per question: clearing up takes two operations for each, and etcd's bound is 128; the question
itself, with the longest names, stands once for each in one commit."""
UNDER_WAY_MAX: Final = 8
LETTER_MAX: Final = 64 * 1024
"""Bytes of a question or an answer."""
ERROR_MAX: Final = 500
NUMBER: Final = re.compile(rb"[0-9a-f]{1,16}\.[0-9a-f]{1,16}")
RETRY_S: Final = 0.5

Facts = dict[str, Any]
Answers = dict[str, Facts | None]
"""By node; None: it is silent. {"gone": True}: there is no such node any more."""
Asked = Callable[[Answers | DlmfsError], None]


def is_letter(key: bytes) -> bool:
    """Whether a key below n/<node>/ is a question's or an answer's."""
    node, _, rest = key[len(NODES) :].partition(b"/")
    what, _, rest = rest.partition(b"/")
    one, _, other = rest.partition(b"/")
    number, writer = (other, one) if what == ASK[1:-1] else (one, other)
    known = what in (ASK[1:-1], ANSWER[1:-1]) and NUMBER.fullmatch(number)
    return bool(known) and node_name(node) is not None and node_name(writer) is not None


class _Question:
    """One question under way."""

    def __init__(self, number: bytes, nodes: Mapping[str, int], lease: int, done: Asked) -> None:
        self.number = number
        self.lease = lease
        self.done = done
        self.answers: Answers = dict.fromkeys(nodes)
        self.timer: Timer | None = None

    @property
    def complete(self) -> bool:
        return all(answer is not None for answer in self.answers.values())


class Questions:
    """A node's letters: see the rules at the head of the file. `reply` makes the answers."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self._last = 0
        self._under_way: dict[bytes, _Question] = {}
        self.reply: Callable[[Facts], Facts] | None = None

    # -- asking ---------------------------------------------------------------------------------

    def ask(self, nodes: Mapping[str, int], question: Facts, done: Asked) -> None:
        """Put `question` to nodes, named with the create revisions of their records.

        `done` gets the answers, after `PATIENCE_S` at the latest if the store answers; or
        Unavailable. At most `ASKED_MAX` nodes.
        """
        member = self._member
        assert len(nodes) <= ASKED_MAX
        if not nodes:
            member.loop.call_soon(done, {})
            return
        if not member.serving() or len(self._under_way) >= UNDER_WAY_MAX:
            why = f"{UNDER_WAY_MAX} questions are under way" if member.serving() else member.reason
            member.loop.call_soon(done, Unavailable(f"other nodes cannot be asked now: {why}"))
            return
        assert member.session is not None
        self._last += 1
        lease = member.session.lease
        # With the lease, so that no question is ever taken for one of a former life.
        asked = _Question(b"%x.%x" % (lease, self._last), nodes, lease, done)
        self._under_way[asked.number] = asked
        record = json.dumps({"v": FORMAT, "question": question}).encode()
        puts = tuple(
            Txn(
                (created_at(NODES + node.encode(), revision),),
                (Put(self._ask_key(node, asked), record, lease),),
            )
            for node, revision in nodes.items()
        )
        member.store.txn(Txn((), puts), partial(self._sent, asked))
        asked.timer = member.loop.call_later(PATIENCE_S, self._clear, asked, True)

    def _ask_key(self, node: str, asked: _Question) -> bytes:
        name = self._member.name.encode()
        return NODES + node.encode() + ASK + name + b"/" + asked.number

    def _answers_key(self, asked: _Question) -> bytes:
        return NODES + self._member.name.encode() + ANSWER + asked.number + b"/"

    def _sent(self, asked: _Question, result: TxnResult | DlmfsError) -> None:
        if asked.number not in self._under_way:
            return
        if isinstance(result, DlmfsError):
            if not isinstance(result, OutcomeUnknown):  # else it may have been put all the same
                self._end(asked, result)
            return
        for node, put in zip(asked.answers, result.responses, strict=True):
            assert isinstance(put, TxnResult)
            if not put.succeeded:
                asked.answers[node] = {"gone": True}
        self._look(asked)

    def _look(self, asked: _Question) -> None:
        if asked.complete and asked.number in self._under_way:
            self._end(asked, asked.answers)
            self._clear(asked, False)

    def _end(self, asked: _Question, result: Answers | DlmfsError) -> None:
        del self._under_way[asked.number]
        if asked.timer is not None:
            asked.timer.cancel()
        asked.done(result)

    def _clear(self, asked: _Question, waiting: bool) -> None:
        """Take all letters of a question away. `waiting`: its time is over, and what the watch has
        not brought is read now."""
        if not self._is_ours(asked):  # they went with that session
            if waiting:
                self._end(asked, asked.answers)
            return
        prefix = self._answers_key(asked)
        keys = [self._ask_key(node, asked) for node in asked.answers]
        keys += [prefix + node.encode() for node in asked.answers]
        txn = Txn((), (Range(prefix), *(Delete(key) for key in keys)))
        self._member.store.txn(txn, partial(self._cleared, asked, waiting=waiting))

    def _cleared(self, asked: _Question, result: TxnResult | DlmfsError, *, waiting: bool) -> None:
        if isinstance(result, TxnResult):
            found = result.responses[0]
            assert isinstance(found, tuple)
            for kv in found:
                assert isinstance(kv, KeyValue)
                self._note(asked, kv)
        elif isinstance(result, OutcomeUnknown) and self._is_ours(asked):
            self._member.loop.call_later(RETRY_S, self._clear, asked, False)
        if waiting and asked.number in self._under_way:
            self._end(asked, asked.answers)

    def _is_ours(self, asked: _Question) -> bool:
        session = self._member.session
        return session is not None and session.lease == asked.lease

    # -- what the watch brings --------------------------------------------------------------------

    def told(self, event: Event) -> None:
        """An event below n/<name>, the node's own; others' are left alone."""
        own = NODES + self._member.name.encode()
        key = event.kv.key
        if event.kind != "put":
            return
        if key.startswith(own + ASK):
            self._asked(event.kv, key[len(own + ASK) :])
        elif key.startswith(own + ANSWER):
            number = key[len(own + ANSWER) :].split(b"/")[0]
            asked = self._under_way.get(number)
            if asked is None:  # to a question that we have given up
                self._member.store.txn(Txn((), (Delete(key),)), _ignore)
            else:
                self._note(asked, event.kv)
                self._look(asked)

    @staticmethod
    def _note(asked: _Question, kv: KeyValue) -> None:
        node = node_name(kv.key.rpartition(b"/")[2])
        if node in asked.answers:
            with contextlib.suppress(BadState):  # as good as none
                asked.answers[node] = parse(kv, LETTER_MAX)

    def _asked(self, kv: KeyValue, rest: bytes) -> None:
        """Answer, unless the question has been taken back meanwhile."""
        asker, _, number = rest.partition(b"/")
        if not (kv.lease and node_name(asker) and NUMBER.fullmatch(number)):
            return  # put by hand: an answer without a lease would stay for ever
        own = self._member.name.encode()
        key = NODES + asker + ANSWER + number + b"/" + own
        answer = self._reply(kv)
        if len(answer) > LETTER_MAX:
            answer = json.dumps({"error": f"an answer of {len(answer)} bytes is too long"}).encode()
        stands = created_at(kv.key, kv.create_revision)
        txn = Txn((stands,), (Delete(kv.key), Put(key, answer, kv.lease)))
        self._member.store.txn(txn, _ignore)

    def _reply(self, kv: KeyValue) -> bytes:
        answer: Facts = {"error": "nobody here answers"}
        try:
            question = Fields.of(kv, LETTER_MAX).part("question").record
            if self.reply is not None:
                answer = self.reply(question)
            return json.dumps(answer).encode()
        except BadState as error:
            return json.dumps({"error": str(error)}).encode()
        except Exception as error:
            # Whatever is wrong with a question or with our answer: this node's locks are worth more.
            what = f"{type(error).__name__}: {error}"
            return json.dumps({"error": what[:ERROR_MAX]}).encode()


def _ignore(_result: TxnResult | DlmfsError) -> None:
    """Nobody waits here: the asker sees for itself what comes."""
