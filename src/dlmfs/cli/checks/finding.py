"""What a check says."""

from __future__ import annotations

from typing import Final, NamedTuple

LEVELS: Final = ("ok", "warn", "fail")


class Finding(NamedTuple):
    """`level`: "ok", "warn" (it works, but) or "fail" (it does not, or will not when it matters); `mend`:
    what to do, in one line."""

    level: str
    about: str
    says: str
    mend: str = ""


def ok(about: str, says: str) -> Finding:
    return Finding("ok", about, says)


def warn(about: str, says: str, mend: str) -> Finding:
    return Finding("warn", about, says, mend)


def fail(about: str, says: str, mend: str) -> Finding:
    return Finding("fail", about, says, mend)
