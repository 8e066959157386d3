"""Every tool of the table, on a lock that is idle and on one that another node holds."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.tools.bench import Bench, Case, Done, until
from tests.tools.rows import FINE, ROWS, SAME, WAITS, Row, table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tools.md"
LEVELS = {"nothing": "NL", "shared": "PR", "exclusive": "EX"}

rows = pytest.mark.parametrize("row", ROWS, ids=[row.command.split("\n")[0] for row in ROWS])


def need(row: Row) -> None:
    if shutil.which(row.tool) is None:
        pytest.skip(f"{row.tool} is missing: install the package {row.package or row.tool}")
    if row.tool == "chown" and os.getuid():
        pytest.skip("needs root")


def check(done: Done, result: str) -> None:
    if result == FINE:
        assert (done.code, done.err if done.code else "") == (0, "")
    else:
        assert done.code != 0
        assert result in done.err


@pytest.mark.fuse
@rows
def test_on_an_idle_lock(bench: Bench, row: Row) -> None:
    """It does what the table says, and takes what the table says: the level stays cached."""
    need(row)
    with bench.case() as case:
        with case.run(row) as tool:
            done = tool.end()
        check(done, row.idle)
        assert row.shows in done.out
        if case.lock.exists():
            assert case.level() == LEVELS[row.takes.removeprefix("try ")]


@pytest.mark.fuse
@rows
def test_on_a_lock_that_another_node_holds(bench: Bench, row: Row) -> None:
    """It ends by itself, or waits in open(2), and then Ctrl-C ends it and its wait."""
    need(row)
    with bench.case() as case:
        holder = case.hold_elsewhere()
        with case.run(row) as tool:
            if row.busy == WAITS:
                until("it waits", lambda: tool.process.poll() is not None or waits(case))
                assert tool.process.poll() is None, tool.end()
                tool.interrupt()
                assert tool.end().code != 0
                until("its wait is over", lambda: not waits(case))
            else:
                check(tool.end(), row.idle if row.busy == SAME else row.busy)
        if case.lock.exists():
            assert case.level() == "NL"
        assert holder.process.poll() is None


def waits(case: Case) -> bool:
    """Whether a process waits for the lock, which a tool may also have removed."""
    return case.lock.exists() and case.waiters() != []


def test_the_docs_have_the_same_table() -> None:
    """docs/tools.md is what these rows say, line by line."""
    lines = re.findall(r"^\|.*\|$", DOCS.read_text(), re.MULTILINE)
    assert lines == table()
