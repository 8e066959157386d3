"""Every row of the tables of kernel-behaviour, on a real mount (rows.py, probes_*.py)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.nodes import Nodes
from tests.kernel.probes_files import FILES
from tests.kernel.probes_names import NAMES
from tests.kernel.rows import EXCEPTIONS, ROWS, Row
from tests.kernel.tools import scratch

pytestmark = [pytest.mark.fuse, pytest.mark.root]

SECTIONS = {**NAMES, **FILES}
Answers = dict[tuple[str, str], object]


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    """All probes, once; a section that breaks off leaves its later rows without an answer."""
    with scratch() as folder:
        nodes = Nodes(folder)
        try:
            mount = nodes.mount("a")
            (mount / "dom").mkdir(0o755)
            yield dict(_ask(mount))
        finally:
            os.chdir("/")
            nodes.close()


def _ask(mount: Path) -> Iterator[tuple[tuple[str, str], object]]:
    for section, probe in SECTIONS.items():
        try:
            for name, answer in probe(mount):
                yield (section, name), answer
        except Exception as error:
            yield (section, "broke off"), error


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {row.probe}")
def test_row(row: Row, answers: Answers) -> None:
    key = (row.section, row.probe)
    assert key in answers, answers.get((row.section, "broke off"))
    if row.ground is None:
        assert answers[key] == row.kernel
    else:
        assert answers[key] == row.ours, f"{row.ground}: {row.why}"
        assert row.ours != row.kernel, "no exception any more: say so in rows.py"


def test_every_probe_has_its_row(answers: Answers) -> None:
    assert set(answers) == {(row.section, row.probe) for row in ROWS}


def test_exceptions_are_counted() -> None:
    grounds = Counter(row.ground for row in ROWS if row.ground is not None)
    assert grounds == EXCEPTIONS
    assert all(row.why for row in ROWS if row.ground is not None)
