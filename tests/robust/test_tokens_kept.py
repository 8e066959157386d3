"""Real mounts before and after the loss of their state, with a clock that was ahead then."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dlmfs import fstype
from dlmfs.store import schema
from tests.fs.nodes import DLMFS, PATIENCE_S

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(120)]

UNSHARE = "unshare --mount --propagation private --pid --fork --kill-child --mount-proc".split()
AHEAD = 86400 * 1_000_000 // schema.TICK_US

SCRIPT = """
set -e
mkdir lib state m
mount --bind lib /var/lib
$DLMFS mount local:$PWD/state/state.db m -o holder=file
mkdir m/dom
$DLMFS lock m/dom/x -- sh -c 'echo $DLMFS_TOKEN'
$DLMFS umount m
$PYTHON -c '
import sqlite3, sys
with sqlite3.connect("lib/dlmfs/tokens.db") as conn:
    conn.execute("UPDATE mark SET revision = revision + ?", (int(sys.argv[1]),))
    print(*conn.execute("SELECT revision FROM mark").fetchone())
' $AHEAD
rm -r state/*
$DLMFS mount local:$PWD/state/state.db m -o holder=file
mkdir m/dom
$DLMFS lock m/dom/x -- sh -c 'echo $DLMFS_TOKEN'
$DLMFS status m | grep -c tokens: || true
$DLMFS umount m
"""


def test_a_state_that_was_lost_goes_on_above_what_was_given(tmp_path: Path) -> None:
    """A day behind it would take a day until a resource that checks tokens lets anybody in."""
    if fstype.fs_type(tmp_path) in fstype.VOLATILE:
        pytest.skip("the tests' folder is in memory, where no mark is kept")
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", SCRIPT],
        cwd=tmp_path,
        env={
            "DLMFS": " ".join(DLMFS),
            "PYTHON": DLMFS[0],
            "AHEAD": str(AHEAD),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    before, mark, after, complaints = map(int, done.stdout.split())
    assert before < (mark - AHEAD) << 16
    assert mark << 16 < after < mark + AHEAD << 16
    assert complaints == 0
