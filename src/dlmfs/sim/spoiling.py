"""Records of the store overwritten with what nobody can read, and mended after a while.

What it may cost: a head, its lock; a node's own record or membership, that life of the node or of its
domain; anything else, itself. A head is mended as an operator would who kept a copy; or it is
deleted, which is only safe where nobody believes in a level of it any more.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.engine.records import lock_of, member_of
from dlmfs.model import Mode
from dlmfs.sim import garbage
from dlmfs.sim.oracle import NONE, OPERATOR, Lock
from dlmfs.store.base import TIMELINE, Delete, KeyValue, Put, Txn

if TYPE_CHECKING:
    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode

KINDS: Final = ("noise", "strange", "deep", "mutated")
"""Not the large ones: they only take time."""
AGAIN_S: Final = 1.0
TIME_S: Final = 15.0
"""More than the grace of a node by the slowest clock."""


def spoil(cluster: Cluster, _node: SimNode, rng: Random) -> None:
    """Some record that stands there, or one of no shape."""
    standing = sorted(filter(_may_go, cluster.arbiter.data))
    key = rng.choice([*standing, rng.choice(garbage.ODD_KEYS)])
    put(cluster, key, rng)
    cluster.loop.call_later(rng.uniform(0.0, cluster.scenario.ttl_s), mend, cluster, key)
    cluster.disturb(3 * cluster.scenario.ttl_s)


def _may_go(key: bytes) -> bool:
    """Not the marks that tokens go on from, and not a node's word that it has files: to remove one of
    these by hand may cost what it stands for."""
    return not key.startswith(TIMELINE) and key.split(b"/")[2:3] != [b"f"]


def put(cluster: Cluster, key: bytes, rng: Random) -> None:
    """Overwrite a key with what nobody can read."""
    arbiter = cluster.arbiter
    kv = arbiter.data.get(key) or KeyValue(key, b"{}", arbiter.revision, arbiter.revision)
    value = garbage.spoilt(rng, kv, KINDS)
    while len(value) > cluster.scenario.bounds.size // 2:
        value = garbage.spoilt(rng, kv, KINDS)
    cluster.tell("operator", f"SPOILS {key!r}: {value[:60]!r}")
    _apply(cluster, Put(key, value))
    cluster.spoilt[key] = arbiter.revision


def mend(cluster: Cluster, key: bytes, *, after_all: bool = False) -> None:
    """Undo it, if nobody else has. `after_all`: whoever lost something by it has had its time."""
    revision = cluster.spoilt.pop(key, None)
    kv = cluster.arbiter.data.get(key)
    if kv is None or kv.mod_revision != revision:
        return
    lock, member = lock_of(key), member_of(key)
    lives = member is not None and _lives(cluster, *member, kv.create_revision)
    if lock is not None:
        lives = _is_believed(cluster, lock)
        head = cluster.oracle.lock(lock).head
        if head != NONE and (lives or (not after_all and cluster.rng.random() < 0.5)):
            cluster.tell("operator", f"puts {key!r} back")
            _apply(cluster, Put(key, head.encode()))
            return
    if lives or (not after_all and (member is not None or lock is not None)):
        # To delete it is to say that all who had to do with it are dead, and their holders gone.
        cluster.spoilt[key] = kv.mod_revision
        again = partial(mend, cluster, key, after_all=not lives)
        cluster.loop.call_later(AGAIN_S if lives else TIME_S, again)
        return
    cluster.tell("operator", f"removes {key!r}")
    _apply(cluster, Delete(key))


def _lives(cluster: Cluster, domain: bytes, name: str, incarnation: int) -> bool:
    """Whether that member may serve something still: it has not heard."""
    for node in cluster.nodes:
        space = node.space(domain) if node.name == name and not node.machine.dead else None
        if space is not None and space.live and space.incarnation == incarnation:
            return True
    return False


def _is_believed(cluster: Cluster, lock: Lock) -> bool:
    """Whether some node has a level of the lock, or may be about to get one."""
    found = [node.lock(lock) for node in cluster.nodes if not node.machine.dead]
    return any(one is not None and (one.busy or one.res.level is not Mode.NL) for one in found)


def mend_all(cluster: Cluster) -> None:
    for key in list(cluster.spoilt):
        mend(cluster, key)


def _apply(cluster: Cluster, op: Put | Delete) -> None:
    arbiter = cluster.arbiter
    arbiter.author = OPERATOR
    try:
        arbiter.apply(Txn((), (op,)))
    finally:
        arbiter.author = None
