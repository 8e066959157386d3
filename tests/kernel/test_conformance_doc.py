"""docs/dlmfs-conformance.md names tests that exist, for every sentence and every point."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.kernel.rows import EXCEPTIONS, ROWS

TESTS = Path(__file__).resolve().parent.parent
TEXT = (TESTS.parent / "docs/dlmfs-conformance.md").read_text()
SENTENCES, POINTS = 38, 34


def lines(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    part = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_tables_are_complete() -> None:
    sentences, points = lines("dlmfs.txt"), lines("Points that surprise in the kernel")
    assert (len(sentences), len(points)) == (SENTENCES, POINTS)
    numbers = [int(row[0]) for row in sentences]
    assert numbers == sorted(numbers)
    assert len({row[0] for row in points}) == POINTS
    assert all(len(row) == 4 and row[1] and row[2] for row in (*sentences, *points))


def test_every_named_test_exists() -> None:
    sections = {row.section for row in ROWS}
    for row in (*lines("dlmfs.txt"), *lines("Points that surprise in the kernel")):
        for name in row[2].split(", "):
            if name.startswith("rows "):
                assert name.removeprefix("rows ") in sections, name
                continue
            path, _, function = name.partition("::")
            tree = ast.parse((TESTS / path).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in functions, name


def test_the_counts_in_the_text_are_those_of_the_rows() -> None:
    numbers = [int(n) for n in re.findall(r"(\d+)\s+rows|(\d+) of them", TEXT)[0] if n]
    assert numbers == [len(ROWS)]
    assert f"{sum(EXCEPTIONS.values())} of them exceptions" in TEXT
