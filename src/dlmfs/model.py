"""The nouns of the lock service, shared by every layer. No behaviour beyond lookup tables.

Terms are those of docs/glossary.md: domain, lock resource, LVB, BAST, PR/EX, incarnation, token.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

LVB_SIZE: Final = 64
"""Bytes of a lock value block (dlmfs.txt, "Locking")."""

EMPTY_LVB: Final = bytes(LVB_SIZE)

NODE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

TOKEN_SHIFT: Final = 16
"""A token is `(revision + offset) << TOKEN_SHIFT | local counter` (`core.tokens`), under either owner
rule, so that nodes with different holder rules hand out comparable tokens."""

REVISION_MAX: Final = (1 << (63 - TOKEN_SHIFT)) - 1
"""The largest revision of which tokens can be made that fit 63 bits."""


class Mode(enum.IntEnum):
    """Lock modes, weakest first. A numerically larger mode covers a smaller one."""

    NL = 0
    PR = 1
    EX = 2


class HolderRule(enum.Enum):
    """Who holds a lock: the whole node (dlmfs.txt) or each open file (`-o holder=`)."""

    NODE = "node"
    FILE = "file"


class OnLost(enum.Enum):
    """What is done to the processes that hold locks when their node is fenced (`-o on-lost=`)."""

    NONE = "none"
    TERM = "term"
    KILL = "kill"
    """SIGTERM, and SIGKILL before the store can give the lock to somebody else."""


class DeadValue(enum.Enum):
    """What reads say of a value whose last exclusive holder died (`-o dead-value=`)."""

    KEEP = "keep"
    """The value, as every other."""
    INVALID = "invalid"
    """Nothing, until somebody writes: libo2dlm's LVB_INVALID."""


_STRONGEST_BESIDE: Final = {Mode.NL: Mode.EX, Mode.PR: Mode.PR, Mode.EX: Mode.NL}


def strongest_beside(mode: Mode) -> Mode:
    """The strongest mode that is compatible with `mode`: what a holder may keep."""
    return _STRONGEST_BESIDE[mode]


def compatible(a: Mode, b: Mode) -> bool:
    """Whether two nodes may hold modes `a` and `b` of one lock at the same time."""
    return b <= _STRONGEST_BESIDE[a]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one mount. `user_share` is the percentage of each that one user may take, but for the
    bound of waiters on one lock, which is for each user."""

    max_domains: int = 1_000
    max_locks: int = 1_000_000
    """Lock files in all domains of this mount."""
    max_holders: int = 1_000_000
    """Open lock files; the system's own bound on open files is usually smaller."""
    max_waiters: int = 50_000
    """Opens that wait."""
    max_lock_waiters: int = 256
    """Opens of one user that wait for one lock, whoever he is: jobs that a clock starts behind one that
    is stuck, at 8 MB each."""
    max_state_mb: int = 4096
    """Size of the state above which no new domain or lock file is made."""
    user_share: int = 50
