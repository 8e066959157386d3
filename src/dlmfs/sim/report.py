"""What a campaign found, in words: one line of totals, the table of planted bugs, the release report."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dlmfs.sim.campaign import Hunt, Totals

YEAR_S = 365.25 * 86400


def line(totals: Totals, hunts: Sequence[Hunt]) -> str:
    """The last line of a campaign."""
    caught = sum(hunt.seed is not None for hunt in hunts)
    planted = f", {caught} of {len(hunts)} planted bugs caught" if hunts else ""
    return (
        f"{totals.seeds} seeds, {len(totals.failures)} failed{planted}; {totals.events} events, "
        f"{totals.faults} faults, {totals.grants} grants, {totals.judged} operations judged, "
        f"{totals.seconds / 86400:.1f} simulated days, {totals.speed:.0f} simulated s per CPU s"
    )


def failures(totals: Totals, most: int = 20) -> list[str]:
    """A line for each failed seed."""
    lines = [f"seed {seed}: {rule}: {text}" for seed, rule, text in totals.failures[:most]]
    if len(totals.failures) > most:
        lines.append(f"... and {len(totals.failures) - most} more")
    return lines


def planted(hunts: Sequence[Hunt]) -> list[str]:
    """The planted bugs as a table: within how many seeds each must be caught, and what caught it."""
    rows = [
        "| bug | what it breaks | within seeds | caught by seed | check |",
        "| --- | --- | --- | --- | --- |",
    ]
    for hunt in hunts:
        bug = hunt.bug
        seed = "**not caught**" if hunt.seed is None else str(hunt.seed)
        within = f"{bug.first} to {bug.first + bug.within - 1}"
        rows.append(f"| {bug.name} | {bug.what} | {within} | {seed} | {hunt.rule} |")
    return rows


def release(totals: Totals, hunts: Sequence[Hunt], when: str) -> str:
    """The report of a release, in Markdown. `when`: the day."""
    margin = "-" if totals.margin is None else f"{totals.margin:.2f} lease times"
    rows = [
        ("seeds", f"{totals.seeds}"),
        ("violations", f"{len(totals.failures)}"),
        ("events", f"{totals.events:.3g}"),
        ("faults injected", f"{totals.faults:.3g}"),
        ("grants, reads, writes", f"{totals.grants}, {totals.reads}, {totals.writes}"),
        ("commits, each checked", f"{totals.commits}"),
        ("operations judged as histories", f"{totals.judged}"),
        ("simulated cluster time", f"{totals.seconds / YEAR_S:.2f} years"),
        ("simulated seconds per CPU second", f"{totals.speed:.0f}"),
        ("events per CPU second", f"{totals.events / max(totals.cpu_s, 1e-9):.0f}"),
        (
            "CPU time, wall time",
            f"{totals.cpu_s:.0f} s, {totals.wall_s:.0f} s, {os.cpu_count()} CPUs",
        ),
        ("least time between a last answer and its lease's end", margin),
        ("planted bugs caught", f"{sum(h.seed is not None for h in hunts)} of {len(hunts)}"),
    ]
    text = [f"# Simulation report, {when}", "", "| measure | |", "| --- | --- |"]
    text += [f"| {name} | {value} |" for name, value in rows]
    if totals.failures:
        text += ["", "## Failed seeds", "", *(f"* {one}" for one in failures(totals, 200))]
    text += ["", "## Planted bugs", "", *planted(hunts), ""]
    return "\n".join(text)
