"""Progress past one who stands still: many wait for a lock, and a commit is too small for all of them.

Where a grant pass is cut short, somebody must go on with it (engine rules 6 and 17). The first of those
who still wait does; but its daemon may be stopped, or cut off, which must keep nobody else waiting
(promise 5).
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.model import Mode
from dlmfs.sim.oracle import Violation

if TYPE_CHECKING:
    from dlmfs.sim.cluster import Cluster

FILED_S: Final = 0.2
"""Time for a wish to be filed, and told of, on a calm network."""
GRANTED_S: Final = 0.3
STILL_S: Final = 0.5
"""How long one stands still: longer than the others may wait, too short for its lease to be suspect."""


def crowd(cluster: Cluster) -> None:
    """In a cluster at rest one node has a lock exclusively, all others wait for it shared, and one of
    these stands still as it is given away. Raises Violation if any of the rest waits on."""
    rng = Random(f"crowd {cluster.scenario.seed}")
    if len(cluster.nodes) < 4:
        return
    domain, name = rng.choice(cluster.domains), rng.choice(cluster.names)
    writer, *others = rng.sample(cluster.nodes, len(cluster.nodes))
    holder = writer.new_process()
    holder.deaf = True
    holder.run(holder.open(domain, name, Mode.EX, trying=False, again=2))
    if not cluster.loop.run_until(lambda: bool(holder.files), 60):
        raise Violation(f"{writer.name} cannot get {name!r} in the calm")
    waiters = [node.new_process() for node in others]
    for waiter in waiters:
        waiter.run(waiter.open(domain, name, Mode.PR, trying=False, again=0))
        cluster.loop.run_for(FILED_S)
    still = rng.choice(others)
    cluster.tell(still.name, "STANDS STILL, and others wait with it")
    still.machine.pause(STILL_S)
    holder.close(holder.files[0])
    going_on = [waiter for waiter in waiters if waiter.node is not still]
    if not cluster.loop.run_until(lambda: all(w.files for w in going_on), GRANTED_S):
        raise Violation(f"waiters of {name!r} wait for {still.name}, which stands still")
    cluster.loop.run_until(lambda: not still.machine.stands_still, 1e6)
    if not cluster.loop.run_until(lambda: all(w.files for w in waiters), GRANTED_S):
        raise Violation(f"{still.name} goes on, and is not granted {name!r}")
    for process in (holder, *waiters):
        process.kill(unheard=False)
