"""`dlmfs doctor [--json] [MOUNTPOINT|SOURCE]`: is everything there, and how to mend what is not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Final

from dlmfs.cli.checks import configured, host, mounted
from dlmfs.cli.checks.finding import LEVELS, WARNINGS, Finding, accept, names, ok
from dlmfs.cli.choice import choose, dlmfs_mounts, of_others
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say, say_json
from dlmfs.config import EtcdSource, LocalSource, MountOptions, Source, parse_options, parse_source
from dlmfs.fuse.mountinfo import MountEntry

ACCEPTED: Final = "DLMFS_DOCTOR_ACCEPT"
EXITS = {"ok": 0, "warn": 1, "fail": 69}


def run(args: list[str]) -> int:
    """Exit 0: all is well; 1: there are warnings; 69: something does not work."""
    listed = "\n".join(f"  {name:16} {what}" for name, what in WARNINGS.items())
    parser = Parser(
        prog="dlmfs doctor",
        description="Checks what a mount and a cluster need: of this host and all its mounts, or of one "
        "mount, or of a SOURCE before it is mounted. Says how to mend what it finds.",
        epilog="exit codes: 0 all is well, or accepted; 1 warnings only; 69 something does not work.\n\n"
        f"warnings, by name:\n{listed}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="for programs: a list of findings")
    parser.add_argument("-q", "--quiet", action="store_true", help="only what is not well")
    parser.add_argument(
        "-o", dest="options", metavar="OPT[,OPT...]", action="append", default=[],
        help="as for mounting SOURCE: ttl=, ca=, cert=, key=, credentials=",
    )  # fmt: skip
    parser.add_argument(
        "--accept", metavar="NAME[,NAME...]", action="append", default=[],
        help=f"warnings that are known and count as ok; besides those in ${ACCEPTED}",
    )  # fmt: skip
    parser.add_argument("what", metavar="MOUNTPOINT|SOURCE", nargs="?")
    parsed = parser.parse_args(args)
    accepted = names([*parsed.accept, os.environ.get(ACCEPTED, "")])
    findings = []
    for found in _checks(parsed.what, parse_options(parsed.options)):
        finding = accept(found, accepted)
        if parsed.quiet and finding.level == "ok":
            continue
        findings.append(finding)
        if not parsed.json:
            say(*render(finding), flush=True)
    worst = max((finding.level for finding in findings), key=LEVELS.index, default="ok")
    if parsed.json:
        say_json([finding._asdict() for finding in findings])
    else:
        count = {level: sum(f.level == level for f in findings) for level in LEVELS}
        say(f"failures: {count['fail']}, warnings: {count['warn']}")
    return EXITS[worst]


def render(finding: Finding) -> list[str]:
    """One finding for people."""
    name = f"  [{finding.name}{', accepted' * finding.accepted}]" if finding.name else ""
    lines = [f"{finding.level:4}  {finding.about}: {finding.says}{name}"]
    return lines if not finding.mend or finding.accepted else [*lines, f"      -> {finding.mend}"]


def _checks(what: str | None, options: MountOptions) -> Iterator[Finding]:
    source: Source | None = LocalSource(None, "default") if what is None else None
    entries: list[MountEntry] = []
    others: list[MountEntry] = []
    if what is None:
        entries, others = dlmfs_mounts()
    elif what == "local" or what.startswith(("local:", "etcd:")):
        source = parse_source(what)
    else:
        entries = [choose(what)]
    etcd = isinstance(source, EtcdSource) or any(e.source.startswith("etcd:") for e in entries)
    yield from host.check(etcd=etcd)
    yield from configured.check()
    if source is not None:
        if isinstance(source, EtcdSource):
            from dlmfs.cli.checks import etcd as cluster

            yield from cluster.check(source, options)
        else:
            from dlmfs.cli.checks import local

            yield from local.check(source)
    for entry in entries:
        yield from mounted.check(entry)
    if others:
        yield ok("mounts", of_others(others))
