"""The list of mutants follows the code. That each is caught is `scripts/mutants`' to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.rows import MUTANTS
from tests.mutants.run import ROOT, SOURCES


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutants_text_stands_once_and_its_tests_exist(mutant: Mutant) -> None:
    assert mutant.applied((ROOT / SOURCES / mutant.file).read_text())
    assert mutant.tests
    for test in mutant.tests:
        file, *names = test.split("[")[0].split("::")
        assert (ROOT / file).exists(), test
        text = Path(ROOT, file).read_text() if names else ""
        assert all(f"def {name}(" in text for name in names), test


def test_names_are_used_once() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
