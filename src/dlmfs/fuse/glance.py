"""What a mount tells by itself, where its daemon cannot be asked: a look at it, bounded in time.

A socket, a file or a process that is not to be seen here says nothing about the daemon: a container
has a /run, a /dev/shm and processes of its own. The kernel's own answer on the mount does: ENOTCONN,
and nothing else, is a dead daemon. A look sleeps, at times unkillably, while the daemon is stopped;
so it is another process that looks (`glance_child`), which is left to itself if it takes too long.
"""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from typing import Any, Final, NamedTuple

from dlmfs.fuse import glance_child
from dlmfs.fuse.mountinfo import MountEntry, mounts, resolve

PATIENCE_S: Final = 2.0
"""A mount that does not answer for so long is taken for alive: its daemon is stopped or busy."""
REAP_S: Final = 0.1

Facts = dict[str, Any]


class Life(enum.Enum):
    """What a look at a mount says of its daemon."""

    DEAD = "dead"
    ALIVE = "alive"
    SILENT = "silent"
    UNTOLD = "untold"
    """The kernel has not asked it: this user is not let in, or another mount covers this one."""
    OVER = "over"
    """It is not mounted any more."""


class Glance(NamedTuple):
    """`told`: the attributes that were asked for and answered, as `glance_child` gives them."""

    life: Life
    told: Facts


def look(entry: MountEntry, wanted: Facts | None = None) -> Glance:
    """Look at a dlmfs mount. `wanted`: what more to ask: `status` and `locks`, if true; `lock`, a
    domain's name and a lock's (see `glance_child`). Never longer than `PATIENCE_S`, and a little."""
    here = resolve(entry.mountpoint)[1]
    if here is None or here.id != entry.id:
        covered = any(each.id == entry.id for each in mounts())
        return Glance(Life.UNTOLD if covered else Life.OVER, {})
    question = json.dumps(
        {"mountpoint": entry.mountpoint, "for_s": PATIENCE_S / 2} | (wanted or {})
    )
    # mount(8) starts its helper without PATH, and Python may not know then where it is itself.
    python = sys.executable or os.path.realpath("/proc/self/exe")
    try:
        child = subprocess.Popen(
            [python, "-I", "-S", glance_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )
    except OSError:  # in a mount namespace that was entered it need not be there
        return Glance(Life.UNTOLD, {})
    try:
        out, _ = child.communicate(question.encode(), PATIENCE_S)
    except subprocess.TimeoutExpired:
        _abandon(child)
        return Glance(Life.SILENT, {})
    told: Facts = json.loads(out) if child.returncode == 0 else {"life": Life.UNTOLD.value}
    return Glance(Life(told.pop("life")), told)


def _abandon(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    try:
        child.wait(REAP_S)
    except subprocess.TimeoutExpired:
        child.returncode = 0  # it dies when the daemon goes on; do not warn about it


def is_dead(entry: MountEntry) -> bool:
    """Whether the daemon of a dlmfs mount is dead for sure."""
    return look(entry).life is Life.DEAD
