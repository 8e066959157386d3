"""Fixtures: the programs, two nodes, and runs on them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.fs.conftest import nodes as nodes
from tests.fs.nodes import Nodes
from tests.o2dlm.programs import LINKED, Programs, Run, build, missing, o2dlm_run

Begin = Callable[..., Run]
Start = Callable[..., Run]


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    lack = missing()
    if lack is not None:
        if os.environ.get("DLMFS_NO_SKIP"):
            pytest.fail(lack)
        pytest.skip(lack)
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-o2dlm-"))
    folder.chmod(0o755)  # other users run them too
    try:
        yield build(folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=list(LINKED))
def linked(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def at(nodes: Nodes) -> Path:
    """A folder in the place of /dlm."""
    made = nodes.folder / "dlm"
    made.mkdir()
    return made


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`begin(command, cwd=None)`: a run that is over with the test."""
    with contextlib.ExitStack() as stack:

        def made(command: Sequence[str | Path], cwd: Path | None = None) -> Run:
            run = Run(command, cwd)
            stack.callback(run.close)
            return run

        yield made


@pytest.fixture
def start(begin: Begin, programs: Programs, at: Path) -> Start:
    """`start(mount, linked="dynamic", cwd=None)`: the program of commands on that node."""

    def made(where: Path, linked: str = "dynamic", cwd: Path | None = None) -> Run:
        program = programs.path("prog", linked)
        return begin(o2dlm_run("-m", where, "--at", at, "--", program), cwd)

    return made
