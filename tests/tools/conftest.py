"""Fixtures: real nodes, one pair of them for all the tools, and a folder for what they write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.conftest import nodes as nodes
from tests.fs.nodes import Nodes
from tests.tools.bench import Bench
from tests.tools.notified import Heard


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """Two nodes that serve all tools of a module: each gets a domain of its own."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-tools-", dir=base))
    made = Nodes(folder)
    try:
        yield Bench(made, made.mount("a"), made.mount("b"))
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Heard]:
    end = Heard(tmp_path)
    try:
        yield end
    finally:
        end.close()
