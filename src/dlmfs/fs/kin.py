"""Whether a process already holds a lock through an open file (design, engine rule 11).

Asked only when an open would have to wait although this node holds the lock: if the opener holds
it too, it would wait for itself (protocol-traps 5). Answers come from /proc; what it does not
show (other pid namespaces, other users' processes) counts as "no", which is the kernel's rule.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

ANCESTORS_MAX: Final = 32
_FATAL: Final = 1 << (signal.SIGKILL - 1)


def _fields(pid: int) -> dict[bytes, bytes] | None:
    """What /proc says of a thread, or None if it says nothing."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            text = file.read()
    except OSError:
        return None
    return dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)


def _status(pid: int) -> tuple[int, int] | None:
    """The thread group and the parent of a thread, or None if /proc does not tell."""
    fields = _fields(pid)
    try:
        if fields is None:
            return None
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


def fate(pid: int) -> int | None:
    """The thread group of a thread that will go on living; None if it is unknown or about to die.

    A signal that ends a process shows as a pending SIGKILL in each of its threads.
    """
    fields = _fields(pid) if pid else None
    if fields is None:
        return None
    try:
        pending = int(fields[b"SigPnd"], 16) | int(fields[b"ShdPnd"], 16)
        return None if pending & _FATAL else int(fields[b"Tgid"])
    except (KeyError, ValueError):
        return None


def _device(group: int, info: str) -> str:
    """The device number (as in mountinfo) that a descriptor's mount has for its process."""
    mount = next((x.split()[1] for x in info.splitlines() if x.startswith("mnt_id:")), "")
    try:
        with open(f"/proc/{group}/mountinfo") as file:
            return next((x.split()[2] for x in file if x.split(" ", 1)[0] == mount), "")
    except OSError:
        return ""


def _has_open(group: int, ino: int, tail: str, device: str) -> bool:
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
        # Another mount may have the same number under the same name.
        if f"ino:\t{ino}\n" in info and _device(group, info) == device:
            return True
    return False


def is_kin(pid: int, holder_pids: Iterable[int], ino: int, path: bytes, device: str) -> bool:
    """Whether thread `pid` belongs to a process that holds the lock, or descends from one.

    `holder_pids` are the threads that opened it, `ino` and `path` (below the mount) its file,
    `device` the mount's device number, as in mountinfo.
    """
    holders = [holder for holder in holder_pids if holder]
    for generation, group in enumerate(_lineage(pid)):
        if generation == 0 and _has_open(group, ino, os.fsdecode(path), device):
            return True
        if any(group == h or os.path.exists(f"/proc/{group}/task/{h}") for h in holders):
            return True
    return False


class Process(NamedTuple):
    """For people: `pid` names the process of a thread, `state` is its letter as in ps(1)."""

    pid: int
    command: str
    state: str


def process(thread: int) -> Process | None:
    """The process of a thread; None if /proc does not tell, or it is gone."""
    fields = _fields(thread) if thread else None
    try:
        if fields is None:
            return None
        pid = int(fields[b"Tgid"])
        if pid != thread:
            fields = _fields(pid) or fields
        name = os.fsdecode(fields[b"Name"].strip())
        return Process(pid, name, fields[b"State"].split()[0].decode())
    except (KeyError, ValueError, IndexError):
        return None


def family(pid: int, most: int) -> dict[int, int]:
    """The threads of a process and of its descendants, each with its process; at most `most`.

    Descendants are found where the kernel tells children (CONFIG_PROC_CHILDREN, nearly everywhere).
    """
    found: dict[int, int] = {}
    todo = [pid]
    while todo:
        group = todo.pop()
        try:
            threads = [int(name) for name in os.listdir(f"/proc/{group}/task")]
        except OSError:
            continue  # it has ended
        for thread in threads:
            if len(found) >= most:
                return found
            found[thread] = group
            try:
                with open(f"/proc/{group}/task/{thread}/children") as file:
                    todo += [int(child) for child in file.read().split()]
            except OSError:
                continue
    return found


def has_open(pid: int, ino: int, path: bytes, device: str) -> bool:
    """Whether a process has the file open, if only by a descriptor that it inherited. See `is_kin`."""
    return _has_open(pid, ino, os.fsdecode(path), device)


def user(thread: int) -> int | None:
    """Whose process a thread is of, by its effective user id; None if /proc does not tell."""
    try:
        return os.stat(f"/proc/{thread}").st_uid
    except OSError:
        return None


def command(pid: int) -> str:
    """The command name of a thread's process for people to read; empty if it is not known."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""
