"""What a check says."""

from __future__ import annotations

import difflib
from typing import Final, NamedTuple

from dlmfs.errors import UsageError

LEVELS: Final = ("ok", "warn", "fail")
WARNINGS: Final = {
    "certificate": "a certificate ends soon",
    "clock": "the clock source is slow",
    "dead-files": "files of dead daemons",
    "dead-node": "a node of the state file is dead, and nobody has seen it yet",
    "domain-left": "a domain without nodes, with values",
    "doubtful-values": "values whose last exclusive holder died",
    "etcd-files": "certificates or credentials that are no good",
    "etcd-plain": "what is said to etcd is not encrypted",
    "etcd-size": "etcd's database is large",
    "etcd-version": "a version of etcd with known lease bugs",
    "fault": "an exception inside the daemon",
    "fuse-conf": "/etc/fuse.conf cannot be read",
    "holder": "nodes differ in holder=",
    "latency": "the store is slow",
    "lives": "the folder where nodes prove that they live is gone",
    "locks-left": "locks of dead nodes only",
    "netdev": "a line of fstab without _netdev",
    "not-told": "a mount that tells this user nothing",
    "on-lost": "holders that on-lost= does not reach",
    "open-files": "a low bound of open files",
    "sessions": "what a user's daemons keep ends with his sessions",
    "state-mode": "a state file that others can read or write",
    "state-on-disk": "the default state is not in memory",
    "suspend": "this machine was suspended",
    "tokens": "tokens may go back when the state is lost",
    "ttl": "nodes differ in ttl=",
    "unseen": "a daemon that cannot be asked from here",
    "version": "nodes, or programs, of different versions",
}
"""The warnings by their names, which never change: who has accepted one wants to hear of the others."""


class Finding(NamedTuple):
    """`level`: "ok", "warn" (it works, but) or "fail" (it does not, or will not when it matters); `mend`:
    what to do, in one line; `name`: the warning's; `accepted`: it is known, and counts as ok."""

    level: str
    about: str
    says: str
    mend: str = ""
    name: str = ""
    accepted: bool = False


def ok(about: str, says: str) -> Finding:
    return Finding("ok", about, says)


def warn(name: str, about: str, says: str, mend: str) -> Finding:
    assert name in WARNINGS, name
    return Finding("warn", about, says, mend, name)


def fail(about: str, says: str, mend: str) -> Finding:
    return Finding("fail", about, says, mend)


def names(texts: list[str]) -> frozenset[str]:
    """The warnings that a command line accepts. Raises UsageError for an unknown one."""
    found = [name for text in texts for name in text.replace(",", " ").split()]
    for name in found:
        if name not in WARNINGS:
            close = difflib.get_close_matches(name, WARNINGS, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UsageError(
                f"no warning is called '{name}'{hint} (`dlmfs doctor --help` lists them)"
            )
    return frozenset(found)


def accept(finding: Finding, accepted: frozenset[str]) -> Finding:
    """A warning that is known and accepted is no warning; a failure is never."""
    if finding.level == "warn" and finding.name in accepted:
        return finding._replace(level="ok", accepted=True)
    return finding
