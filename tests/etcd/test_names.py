"""The longest names on a real etcd: its keys and requests take them, many in one commit."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from tests.etcd.mounts import EtcdNodes

pytestmark = pytest.mark.fuse


def test_locks_and_values_of_the_longest_names_move(nodes: EtcdNodes) -> None:
    domain = "d" * 63
    a, b = nodes.mount("a"), nodes.mount("b")
    for node in (a, b):
        (node / domain).mkdir()
    names = [os.fsdecode((b"%d" % n).ljust(255, b"\xff")) for n in range(40)]
    with ExitStack() as stack:
        for name in names:
            fd = os.open(a / domain / name, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, fd)
            os.write(fd, os.fsencode(name)[:2])
    for name in names:
        fd = os.open(b / domain / name, os.O_RDWR | os.O_CREAT)
        assert os.read(fd, 64) == os.fsencode(name)[:2].ljust(64, b"\0"), name
        os.close(fd)
    for node in (a, b):
        for name in names:
            os.unlink(node / domain / name)
        (node / domain).rmdir()
