"""Locks with the longest names that there are: whatever is made of names stays within its bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dlmfs import facts
from dlmfs.engine.questions import ASKED_MAX, LETTER_MAX
from dlmfs.engine.records import NODES, Keys, decode_news, encode_news, lock_of
from dlmfs.engine.sender import BATCH_MAX
from dlmfs.errors import BadState
from dlmfs.model import Mode
from dlmfs.names import DOMAIN_NAME_MAX, LOCK_NAME_MAX, domain_fault, is_domain, is_lock, lock_fault
from dlmfs.store.base import BOUNDS, KeyValue, Put, Txn, created_at
from dlmfs.store.check import operations, size
from tests.engine.cluster import LockHistory
from tests.engine.test_commits import Counted, held

WORST = b"\xff" * LOCK_NAME_MAX
"""In JSON each of its bytes becomes six."""
DOMAIN = b"\xff" * DOMAIN_NAME_MAX


def test_what_can_be_a_name() -> None:
    assert is_lock(WORST)
    assert is_domain(DOMAIN)
    assert lock_fault(WORST) is domain_fault(DOMAIN) is None
    assert not is_lock(WORST + b"x")
    assert "up to 255 bytes, this one has 256" in str(lock_fault(WORST + b"x"))
    assert "up to 63 bytes, this one has 64" in str(domain_fault(DOMAIN + b"x"))
    assert domain_fault(b"$x") is None
    assert is_lock(b"$x")  # such a head may stand in a store; no file is made for it
    assert "cannot begin with '$'" in str(lock_fault(b"$x"))
    for bad in (b"", b"a/b", b"a\0b"):
        assert lock_fault(bad)
        assert domain_fault(bad)


def test_records_carry_it() -> None:
    keys = Keys(DOMAIN, "n" * 63)
    assert lock_of(keys.head(WORST)) == (DOMAIN, WORST)
    assert keys.split_wish(keys.wish(WORST, "n" * 63)) == (WORST, "n" * 63)
    assert keys.split_mail(keys.mail("n" * 63, WORST)) == WORST
    news = KeyValue(keys.my_news, encode_news([WORST, b"x"]), 1, 1, 0)
    assert decode_news(news) == [WORST, b"x"]
    for key in (keys.head(WORST + b"x"), keys.wish(WORST + b"x", "n")):
        assert lock_of(key) is None
        assert keys.split_wish(key) is None
    with pytest.raises(BadState):
        decode_news(news._replace(value=encode_news([WORST + b"x"])))


def test_takes_and_first_values_of_many_are_packed_as_for_short_names() -> None:
    """`check` raises Bug for a commit that is too large, whichever store it is."""
    cluster = Counted()
    a, b = cluster.nodes
    names = [(b"%d" % n).ljust(LOCK_NAME_MAX, b"\xff") for n in range(3 * BATCH_MAX)]
    cluster.locks = {name: LockHistory() for name in names}
    mine = [cluster.open(a, Mode.EX, lock=name) for name in names]
    assert cluster.look() <= 4
    assert all(map(held, mine))
    theirs = [cluster.open(b, Mode.PR, lock=name) for name in names]
    cluster.look()
    for program in mine:
        cluster.write(program)
    cluster.look()
    for program in mine:
        cluster.close(program)
    cluster.look()
    assert all(map(held, theirs))


def test_a_question_to_as_many_nodes_as_are_asked_at_once_fits() -> None:
    names = [[chr(0xDCFF) * 63, chr(0xDCFF) * LOCK_NAME_MAX]] * facts.LOCKS_MAX
    threads = [[f"{'b' * 64}/{1 << 32}", 1 << 22, 1 << 22]] * facts.THREADS_MAX
    question = {"v": 1, "question": {"locks": names, "threads": threads}}
    record = json.dumps(question).encode()
    assert len(record) <= LETTER_MAX
    node = NODES + b"n" * 63
    key = node + b"/ask/" + b"n" * 63 + b"/" + b"f" * 33
    put = Txn((created_at(node, 1),), (Put(key, record, 1),))
    asked = Txn((), (put,) * ASKED_MAX)
    assert size(asked) <= BOUNDS.size
    assert operations(asked) <= BOUNDS.operations


def test_an_answer_leaves_out_what_does_not_fit_and_says_how_much() -> None:
    name = chr(0xDCFF) * LOCK_NAME_MAX
    claim = {"pid": 1, "command": "x" * 150}

    def lock(count: int) -> dict[str, Any]:
        claims = [dict(claim) for _ in range(count)]
        return {
            "lock": name,
            "holders": claims,
            "more_holders": 5,
            "waiters": [],
            "more_waiters": 0,
        }

    full: dict[str, Any] = {
        "locks": [lock(16) for _ in range(facts.LOCKS_MAX)],
        "waits": [{"lock": name, "claim": claim} for _ in range(facts.WAITS_MAX)],
    }
    assert len(json.dumps(full)) > LETTER_MAX
    told = facts.fitting(full)
    assert len(json.dumps(told)) <= LETTER_MAX
    assert len(told["waits"]) >= facts.WAITS_MAX // 4
    assert all(len(each["holders"]) + each["more_holders"] == 21 for each in told["locks"])
    small = {"locks": [lock(1)], "waits": [{"lock": "x"}]}
    assert facts.fitting(dict(small)) == small
