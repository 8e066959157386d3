"""dlmfs where mount(8) looks for the helper of its type; one test at a time, of all workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.nodes import ROOT

HELPER = Path("/sbin/mount.fuse.dlmfs")


@pytest.fixture
def helper() -> Iterator[Path]:
    """The launcher under its helper's name."""
    folder = os.open(HELPER.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if HELPER.exists():
            pytest.skip(f"{HELPER} exists: not ours to replace")
        HELPER.symlink_to(ROOT / "scripts" / "dlmfs")
        try:
            yield HELPER
        finally:
            HELPER.unlink()
    finally:
        os.close(folder)
