"""The state of a lock as extended attributes, read without taking it (design, section 2).

Claims are this node's own, and the wishes of other nodes as the watch tells them; who holds the
lock on other nodes is in the store, where `dlmfs info` asks.
"""

from __future__ import annotations

import errno
import json
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from dlmfs.core.events import Claim
from dlmfs.fs.tree import Inode, LockFile
from dlmfs.proc import command, user

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.fs.filesystem import FileSystem

PREFIX: Final = b"user.dlmfs."
TOKEN: Final = PREFIX + b"token"
CAPABILITIES: Final = b"bast lvb token trylock"
ROWS_MAX: Final = 200
"""Claims told of; the kernel passes no value above 64 KiB."""


class _Sight:
    """Which processes the user who asks may hear of."""

    def __init__(self, fs: FileSystem, uid: int) -> None:
        self.uid = uid
        self.whole = not fs.secret or uid in (0, fs.usage.own)

    def row(self, claim: Claim, node: str) -> dict[str, Any]:
        pid = claim.pid if self.whole or user(claim.pid) == self.uid else 0
        name = command(pid) if pid else ""
        return {"node": node, "mode": claim.mode.name, "pid": pid, "command": name}


def _told(rows: list[dict[str, Any]], total: int) -> bytes:
    if total > len(rows):
        rows.append({"more": total - len(rows)})
    return json.dumps(rows).encode()


def _mode(lock: ClusterLock, _sight: _Sight) -> bytes:
    return lock.res.level.name.encode()


def _token(lock: ClusterLock, _sight: _Sight) -> bytes:
    """The largest token that a local holder has; empty if nobody here holds the lock."""
    tokens = [c.token for c in lock.res.holders.values()]
    return str(max(tokens)).encode() if tokens else b""


def _holders(lock: ClusterLock, sight: _Sight) -> bytes:
    holders, own = lock.res.holders, lock.space.node
    rows = [sight.row(claim, own) for claim in islice(holders.values(), ROWS_MAX)]
    return _told(rows, len(holders))


def _waiters(lock: ClusterLock, sight: _Sight) -> bytes:
    waiters = lock.res.waiters
    own = lock.space.node
    others = lock.view.others()
    rows = [sight.row(claim, own) for claim in islice(waiters.values(), ROWS_MAX)]
    rows += [{"node": w.node, "mode": w.mode.name} for w in islice(others, ROWS_MAX - len(rows))]
    return _told(rows, len(waiters) + len(others))


def _abandoned(lock: ClusterLock, _sight: _Sight) -> bytes:
    mark = lock.view.head.abandoned
    if mark is None:
        return b""
    return json.dumps({"node": mark.node, "token": lock.space.tokens.of(mark.revision)}).encode()


_LOCK: Final = {
    PREFIX + b"mode": (_mode, b"NL"),
    TOKEN: (_token, b""),
    PREFIX + b"holders": (_holders, b"[]"),
    PREFIX + b"waiters": (_waiters, b"[]"),
    PREFIX + b"abandoned": (_abandoned, b""),
}
"""How to tell, and what to say of a lock that this node knows nothing of."""


def get(fs: FileSystem, inode: Inode, name: bytes, uid: int) -> bytes | int:
    """The attribute's value for user `uid`, whom the kernel has let in; or EOPNOTSUPP, as the kernel's
    dlmfs says of every attribute; or EIO for a file whose locks were lost (promise 3), and for a token
    of a node whose life ends: who asks for it wants to know whether it is good."""
    if isinstance(inode, LockFile) and name in _LOCK:
        if inode.lost or (fs.ending and name == TOKEN):
            return errno.EIO
        tell, nothing = _LOCK[name]
        space = fs.spaces.get(inode.domain.ino)
        lock = space.locks.get(inode.name) if space is not None and inode.linked else None
        return nothing if lock is None else tell(lock, _Sight(fs, uid))
    if inode.parent is None and name == PREFIX + b"capabilities":
        return CAPABILITIES
    if inode.parent is None and name == PREFIX + b"state":
        return fs.domains.lease_state().encode()
    if inode.parent is None and name == PREFIX + b"status":
        return json.dumps(fs.about()).encode()
    return errno.EOPNOTSUPP


def names(_inode: Inode) -> bytes:
    """Nothing is listed, as in the kernel: tools that copy attributes must not copy these."""
    return b""
