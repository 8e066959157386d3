"""Records that no node has put, on a real etcd: each costs what it belongs to, until it is gone."""

from __future__ import annotations

import os
from typing import Final

import pytest

from tests.etcd.mounts import EtcdNodes, errno_of, gone, is_lost, take, until
from tests.fs.nodes import dlmfs

pytestmark = [pytest.mark.fuse, pytest.mark.allow_warnings]

DEEP: Final = b"[" * 100_000
HEAD: Final = b"h/dom/lk"
RECORDS: Final = [
    (b"d/dom/w/a/b/c", b"x"),
    (b"d/dom/w/lk", b"x"),
    (b"d/dom/m/\xff\xfe", b"x"),
    (b"d/dom/m/n\x1b[32m8", b"x"),
    (b"d/dom/w/lk/n9", b'{"v":1,"inc":1,"mode":99,"flags":[]}'),
    (b"d/dom/w/lk/n9", b"garbage"),
    (b"d/dom/m/n9", DEEP),
    (b"d/dom/g/b/lk", DEEP),
    (b"n/a/evict", DEEP),
    (b"n/a/answer/1.1/b", DEEP),
    (HEAD, b'{"v":1,"m":{},"lvb":"aabbcc","ab":null}'),
    (HEAD, b'{"v":1,"m":{"a":[5,9,5]},"lvb":"","ab":null}'),
    (HEAD, DEEP),
]


def test_a_record_costs_what_it_belongs_to(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    held = os.open(b / "dom/held", os.O_RDWR | os.O_CREAT)
    for key, value in RECORDS:
        where = os.fsdecode(f"dlmfs/{nodes.cluster}/".encode() + key)
        take(a / "dom/lk")
        nodes.etcd.ctl("put", "--", where, os.fsdecode(value))
        assert (errno_of(b / "dom/lk") != 0) is (key == HEAD), (key, value)
        for node in (a, b):
            take(node / "dom/other")
            assert nodes.fences(node) == 0, (key, nodes.reason(node))
            assert nodes.is_healthy(node)
        if key.startswith((b"d/dom/w", b"d/dom/m", HEAD)):
            nodes.until_told(b, repr(key)[2:-1].replace("\\", "\\\\"))
        nodes.etcd.ctl("del", "--", where)
        for node in (a, b):
            take(node / "dom/lk")
            nodes.until_told(node, "in the store", told=False)
    assert not is_lost(held)
    os.close(held)
    assert "is not of dlmfs" not in dlmfs("doctor", str(a), check=False).stdout
    nodes.etcd.ctl(
        "put", "--", os.fsdecode(f"dlmfs/{nodes.cluster}/n/".encode() + b"\xff\x1b"), "x"
    )
    said = dlmfs("doctor", nodes.etcd.source(nodes.cluster), check=False).stdout
    assert f"names in use in {nodes.cluster}: a b\n" in said


def test_a_node_s_own_record_ends_that_life_of_it_alone(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    held = os.open(b / "dom/held", os.O_RDWR | os.O_CREAT)
    for key in ("n/a", "d/dom/m/a"):
        mine = os.open(a / "dom/mine", os.O_RDWR | os.O_CREAT)
        nodes.etcd.ctl("put", f"dlmfs/{nodes.cluster}/{key}", "garbage")
        assert gone(mine)
        assert is_lost(mine)
        os.close(mine)
        for node in (b, a):
            take(node / "dom/mine")
            until(lambda node=node: nodes.is_healthy(node))  # type: ignore[misc]
    assert nodes.fences(a) == 1
    assert nodes.fences(b) == 0
    assert not is_lost(held)
    os.close(held)
    nodes.umount(a)
    nodes.umount(b)
    assert not nodes.etcd.all_keys(f"dlmfs/{nodes.cluster}/n/")
