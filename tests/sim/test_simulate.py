"""The simulator itself: the same seed is the same run, found faults stay found, failures shrink."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlmfs.cli.main import main
from dlmfs.sim import bugs, planted, report
from dlmfs.sim.campaign import Totals, hunt, sweep
from dlmfs.sim.oracle import Violation
from dlmfs.sim.run import run
from dlmfs.sim.scenario import Scenario, draw
from dlmfs.sim.shrink import shrink

SOURCES = Path(planted.ROOT)
AROUND = "150"
"""Scenarios like a kept one that are tried."""
KEPT = sorted((Path(__file__).parent / "seeds").glob("*.json"))
"""Scenarios that failed once, made small; each named like the planted bug that puts its fault back."""
QUICK = ("blind-change", "mark-forgotten", "lost-notice", "unasked-clock")

SIMULATE = (sys.executable, "-m", "dlmfs", "simulate")


def simulate(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SIMULATE, *args],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SOURCES.parent), "PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize("seed", [0, 7, 151, 926])
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    first, second = (run(draw(seed), trace=True) for _ in range(2))
    assert first == second
    assert first.history


@pytest.mark.parametrize("seed", range(40))
def test_every_promise_is_kept(seed: int) -> None:
    outcome = run(draw(seed))
    assert outcome.failure is None


def test_time_is_a_thousand_times_faster() -> None:
    totals = sweep(0, 100, 2)
    assert totals.failures == []
    assert totals.speed > 1000
    assert totals.grants > 1000
    assert totals.faults > 100


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_a_found_fault_stays_mended(file: Path) -> None:
    scenario = Scenario.from_json(file.read_text())
    assert Scenario.from_json(scenario.to_json()) == scenario
    assert run(scenario).failure is None


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_a_kept_scenario_still_shows_its_fault(file: Path) -> None:
    """Put back, the fault shows, there or near: or the scenario would guard against nothing any more."""
    if bugs.by_name(file.stem) is None:
        pytest.fail(f"{file.name} has the name of no planted bug")
    done = simulate(
        "--replay", str(file), "--plant", file.stem, "--around", AROUND, "--no-shrink", "--json"
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["failure"]


def test_every_planted_bug_has_its_place_in_the_source() -> None:
    names = [bug.name for bug in bugs.BUGS]
    assert len(set(names)) == len(names) >= 25
    for bug in bugs.BUGS:
        source = (SOURCES / bug.file).read_text()
        compile(planted.apply(bug, source), bug.file, "exec")


def test_a_planted_bug_whose_place_is_gone_is_an_error() -> None:
    bug = bugs.BUGS[0]._replace(old="no such line")
    with pytest.raises(ValueError, match="0 times"):
        planted.apply(bug, (SOURCES / bug.file).read_text())


def test_planted_bugs_are_caught() -> None:
    """Some; `scripts/simulate` hunts them all."""
    hunts = hunt(2, [bug for bug in bugs.BUGS if bug.name in QUICK])
    assert [h.bug.name for h in hunts if h.seed is None] == []
    assert len(hunts) == len(QUICK)


def test_an_uncaught_bug_and_a_failed_seed_are_told() -> None:
    bug = bugs.BUGS[0]._replace(old="view", new="view")
    totals = Totals(seeds=3, failures=[(1, "exclusion", "two at once")])
    table = report.release(totals, [], "2000-01-01")
    assert "two at once" in table
    assert "1 failed" in report.line(totals, [])
    assert bug.within


def test_shrinking_leaves_what_matters() -> None:
    scenario = draw(64)
    needed = scenario.steps[5], scenario.steps[50]

    def fails(candidate: Scenario) -> bool:
        left = {(step.verb, step.salt) for step in candidate.steps}
        return all((step.verb, step.salt) in left for step in needed)

    smaller, runs = shrink(scenario, fails)
    assert len(smaller.steps) == 2
    assert smaller.faults == replace(smaller.faults)
    assert runs <= 400


def test_a_failing_seed_is_told_and_made_smaller(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlmfs.sim.checks import Checks

    def refuse(*_args: object, **_options: object) -> None:
        raise Violation("no grant is good enough")

    monkeypatch.setattr(Checks, "_token", refuse)
    assert main(["simulate", "--seed", "3"]) == 1
    told = capsys.readouterr()
    assert "no grant is good enough" in told.out
    assert "EVERYTHING HEALS" in told.out
    assert "making it smaller" in told.err


def test_the_campaign_ends_with_one_line_of_totals() -> None:
    done = simulate("--seeds", "20", "--no-planted", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 seeds, 0 failed; ")


@pytest.mark.parametrize(
    "args",
    [
        ["--seeds", "0"],
        ["--plant", "blind-change"],
        ["--seed", "1", "--plant", "no-such-bug"],
        ["--replay", "/no/such/file"],
        ["--seed", "1", "--save", "/no/such/folder/file"],
        ["--release", "--report", "/no/such/folder/file"],
        ["--seeds", "1", "--report", "/tmp"],
        ["--seeds", "many"],
    ],
)
def test_wrong_arguments(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *args]) == 2
    assert capsys.readouterr().err.startswith("dlmfs: ")


def test_a_scenario_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text('{"format": 0}')
    assert main(["simulate", "--replay", str(file)]) == 2
