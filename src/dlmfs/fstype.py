"""What kind of file system a place is on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from dlmfs import proc

NETWORK: Final = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p ceph glusterfs lustre afs ocfs2 gfs2 gpfs beegfs orangefs pvfs2"
    " ncpfs coda virtiofs".split()
)
"""File systems whose locks and shared memory do not reach across, or not as SQLite needs them."""


VOLATILE: Final = ("tmpfs", "ramfs")


def fs_type(folder: Path) -> str:
    """The type of the file system that holds `folder`, by the longest mount point above it."""
    where = os.path.realpath(folder)
    best, found = -1, "unknown"
    for line in proc.own_mounts().split(b"\n"):
        left, dash, right = line.partition(b" - ")
        words = left.split(b" ")
        if not dash or len(words) < 6:
            continue
        raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 0xFF]), words[4])
        point = os.fsdecode(raw)
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, found = len(point), right.split(b" ")[0].decode("ascii", "replace")
    return found


def is_remote(kind: str) -> bool:
    """Whether other machines may have it too, or some program makes it."""
    return kind in NETWORK or kind.startswith("fuse.")
