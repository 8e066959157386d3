"""The faults that come to a node or to the store by a step of the scenario, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.engine.eviction import Mark, mark_key
from dlmfs.engine.records import NODES
from dlmfs.sim.kernel import Injected
from dlmfs.sim.oracle import Violation
from dlmfs.sim.spoiling import spoil
from dlmfs.store.base import Put, Txn

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode


def elect(cluster: Cluster) -> None:
    """There is a leader again: all that waited for one goes on."""
    cluster.arbiter.change_leader()
    cluster.arbiter.available = True
    for node in cluster.nodes:
        for watch in node.store.watches:
            watch.pull()


def crash(_cluster: Cluster, node: SimNode, _rng: Random) -> None:
    node.crash()


def cut(
    cluster: Cluster, node: SimNode, rng: Random, *, up: bool = True, down: bool = True
) -> None:
    node.store.cut(up=up, down=down)
    seconds = rng.choice([0.5, 2.0, rng.uniform(0, 2 * cluster.scenario.ttl_s)])
    cluster.loop.call_later(seconds, node.store.heal)
    cluster.disturb(seconds + 2 * cluster.scenario.ttl_s)


def pause(cluster: Cluster, node: SimNode, rng: Random) -> None:
    node.machine.pause(how_long(cluster, rng))


def suspend(cluster: Cluster, node: SimNode, rng: Random) -> None:
    node.machine.suspend(how_long(cluster, rng))


def freeze(cluster: Cluster, node: SimNode, rng: Random) -> None:
    node.machine.freeze(how_long(cluster, rng))


def how_long(cluster: Cluster, rng: Random) -> float:
    ttl_s = cluster.scenario.ttl_s
    seconds = rng.choice([0.1, ttl_s * 0.5, rng.uniform(0, 2 * ttl_s)])
    cluster.disturb(seconds + 2 * ttl_s)
    return seconds


def leader(cluster: Cluster, _node: SimNode, rng: Random) -> None:
    if cluster.arbiter.available:
        cluster.arbiter.available = False
        cluster.loop.call_later(rng.uniform(0.1, 3.0), partial(elected, cluster))


def elected(cluster: Cluster) -> None:
    if not cluster.arbiter.available:
        cluster.tell("store", "has a new leader")
        elect(cluster)


def stale_leader(cluster: Cluster, node: SimNode, rng: Random) -> None:
    """A new leader, of which the old one, and this node's renewals, learn late."""
    elect(cluster)
    node.store.stale = True
    cluster.loop.call_later(rng.uniform(0, 2 * cluster.scenario.ttl_s), node.store.refresh)


def compact(cluster: Cluster, _node: SimNode, _rng: Random) -> None:
    cluster.arbiter.compact(cluster.arbiter.revision)


def break_watch(_cluster: Cluster, node: SimNode, rng: Random) -> None:
    node.store.break_watches(rng.choice([0.1, 0.5, 2.0]))


def umount(_cluster: Cluster, node: SimNode, _rng: Random) -> None:
    node.unmount()


def signalled(_cluster: Cluster, node: SimNode, _rng: Random) -> None:
    node.end()


def abort(_cluster: Cluster, node: SimNode, _rng: Random) -> None:
    node.abort()


def evict(cluster: Cluster, node: SimNode, _rng: Random) -> None:
    """As `engine.admin.evict`: a mark, and the lease's end if it is not heard."""
    member = node.membership
    if not node.up or member.session is None:
        return
    if NODES + node.name.encode() in cluster.arbiter.data:
        put = Put(mark_key(node.name), Mark(member.record, "operator").encode())
        cluster.arbiter.apply(Txn((), (put,)))
        # Without a lease nothing fences a daemon that stands still: ended by hand, it may answer one
        # request more when it wakes (docs/simulation.md, "Limits").
        if cluster.scenario.leased:
            delay = cluster.scenario.ttl_s + 1
            cluster.loop.call_later(
                delay, partial(end, cluster, node.name, member.record), member.session.lease
            )


def end(cluster: Cluster, name: str, record: int, lease: int) -> None:
    """The evicted life of a node, if it is still there by its record."""
    standing = cluster.arbiter.data.get(NODES + name.encode())
    if (
        standing is not None
        and standing.create_revision == record
        and lease in cluster.arbiter.leases
    ):
        cluster.checks.graces.expired.add(lease)
        cluster.arbiter.expire(lease)


def full(cluster: Cluster, _node: SimNode, rng: Random) -> None:
    cluster.faults.full = True
    cluster.loop.call_later(rng.choice([0.1, 1.0, 5.0]), partial(room, cluster))


def room(cluster: Cluster) -> None:
    cluster.faults.full = False


def copy(cluster: Cluster, _node: SimNode, rng: Random) -> None:
    cluster.restores.copy(rng)


def restore(cluster: Cluster, _node: SimNode, rng: Random) -> None:
    cluster.restores.restore(rng)


def bug(cluster: Cluster, node: SimNode, rng: Random) -> None:
    """An exception in the state of one lock, found at once or by the next event; or in one request."""
    node.machine.call_soon(partial(_bug, cluster, node, node.life, rng))


def _bug(cluster: Cluster, node: SimNode, life: int, rng: Random) -> None:
    spaces = node.membership.spaces
    locks = [lock for space in spaces.values() if space.live for lock in space.locks.values()]
    if cluster.polite or not node.up or node.life != life or not locks:
        return
    lock = rng.choice(locks)
    domain, name = lock.space.domain, lock.name
    kind = rng.choice(["at once", "at once", "later", "request"])
    cluster.tell(node.name, f"a bug in {domain.decode()}/{name.decode()}, {kind}")
    if kind == "request":
        node.fs.faulty = True
        return
    node.spoiled.add(where(lock))
    if kind == "later":
        lock.res.pr += 1
        return
    lock.enter(_raise)
    if lock.space.live and lock.space.locks.get(name) is lock:
        raise Violation(f"{name!r} on {node.name} is served on though its state is broken")


def where(lock: ClusterLock) -> str:
    """As the engine names it."""
    return f"lock {lock.space.domain.decode()}/{lock.name.decode()}"


def _raise() -> None:
    raise Injected("a bug")


def find_bugs(node: SimNode) -> None:
    """What was played in, and has not come out yet, does so now, or never."""
    node.fs.faulty = False
    for space in node.membership.spaces.values():
        for lock in list(space.locks.values()):
            if where(lock) in node.spoiled:
                lock.enter(_raise)
    node.spoiled.clear()


STEPS: Final[dict[str, Callable[[Cluster, SimNode, Random], None]]] = {
    "crash": crash,
    "cut": cut,
    "cut-up": partial(cut, down=False),
    "cut-down": partial(cut, up=False),
    "heal": lambda _cluster, node, _rng: node.store.heal(),
    "pause": pause,
    "suspend": suspend,
    "freeze": freeze,
    "leader": leader,
    "stale-leader": stale_leader,
    "compact": compact,
    "break-watch": break_watch,
    "umount": umount,
    "evict": evict,
    "end": signalled,
    "abort": abort,
    "full": full,
    "copy": copy,
    "restore": restore,
    "bug": bug,
    "spoil": spoil,
}
