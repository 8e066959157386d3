"""The FUSE layer under requests that no kernel would send, and under some that one would.

`DLMFS_FUZZ_SEEDS=N` tries N seeds, from `DLMFS_FUZZ_FIRST` on (0). A failure prints its steps.
"""

from __future__ import annotations

import os

import pytest

from tests.fuse import fuzz

# What this module provokes is logged, by design; errors are a finding of the fuzzer's own.
pytestmark = pytest.mark.allow_warnings

SEEDS = int(os.environ.get("DLMFS_FUZZ_SEEDS", "400"))
FIRST = int(os.environ.get("DLMFS_FUZZ_FIRST", "0"))
PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
def test_no_sequence_of_requests_breaks_the_daemon(part: int) -> None:
    for seed in range(FIRST + part, FIRST + SEEDS, PARTS):
        made = fuzz.plan(seed)
        finding, _ = fuzz.run(made)
        assert finding is None, f"seed {seed}: {fuzz.report(made)}"
