"""The recovery bound: a node dies with a lock, and others wait for it (design, promise 5).

They have it within the lease time and 2 s, or twice the lease time and 5 s if the store changes its
leader meanwhile; lock-delay comes on top, by the clock of who waits. Where there is no lease, on one
host, a death is known at once.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.model import Mode
from dlmfs.sim.oracle import Violation
from dlmfs.sim.trouble import elected

if TYPE_CHECKING:
    from collections.abc import Callable

    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode
    from dlmfs.sim.programs import Process

DISTURBED: Final = 0.15
"""How often, in lock-delays, something happens at a lock whose delay is waited for."""

OUTAGE: Final = 0.05
"""How long the store has no leader, in lease times: so short that no living node is fenced for it."""


def recover(cluster: Cluster) -> None:
    """One node of a cluster at rest takes a lock exclusively and dies, while all others wait for it.
    Raises Violation if the first of them waits for too long."""
    rng = Random(f"recovery {cluster.scenario.seed}")
    if len(cluster.nodes) < 2:
        return
    domain, name = rng.choice(cluster.domains), rng.choice(cluster.names)
    dead, *others = rng.sample(cluster.nodes, len(cluster.nodes))
    holder = dead.new_process()
    holder.deaf = True
    holder.run(holder.open(domain, name, Mode.EX, trying=False, again=2))
    if not cluster.loop.run_until(lambda: bool(holder.files), 60):
        raise Violation(f"{dead.name} cannot get {name!r} in the calm")
    waiters = [node.new_process() for node in others]
    for waiter in waiters:
        mode = rng.choice([Mode.PR, Mode.EX])
        waiter.run(waiter.open(domain, name, mode, trying=False, again=0))
    cluster.loop.run_for(rng.choice([0.0, 0.1, cluster.scenario.ttl_s * rng.random()]))
    changes = cluster.scenario.leased and rng.random() < 0.3
    dead.crash()
    if changes:
        cluster.arbiter.available = False
        outage_s = cluster.scenario.ttl_s * OUTAGE * rng.random()
        cluster.loop.call_later(outage_s, partial(elected, cluster))
    cluster.tell(dead.name, "DIES, and others wait for its lock")
    passers: list[Process] = []
    if cluster.scenario.lock_delay_s:
        _disturb(cluster, others, waiters, passers, partial(_try, domain, name))
    limit = bound(cluster, changes=changes)
    if not cluster.loop.run_until(lambda: any(waiter.files for waiter in waiters), limit):
        raise Violation(f"a dead node's lock is not free {limit:.1f} s after its death")
    for waiter in waiters:
        waiter.kill(unheard=False)
    cluster.loop.run_until(lambda: all(passer.dead for passer in passers), limit)


def _try(domain: bytes, name: bytes, process: Process) -> None:
    program = process.open(domain, name, Mode.EX, trying=True, again=0)
    process.run(program, lambda: process.kill(unheard=False))


def _disturb(
    cluster: Cluster,
    nodes: list[SimNode],
    waiters: list[Process],
    passers: list[Process],
    act: Callable[[Process], None],
) -> None:
    """While others wait for the lock-delay to be over, something else happens at that lock again and
    again: the delay is none the shorter for it."""

    def again() -> None:
        if not any(waiter.files or waiter.dead for waiter in waiters):
            passers.append(cluster.rng.choice(nodes).new_process())
            act(passers[-1])
            cluster.loop.call_later(cluster.scenario.lock_delay_s * DISTURBED, again)

    again()


def bound(cluster: Cluster, *, changes: bool) -> float:
    """Within how many seconds of a death its locks come free. `changes`: so does the store's leader."""
    scenario = cluster.scenario
    lease_s = scenario.ttl_s if scenario.leased else 0.0
    slowest = min(node.machine.rate for node in cluster.nodes)
    return (2 * lease_s + 5 if changes else lease_s + 2) + scenario.lock_delay_s / slowest
