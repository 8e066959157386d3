"""Fixtures: two nodes that the tests of a module share, each test with locks of its own; and whole
nodes for tests that harm them."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fs.conftest import nodes as nodes
from tests.fs.nodes import Nodes
from tests.waiting.agents import at_rest, until


class Twice(NamedTuple):
    """One lock, as each of two nodes shows it."""

    a: Path
    b: Path


@pytest.fixture(scope="module", params=["node", "file"])
def _pair(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir=base))
    try:
        with closing(Nodes(folder)) as made:
            yield made.pair(f"holder={request.param}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_numbers = itertools.count(1)


@pytest.fixture
def lock(_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Twice]:
    """A new lock; the first node's mount is the one that is found. Afterwards nobody holds or
    awaits it: nothing leaked."""
    name = f"dom/lock{next(_numbers)}"
    monkeypatch.setenv("DLMFS_MOUNT", str(_pair[0]))
    made = Twice(_pair[0] / name, _pair[1] / name)
    yield made
    for path in made:
        until(lambda path=path: at_rest(path), f"{path} is free again")  # type: ignore[misc]
