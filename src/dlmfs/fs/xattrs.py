"""The state of a lock as extended attributes, read without taking it (design, section 2)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from dlmfs.core.lockres import Claim
from dlmfs.fs.kin import command
from dlmfs.fs.tree import Inode, LockFile
from dlmfs.model import TOKEN_SHIFT

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.fs.filesystem import FileSystem

PREFIX: Final = b"user.dlmfs."
CAPABILITIES: Final = b"bast lvb token trylock"


def _claims(claims: list[Claim]) -> bytes:
    rows = [{"mode": c.mode.name, "pid": c.pid, "command": command(c.pid)} for c in claims]
    return json.dumps(rows).encode()


def _mode(lock: ClusterLock | None) -> bytes:
    return lock.res.level.name.encode() if lock is not None else b"NL"


def _token(lock: ClusterLock | None) -> bytes:
    """The largest token that a local holder has; empty if nobody here holds the lock."""
    tokens = [c.token for c in lock.res.holders.values()] if lock is not None else []
    return str(max(tokens)).encode() if tokens else b""


def _holders(lock: ClusterLock | None) -> bytes:
    return _claims(list(lock.res.holders.values()) if lock is not None else [])


def _waiters(lock: ClusterLock | None) -> bytes:
    return _claims(list(lock.res.waiters.values()) if lock is not None else [])


def _abandoned(lock: ClusterLock | None) -> bytes:
    mark = lock.known_head.abandoned if lock is not None else None
    if mark is None:
        return b""
    return json.dumps({"node": mark.node, "token": mark.revision << TOKEN_SHIFT}).encode()


_LOCK: Final = {
    PREFIX + b"mode": _mode,
    PREFIX + b"token": _token,
    PREFIX + b"holders": _holders,
    PREFIX + b"waiters": _waiters,
    PREFIX + b"abandoned": _abandoned,
}


def get(fs: FileSystem, inode: Inode, name: bytes) -> bytes | None:
    """The attribute's value, or None where the kernel's dlmfs would say EOPNOTSUPP."""
    if isinstance(inode, LockFile) and name in _LOCK:
        space = fs.spaces.get(inode.domain.ino)
        return _LOCK[name](space.locks.get(inode.name) if space is not None else None)
    if inode.parent is None and name == PREFIX + b"capabilities":
        return CAPABILITIES
    return None


def names(_inode: Inode) -> bytes:
    """Nothing is listed, as in the kernel: tools that copy attributes must not copy these."""
    return b""
