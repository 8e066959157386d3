"""Whether a process already holds a lock through an open file (design, engine rule 11).

Asked only when an open would have to wait although this node holds the lock: if the opener holds
it too, it would wait for itself (protocol-traps 5). Answers come from /proc; what it does not
show (other pid namespaces, other users' processes) counts as "no", which is the kernel's rule.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final

ANCESTORS_MAX: Final = 32


def _status(pid: int) -> tuple[int, int] | None:
    """The thread group and the parent of a thread, or None if /proc does not tell."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)
    try:
        return int(fields[b"Tgid"]), int(fields[b"PPid"])
    except (KeyError, ValueError):
        return None


def _lineage(pid: int) -> Iterator[int]:
    """The thread group of `pid`, its parent's, and so on up."""
    for _ in range(ANCESTORS_MAX):
        known = _status(pid)
        if known is None:
            return
        group, parent = known
        yield group
        if parent <= 1:
            return
        pid = parent


def _has_open(group: int, ino: int, tail: str) -> bool:
    """Whether the process has a descriptor on the inode: also one that it inherited."""
    try:
        fds = os.listdir(f"/proc/{group}/fd")
    except OSError:
        return False
    for fd in fds:
        try:
            # readlink on /proc asks the kernel's caches only, never the mount itself.
            if not os.readlink(f"/proc/{group}/fd/{fd}").endswith(tail):
                continue
            with open(f"/proc/{group}/fdinfo/{fd}") as file:
                info = file.read()
        except OSError:
            continue
        if f"ino:\t{ino}\n" in info:
            return True
    return False


def is_kin(pid: int, holder_pids: Iterable[int], ino: int, path: bytes) -> bool:
    """Whether thread `pid` belongs to a process that holds the lock, or descends from one.

    `holder_pids` are the threads that opened it, `ino` and `path` (below the mount) its file.
    """
    holders = [holder for holder in holder_pids if holder]
    for generation, group in enumerate(_lineage(pid)):
        if generation == 0 and _has_open(group, ino, os.fsdecode(path)):
            return True
        if any(group == h or os.path.exists(f"/proc/{group}/task/{h}") for h in holders):
            return True
    return False


def command(pid: int) -> str:
    """The command name of a thread's process for people to read; empty if it is not known."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""
