"""What passes for an answer of etcd, message by message: a wrong one is told from the right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.answers import Nonsense, check, check_events

HEADER: Final = pb.ResponseHeader(cluster_id=1, revision=100)


def kv(key: bytes, create: int = 7, mod: int = 9) -> pb.KeyValue:
    return pb.KeyValue(key=key, create_revision=create, mod_revision=mod)


def found(*keys: bytes) -> pb.RangeResponse:
    return pb.RangeResponse(header=HEADER, kvs=[kv(key) for key in keys])


def keep_alive(lease: int, ttl: int) -> pb.LeaseKeepAliveResponse:
    return pb.LeaseKeepAliveResponse(header=HEADER, id=lease, ttl=ttl)


def granted(lease: int, ttl: int) -> pb.LeaseGrantResponse:
    return pb.LeaseGrantResponse(header=HEADER, id=lease, ttl=ttl)


RANGE: Final = pb.RangeRequest(key=b"w/", range_end=b"w0")
ONE: Final = pb.RangeRequest(key=b"w/b")
PAGE: Final = pb.RangeRequest(key=b"w/", range_end=b"w0", limit=1)
ALIVE: Final = pb.LeaseKeepAliveRequest(id=5)
GRANT: Final = pb.LeaseGrantRequest(id=5, ttl=15)

LIES: Final[dict[str, tuple[Any, Any, Any]]] = {
    "a key twice": (RANGE, found(b"w/a", b"w/b"), found(b"w/a", b"w/a")),
    "keys in another order": (RANGE, found(b"w/a", b"w/b"), found(b"w/b", b"w/a")),
    "a key behind the end": (RANGE, found(b"w/a"), found(b"w0")),
    "another key": (ONE, found(b"w/b"), found(b"w/bb")),
    "more than a page": (PAGE, found(b"w/a"), found(b"w/a", b"w/b")),
    "another lease": (ALIVE, keep_alive(5, 15), keep_alive(6, 15)),
    "a day and more": (ALIVE, keep_alive(5, 24 * 3600), keep_alive(5, 24 * 3600 + 1)),
    "another grant": (GRANT, granted(5, 15), granted(6, 15)),
    "a grant of no time": (GRANT, granted(5, 15), granted(5, 0)),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_was_not_asked_for_is_no_answer(lie: str) -> None:
    request, truth, wrong = LIES[lie]
    check(request, truth)
    with pytest.raises(Nonsense):
        check(request, wrong)


def _back(told: pb.WatchResponse) -> None:
    told.events[1].kv.mod_revision = 8


def _elsewhere(told: pb.WatchResponse) -> None:
    told.events[0].kv.key = b"w0"


def _never_made(told: pb.WatchResponse) -> None:
    told.events[0].kv.create_revision = 0


@pytest.mark.parametrize("change", [_back, _elsewhere, _never_made])
def test_what_was_not_watched_is_not_heard(change: Callable[[pb.WatchResponse], None]) -> None:
    request = pb.WatchCreateRequest(key=b"w/", range_end=b"w0")
    told = pb.WatchResponse(
        header=HEADER, events=[pb.Event(kv=kv(b"w/b")), pb.Event(kv=kv(b"w/a"))]
    )
    check_events(request, told)
    change(told)
    with pytest.raises(Nonsense):
        check_events(request, told)
