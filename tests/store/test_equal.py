"""Both stores give the same answers to random transactions."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dlmfs.errors import Bug, LockLost
from dlmfs.sim.loop import SimLoop
from dlmfs.store import schema
from dlmfs.store.base import BOUNDS, Compare, Delete, Get, KeyValue, Op, Put, Range, Txn, TxnResult
from dlmfs.store.check import check
from dlmfs.store.memory import MemoryServer

START = 100
LEASES = 2
KEYS = st.sampled_from(
    [b"a", b"a/", b"a/b", b"a\xff", b"a\xff\xff", b"b", b"b/1", b"\x00", b"\xfe"]
)
PREFIXES = st.sampled_from([b"a", b"a/", b"a\xff", b"b", b"\x00", b"\xfe", b"none"])
REVISIONS = st.one_of(st.just(0), st.integers(START, START + 12))
COMPARES = st.one_of(
    st.builds(Compare, KEYS, st.sampled_from(["create", "mod"]), st.sampled_from("=<"), REVISIONS),
    st.builds(
        Compare,
        PREFIXES,
        st.sampled_from(["create", "mod"]),
        st.sampled_from("=<"),
        REVISIONS,
        st.just(True),
    ),
)
PUTS = st.builds(Put, KEYS, st.binary(max_size=2), st.integers(0, LEASES))
LEAVES: st.SearchStrategy[Op] = st.one_of(
    PUTS,
    PUTS,
    st.builds(Delete, KEYS),
    st.builds(Get, KEYS),
    st.builds(Range, PREFIXES, st.just(b"") | KEYS, st.integers(0, 3)),
)


def _transactions(inner: st.SearchStrategy[Op]) -> st.SearchStrategy[Txn]:
    operations = st.lists(inner, max_size=4).map(tuple)
    return st.builds(Txn, st.lists(COMPARES, max_size=2).map(tuple), operations, operations)


TXNS = _transactions(st.one_of(LEAVES, LEAVES, _transactions(LEAVES)))
ENDS = st.integers(1, LEASES)


class Both:
    """The two stores, with the same leases, side by side."""

    def __init__(self) -> None:
        self.memory = MemoryServer(SimLoop(), start_revision=START)
        self.conn = schema.connect(Path(":memory:"), volatile=True, timeout_s=1)
        self.conn.execute("UPDATE meta SET revision = ?, trimmed = ?", (START, START))
        for number in range(LEASES):
            lease = self.memory.grant(f"n{number}", 15)
            schema.add_session(self.conn, row=(lease, f"n{number}", 1, 0.0))

    def in_memory(self, txn: Txn) -> TxnResult | str:
        try:
            return self.memory.apply(txn)
        except LockLost:
            return "lost"

    def in_sqlite(self, txn: Txn) -> TxnResult | str:
        self.conn.execute("BEGIN IMMEDIATE")
        try:
            result, _ = schema.evaluate(self.conn, txn=txn)
        except LockLost:
            self.conn.execute("ROLLBACK")
            return "lost"
        self.conn.execute("COMMIT")
        return result

    def end(self, lease: int) -> None:
        self.memory.expire(lease)
        schema.end_session(self.conn, lease=lease)

    def check_equal(self) -> None:
        rows = self.conn.execute("SELECT * FROM kv ORDER BY key").fetchall()
        assert [KeyValue(*row) for row in rows] == [
            self.memory.data[key] for key in sorted(self.memory.data)
        ]
        everything = tuple(bytes([first]) for first in range(255))
        revision, _, batches = schema.events_since(self.conn, START + 1, everything)
        assert revision == self.memory.revision
        assert batches == self.memory.history


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(TXNS, TXNS, TXNS, ENDS), min_size=1, max_size=12))
def test_random_transactions_have_equal_answers(steps: list[Txn | int]) -> None:
    both = Both()
    try:
        for step in steps:
            if isinstance(step, int):
                both.end(step)
                continue
            try:
                check(step, BOUNDS)
            except Bug:
                continue
            assert both.in_sqlite(step) == both.in_memory(step)
        both.check_equal()
    finally:
        both.conn.close()


def test_the_comparison_can_fail() -> None:
    """A change that only one of them knows is found."""
    both = Both()
    try:
        both.conn.execute("INSERT INTO kv VALUES (?, ?, 101, 101, 0)", (b"a", b""))
        read = Txn((), (Get(b"a"),))
        assert both.in_sqlite(read) != both.in_memory(read)
    finally:
        both.conn.close()
