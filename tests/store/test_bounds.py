"""How large a transaction may be: `check` counts as etcd does, and every store keeps to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmfs.errors import Bug
from dlmfs.store.base import BOUNDS, Bounds, Get, Put, Txn, created_at
from dlmfs.store.check import check, operations, size
from tests.store.drivers import (
    Client,
    Driver,
    DurableDriver,
    EtcdDriver,
    MemoryDriver,
    VolatileDriver,
)


def gets(count: int) -> tuple[Get, ...]:
    return tuple(Get(b"k%d" % number) for number in range(count))


def puts(count: int) -> tuple[Put, ...]:
    return tuple(Put(b"k%d" % number, b"") for number in range(count))


def compares(count: int, txn: Txn) -> Txn:
    return txn._replace(compares=tuple(created_at(b"c%d" % n, 0) for n in range(count)))


WRITE = Put(b"w", b"")

SHAPES: dict[str, Callable[[int], Txn]] = {
    "compares": lambda n: compares(n, Txn((), (WRITE,))),
    "then": lambda n: Txn((), puts(n)),
    "otherwise": lambda n: Txn((), (WRITE,), gets(n)),
    "the longest of the three": lambda n: compares(n - 5, Txn((), puts(n), gets(n - 9))),
    "inside of then": lambda n: Txn((), (Txn((), puts(n - 1)),)),
    "inside of otherwise": lambda n: Txn((), (WRITE,), (Txn((), gets(n - 1)),)),
    "compares inside": lambda n: Txn((), (compares(n - 1, Txn((), (WRITE,))),)),
    "beside many": lambda n: Txn((), (*puts(40), Txn((), gets(n - 41)))),
    "the deepest of several": lambda n: Txn(
        (), (WRITE, Txn((), gets(3)), Txn((), (), gets(n - 3)))
    ),
    "two deep": lambda n: Txn((), (Txn((), (Txn((), puts(n - 2)),)),)),
}
"""Transactions that count n operations each."""


@pytest.fixture(
    params=[MemoryDriver, VolatileDriver, DurableDriver, EtcdDriver],
    ids=["memory", "sqlite-volatile", "sqlite-durable", "etcd"],
)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    made: Driver = request.param(tmp_path)
    yield made
    made.close()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdDriver]:
    made = EtcdDriver(tmp_path)
    yield made
    made.close()


def test_every_store_takes_as_many_operations_as_etcd_and_no_more(driver: Driver) -> None:
    client = Client(driver)
    assert client.store.bounds == BOUNDS
    for name, shape in SHAPES.items():
        assert operations(shape(BOUNDS.operations)) == BOUNDS.operations, name
        assert client.txn(shape(BOUNDS.operations)).succeeded, name
        answers: list[object] = []
        with pytest.raises(Bug, match="129 operations"):
            client.store.txn(shape(BOUNDS.operations + 1), answers.append)
        assert answers == []


def test_etcd_counts_as_we_do(etcd: EtcdDriver) -> None:
    """With our own check out of the way, the server takes and refuses the very same."""
    client = Client(etcd)
    client.store.bounds = Bounds(10_000, 1 << 30)  # type: ignore[misc]
    for name, shape in SHAPES.items():
        assert client.txn(shape(BOUNDS.operations)).succeeded, name
        refused = client.fails(shape(BOUNDS.operations + 1))
        assert "too many operations" in str(refused), (name, refused)


def test_etcd_takes_what_the_size_allows(etcd: EtcdDriver) -> None:
    """The largest that `check` lets through, with the most that messages can add."""
    client = Client(etcd)
    names = [
        b"d/" + b"x" * 63 + b"/w/" + b"y" * 255 + b"/" + b"z" * 60 + b"%03d" % n for n in range(127)
    ]
    each = BOUNDS.size // len(names) - 2 * len(names[0])
    whole = Txn(
        tuple(created_at(name, 0) for name in names),
        tuple(Put(name, b"v" * each) for name in names),
    )
    assert BOUNDS.size - 127 <= size(whole) <= BOUNDS.size
    assert client.txn(whole).succeeded
    too_long = Txn((), (Put(b"k", b"v" * BOUNDS.size),))
    with pytest.raises(Bug, match="bytes"):
        check(too_long, BOUNDS)
