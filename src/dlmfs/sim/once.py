"""Names that are used once: they go by themselves, and who comes at that very moment has the lock."""

from __future__ import annotations

import stat
from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.model import Mode
from dlmfs.sim.oracle import Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.node import SimNode
    from dlmfs.sim.oracle import Lock

NAME: Final = b"once"
"""A lock that nobody has used before."""
LIMIT_S: Final = 200.0
"""A transient file is looked at each minute at least, by its node's clock."""


def once(cluster: Cluster) -> None:
    """In a cluster at rest; raises Violation if a name stays, or somebody does not get the lock."""
    rng = Random(f"once {cluster.scenario.seed}")
    lock = (rng.choice(cluster.domains), NAME)
    users = rng.sample(cluster.nodes, min(2, len(cluster.nodes)))
    for node in users:
        node.kernel.open_mode |= stat.S_ISVTX
        _use(cluster, node, lock)
    node = rng.choice(users)
    meanwhile = rng.random() < 0.5
    if meanwhile:
        _wait(cluster, lambda: _leaves(node, lock), f"{node.name} does not leave {NAME!r}")
    else:
        _wait(cluster, lambda: not node.has_file(lock), f"{NAME!r} stays on {node.name}")
    when = "LEAVES IT" if meanwhile else "HAS FORGOTTEN IT"
    cluster.tell(node.name, f"{when}, and a program opens {NAME.decode()}")
    _use(cluster, node, lock)
    for node in users:
        _wait(cluster, lambda: not node.has_file(lock), f"{NAME!r} stays on {node.name}")  # noqa: B023
    if cluster.oracle.lock(lock).head_revision:
        raise Violation(f"nobody has the file of {NAME!r}, and its head is left")


def _leaves(node: SimNode, lock: Lock) -> bool:
    found = node.lock(lock)
    return found is not None and found.view.leaving


def _wait(cluster: Cluster, condition: Callable[[], bool], otherwise: str) -> None:
    if not cluster.loop.run_until(condition, LIMIT_S / min(cluster.scenario.rates)):
        raise Violation(f"nobody uses it, and {otherwise}")


def _use(cluster: Cluster, node: SimNode, lock: Lock) -> None:
    process = node.new_process()
    process.deaf = True
    process.run(process.open(*lock, Mode.EX, trying=False, again=0))
    cluster.loop.run_until(lambda: process.program is None, 60)
    if not process.files:
        raise Violation(f"a program on {node.name} does not get {lock[1]!r} in the calm")
    process.kill(unheard=False)
