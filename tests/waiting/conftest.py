"""Fixtures: nodes that these tests share, agents that open locks, and a guard that nothing
outlives them."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fs.conftest import nodes as nodes
from tests.fs.nodes import Nodes
from tests.robust.helpers import below, daemons_below, ended, finish, watched
from tests.waiting.agents import Agent, at_rest, until

MakeAgent = Callable[[], Agent]


def swept(folder: Path) -> list[str | int]:
    """End every daemon and mount below a folder that should have ended by itself; what it was."""
    left: list[str | int] = []
    for pid in daemons_below(folder):
        with contextlib.suppress(ProcessLookupError), watched(pid) as handle:
            if not ended(handle):
                left.append(pid)
                finish(pid)
    for point in below(folder):
        left.append(point)
        subprocess.run(["umount", "-l", point], check=False)
    return left


@pytest.fixture
def _folders() -> Iterator[list[Path]]:
    folders: list[Path] = []
    yield folders
    left = [one for folder in folders for one in swept(folder)]
    assert not left, f"left: {left}"


@pytest.fixture(autouse=True)
def _nothing_left(_folders: list[Path], request: pytest.FixtureRequest) -> None:
    """Set up before `nodes`, so `_folders` is looked at after their end."""
    if "nodes" in request.fixturenames:
        _folders.append(request.getfixturevalue("nodes").folder)


class Cluster:
    """Mounts that the tests here share, made when first asked for. Each test has locks of its
    own: a mount costs as much as a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spaces: dict[str, Nodes] = {}
        self._mounts: dict[tuple[str, str], Path] = {}
        self._names = (f"lock{n}" for n in itertools.count(1))
        self.used: set[Path] = set()

    def mount(self, node: str, rule: str) -> Path:
        """The node's mount; nodes of one holder rule are a cluster of their own."""
        if (node, rule) not in self._mounts:
            if rule not in self._spaces:
                (self.folder / rule).mkdir()
                self._spaces[rule] = Nodes(self.folder / rule)
            where = self._spaces[rule].mount(node, f"holder={rule}", "max_lock_waiters=100000")
            (where / "dom").mkdir()
            self._mounts[node, rule] = where
        return self._mounts[node, rule]

    def lock(self, rule: str, nodes: str) -> list[Path]:
        """A new lock: its path at each of the nodes. "abb" names three paths, two of them equal."""
        name = next(self._names)
        paths = [self.mount(node, rule) / "dom" / name for node in nodes]
        self.used.update(paths)
        return paths

    def close(self) -> None:
        for space in self._spaces.values():
            space.close()


@pytest.fixture(scope="package")
def _cluster() -> Iterator[Cluster]:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir=base))
    made = Cluster(folder)
    try:
        yield made
    finally:
        made.close()
        left = swept(folder)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"left: {left}"


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """Shared mounts. Afterwards nobody holds or awaits a lock of this test: none leaked."""
    _cluster.used.clear()
    yield _cluster
    for path in _cluster.used:
        until(lambda path=path: at_rest(path), f"{path.name} is free again")  # type: ignore[misc]


@pytest.fixture
def agent() -> Iterator[MakeAgent]:
    """Makes agents. They are killed at the end if they go on."""
    made: list[Agent] = []

    def make() -> Agent:
        made.append(Agent())
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.kill()
