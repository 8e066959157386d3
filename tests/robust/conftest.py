"""Fixtures: real nodes, and a guard that nothing of a test outlives it."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.conftest import nodes as nodes
from tests.robust.helpers import LONG, below, daemons_below, ended, finish, tmpfs, watched

HANG_S = 500 if LONG else 100
"""Less than the time-out of any test."""


@pytest.fixture
def tiny() -> Iterator[Path]:
    """A file system of 16 MB: twice of what SQLite's log takes before its space is used again."""
    with tmpfs("mode=700,size=16m") as folder:
        yield folder


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    """Folders of the test. Every mount below them and every daemon is gone after it; if not, they
    go now. (Only those: other runs on this machine have mounts as well.)"""
    made: list[Path] = []

    def end_daemons() -> None:
        for folder in made:
            for pid in daemons_below(folder):
                finish(pid)

    # A system call that a daemon never answers cannot even be killed: end the daemon instead.
    rescue = threading.Timer(HANG_S, end_daemons)
    rescue.daemon = True
    rescue.start()
    yield made
    rescue.cancel()
    rescue.join()
    left: list[str | int] = []
    for folder in made:
        for pid in daemons_below(folder):
            with contextlib.suppress(ProcessLookupError), watched(pid) as handle:
                if not ended(handle):
                    left.append(pid)
                    finish(pid)
        for point in below(folder):
            left.append(point)
            subprocess.run(["umount", "-l", point], check=False)
    assert not left, f"left: {left}"


@pytest.fixture(autouse=True)
def _nothing_left(folders: list[Path], request: pytest.FixtureRequest) -> None:
    """Set up before `nodes`, `folders` is torn down after it."""
    if "nodes" in request.fixturenames:
        folders.append(request.getfixturevalue("nodes").folder)
