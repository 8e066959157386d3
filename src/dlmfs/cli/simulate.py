"""`dlmfs simulate`: whole clusters in one thread, from a seed (docs/simulation.md)."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dlmfs.cli.parser import Parser
from dlmfs.cli.say import progress, remark, say, say_json
from dlmfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dlmfs.sim.campaign import Totals
    from dlmfs.sim.planted import Planted
    from dlmfs.sim.run import Outcome
    from dlmfs.sim.scenario import Scenario

RELEASE_SEEDS: Final = 100_000
FAILED: Final = 1


def run(args: list[str]) -> int:
    """0: every promise was kept and every planted bug caught. 1: not so. UsageError."""
    parsed = _parse(args)
    if parsed.seed is not None or parsed.replay is not None:
        return _one(parsed)
    if parsed.exhaustive:
        return _exhaustive(parsed)
    if parsed.planted:
        return _planted(parsed)
    return _campaign(parsed)


def _parse(args: list[str]) -> Namespace:
    parser = Parser(
        prog="dlmfs simulate",
        description="Run whole clusters of 1 to 7 nodes in one thread on a simulated clock and "
        "network, with every fault, and check every promise at every step. Without --seed, --replay, "
        "--planted or --exhaustive: --seeds many, and then every planted bug.",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="one run; a failing one is told and shrunk"
    )
    parser.add_argument("--replay", metavar="FILE", help="one run of a scenario in a file")
    parser.add_argument(
        "--around",
        type=int,
        metavar="N",
        default=0,
        help="with --replay: as many like it, until one fails",
    )
    parser.add_argument(
        "--save", metavar="FILE", help="with --seed: keep the (shrunk) scenario there"
    )
    parser.add_argument("--trace", action="store_true", help="print the history of a good run, too")
    parser.add_argument("--no-shrink", action="store_true", help="leave a failing run as it is")
    parser.add_argument(
        "--plant", metavar="BUG", help="with --seed or --replay: with this planted bug"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", default=200, help="how many (default 200)"
    )
    parser.add_argument("--first", type=int, metavar="N", default=0, help="the first of them (0)")
    parser.add_argument("--no-planted", action="store_true", help="leave the planted bugs out")
    parser.add_argument("--planted", action="store_true", help="the planted bugs alone, as a table")
    parser.add_argument(
        "--exhaustive", action="store_true", help="all interleavings of small scopes"
    )
    parser.add_argument(
        "--all", action="store_true", help="with --exhaustive: the slow scopes, too"
    )
    parser.add_argument("--release", action="store_true", help="100,000 seeds, and a report")
    parser.add_argument(
        "--report", metavar="FILE", help="where to (--release: simulation-report.md)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="the outcome as JSON")
    parsed = parser.parse_args(args)
    if parsed.seeds < 1 or parsed.jobs < 1 or parsed.first < 0:
        raise UsageError("--seeds and --jobs take a number from 1, --first one from 0")
    if parsed.release and parsed.report is None:
        parsed.report = "simulation-report.md"
    for file in filter(None, (parsed.save, parsed.report)):
        _must_be_writable(Path(file))
    if parsed.plant and parsed.seed is None and parsed.replay is None:
        raise UsageError("--plant goes with --seed or --replay; --planted runs them all")
    return parsed


def _must_be_writable(file: Path) -> None:
    """Now, and not after an hour's run. Raises UsageError."""
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"{file} cannot be written: name a file in a folder that you can write to")


# -- one run --------------------------------------------------------------------------------------


def _one(parsed: Namespace) -> int:
    if parsed.plant:
        from dlmfs.sim.planted import plant

        plant(_bug(parsed.plant))
    from dlmfs.sim.neighbours import neighbours
    from dlmfs.sim.run import run as simulate

    for scenario in neighbours(_scenario(parsed), parsed.around):
        outcome = simulate(scenario, trace=True)
        if outcome.failure is not None:
            break
    if outcome.failure is not None and not parsed.no_shrink:
        scenario, outcome = _shrunk(scenario, outcome)
    if parsed.save:
        Path(parsed.save).write_text(scenario.to_json() + "\n", "utf-8")
    if parsed.json:
        say_json(asdict(outcome))
    else:
        _tell(scenario, outcome, trace=parsed.trace)
    return FAILED if outcome.failure is not None else 0


def _bug(name: str) -> Planted:
    from dlmfs.sim.bugs import by_name

    bug = by_name(name)
    if bug is None:
        raise UsageError(f"there is no planted bug {name!r}: `dlmfs simulate --planted` lists them")
    return bug


def _scenario(parsed: Namespace) -> Scenario:
    from dlmfs.sim.scenario import Scenario, draw

    if parsed.replay is None:
        return draw(parsed.seed)
    try:
        return Scenario.from_json(Path(parsed.replay).read_text("utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"cannot replay {parsed.replay}: {error}") from None


def _shrunk(scenario: Scenario, outcome: Outcome) -> tuple[Scenario, Outcome]:
    from dlmfs.sim.run import run as simulate
    from dlmfs.sim.shrink import shrink

    rule = outcome.rule
    remark(f"seed {scenario.seed} fails ({rule}); making it smaller ...")
    smaller, runs = shrink(scenario, lambda candidate: simulate(candidate).rule == rule)
    remark(
        f"{len(scenario.steps)} steps on {scenario.nodes} nodes became {len(smaller.steps)} on "
        f"{smaller.nodes}, in {runs} runs"
    )
    return smaller, simulate(smaller, trace=True)


def _tell(scenario: Scenario, outcome: Outcome, *, trace: bool) -> None:
    if outcome.failure is not None or trace:
        say(f"{scenario.nodes} nodes, holder={','.join(scenario.rules)}, ttl {scenario.ttl_s:g} s,")
        say(f"clock rates {', '.join(f'{rate:.2f}' for rate in scenario.rates)}; {scenario.faults}")
        say(*outcome.history)
    how = f"{outcome.seconds:.1f} s simulated, {outcome.events} events, {outcome.faults} faults"
    if outcome.failure is None:
        say(f"seed {outcome.seed}: every promise kept; {how}")
    else:
        say(*f"seed {outcome.seed}: {outcome.rule}: {outcome.failure}".splitlines())


# -- many -----------------------------------------------------------------------------------------


def _campaign(parsed: Namespace) -> int:
    from dlmfs.sim import campaign, report

    seeds = RELEASE_SEEDS if parsed.release else parsed.seeds
    totals = campaign.sweep(parsed.first, seeds, parsed.jobs, _progress(seeds))
    hunts = [] if parsed.no_planted else campaign.hunt(parsed.jobs)
    missed = [hunt.bug for hunt in hunts if hunt.seed is None]
    if parsed.report:
        today = datetime.now(UTC).date().isoformat()
        Path(parsed.report).write_text(report.release(totals, hunts, today), "utf-8")
    if parsed.json:
        caught = {hunt.bug.name: hunt.seed for hunt in hunts}
        say_json({**asdict(totals), "planted": caught})
    else:
        for text in report.failures(totals):
            say(f"{text}  (`dlmfs simulate --seed` tells how)")
        for bug in missed:
            seeds_of = f"{bug.first} to {bug.first + bug.within - 1}"
            say(f"planted bug {bug.name} was not caught by seeds {seeds_of}: {bug.what}")
        say(report.line(totals, hunts))
    return FAILED if totals.failures or missed else 0


def _progress(seeds: int) -> Callable[[Totals], None]:
    """Tells of a failed seed as soon as it is known: a long campaign need not end for it."""
    told: set[int] = set()

    def tell(totals: Totals) -> None:
        shown = sys.stderr.isatty()
        for seed, rule, _ in totals.failures:
            if seed not in told:
                told.add(seed)
                if shown:
                    progress("", last=False)
                remark(f"seed {seed} fails ({rule})")
        if shown:
            progress(f"{totals.seeds} of {seeds} seeds", last=totals.seeds == seeds)

    return tell


def _planted(parsed: Namespace) -> int:
    from dlmfs.sim import campaign, report

    hunts = campaign.hunt(parsed.jobs)
    if parsed.json:
        say_json({hunt.bug.name: hunt.seed for hunt in hunts})
    else:
        say(*report.planted(hunts))
    return FAILED if any(hunt.seed is None for hunt in hunts) else 0


def _exhaustive(parsed: Namespace) -> int:
    from dlmfs.sim.exhaustive.check import SCOPES, Limit, check

    limit = Limit(seconds=600.0, states=30_000_000) if parsed.all else Limit()
    scopes = [scope for scope in SCOPES if scope.quick or parsed.all]
    states = transitions = 0
    bad: list[str] = []
    for scope in scopes:
        result = check(scope, limit)
        states, transitions = states + result.states, transitions + result.transitions
        if result.violation is not None or not result.complete:
            bad.append(scope.name)
        found = "a violation" if result.violation is not None else "all well"
        how = "complete" if result.complete else "not complete"
        say(f"{scope.name}: {found}; {result.states} states, {how}, {result.seconds:.1f} s")
        if result.violation is not None:
            say(*str(result.violation).splitlines())
    say(
        f"{len(scopes)} scopes, {len(bad)} not proved; {states} states, {transitions} transitions",
        flush=True,
    )
    return FAILED if bad else 0
