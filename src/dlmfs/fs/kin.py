"""Whether a process already holds a lock through an open file (design, engine rule 11).

Asked only when an open would have to wait although this node holds the lock: if the opener holds
it too, it would wait for itself (protocol-traps 5). First comes what the daemon knows itself, the
threads that opened the lock; then /proc. What that does not show (other pid namespaces, other users'
processes) counts as "no", which is the kernel's rule, and so does what lies beyond a bound: a process
may have as many descriptors as it likes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from dlmfs import proc

ANCESTORS_MAX: Final = 32
HOLDERS_MAX: Final = 256
"""Holders whose processes are looked for among the ancestors."""
DESCRIPTORS_MAX: Final = 256
"""Descriptors of one process that are looked at, the lowest ones."""
_FATAL: Final = 1 << (signal.SIGKILL - 1)


def _lineage(pid: int) -> Iterator[int]:
    """The thread group of `pid`, its parent's, and so on up."""
    for _ in range(ANCESTORS_MAX):
        told = proc.status(pid)
        group, parent = proc.number(told.get(b"Tgid")), proc.number(told.get(b"PPid"))
        if group is None or parent is None:
            return
        yield group
        if parent <= 1:
            return
        pid = parent


def fate(pid: int) -> int | None:
    """The thread group of a thread that will go on living; None if it is unknown or about to die.

    A signal that ends a process shows as a pending SIGKILL in each of its threads.
    """
    told = proc.status(pid) if pid else {}
    own = proc.number(told.get(b"SigPnd"), 16)
    shared = proc.number(told.get(b"ShdPnd"), 16)
    if own is None or shared is None or (own | shared) & _FATAL:
        return None
    return proc.number(told.get(b"Tgid"))


class Question(NamedTuple):
    """Does thread `pid` belong to a process that holds the lock, or descend from one? `holders` are the
    threads that opened it, `ino` and `path` (below the mount) its file, `device` the mount's device
    number, as in mountinfo."""

    pid: int
    holders: frozenset[int]
    ino: int
    path: bytes
    device: str


def has_open(group: int, ino: int, path: bytes, device: str) -> bool:
    """Whether a process has the file open, if only by a descriptor that it inherited."""
    table: bytes | None = None
    for fd in proc.numbers(group, "fd", most=DESCRIPTORS_MAX):
        at = proc.link(group, fd)
        # A name that went by itself is dropped by the kernel a little later: maybe its successor, in use.
        if at is None or not at.removesuffix(b" (deleted)").endswith(path):
            continue
        found = proc.open_file(group, fd)
        if found is None or found.ino != ino or found.is_path_only:
            continue
        # Another mount may have the same number under the same name.
        if table is None:
            table = proc.mount_table(group)
        if proc.device_of(table, found.mount) == device:
            return True
    return False


def is_kin(asked: Question) -> bool:
    """The answer to the question; what /proc does not tell, or not within the bounds, is "no"."""
    holders = asked.holders - {0}
    if asked.pid in holders:
        return True
    lineage = list(_lineage(asked.pid))
    if not holders.isdisjoint(lineage):
        return True
    ancestors = set(lineage)
    if any(proc.group(holder) in ancestors for holder in islice(holders, HOLDERS_MAX)):
        return True
    return bool(lineage) and has_open(lineage[0], asked.ino, asked.path, asked.device)


def answer(_user: object, asked: Question, done: Callable[[bool], None]) -> None:
    """Answer at once, in whatever thread this is."""
    done(is_kin(asked))


class Process(NamedTuple):
    """For people: `pid` names the process of a thread, `state` is its letter as in ps(1)."""

    pid: int
    command: str
    state: str


def process(thread: int) -> Process | None:
    """The process of a thread; None if /proc does not tell, or it is gone."""
    told = proc.status(thread) if thread else {}
    pid = proc.number(told.get(b"Tgid"))
    if pid is None:
        return None
    if pid != thread:
        told = proc.status(pid) or told
    name, state = os.fsdecode(told.get(b"Name", b"")), told.get(b"State", b"").split()
    return Process(pid, name, state[0].decode("ascii", "replace") if state else "")


def family(pid: int, most: int) -> dict[int, int]:
    """The threads of a process and of its descendants, each with its process; at most `most`.

    Descendants are found where the kernel tells children.
    """
    found: dict[int, int] = {}
    todo = [pid]
    while todo:
        group = todo.pop()
        for thread in proc.numbers(group, "task", most=most):
            if len(found) >= most:
                return found
            found[thread] = group
            todo += proc.children(group, thread) or ()
    return found
