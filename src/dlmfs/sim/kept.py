"""How long a value lives: one node writes it and goes, another only made the file (promise 4)."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.model import EMPTY_LVB, Mode
from dlmfs.sim.oracle import Violation

if TYPE_CHECKING:
    from dlmfs.sim.cluster import Cluster
    from dlmfs.sim.kernel import Program
    from dlmfs.sim.node import SimNode
    from dlmfs.sim.programs import Process

NAME: Final = b"kept"
"""A lock that nobody has used before."""
SECOND: Final = 1.0
"""In so long a file that is only made has its place, by its node's clock."""
SLACK_S: Final = 0.1


def kept(cluster: Cluster) -> None:
    """In a cluster at rest; raises Violation if the value is forgotten."""
    rng = Random(f"kept {cluster.scenario.seed}")
    if len(cluster.nodes) < 2:
        return
    domain = rng.choice(cluster.domains)
    writer, keeper = rng.sample(cluster.nodes, 2)
    lock = (domain, NAME)

    def write(node: SimNode) -> None:
        process = node.new_process()
        process.deaf = True
        _do(cluster, process, process.open(domain, NAME, Mode.EX, trying=False, again=0))
        _do(cluster, process, process.write(process.files[0], 0))
        process.kill(unheard=False)
        cluster.loop.run_for(SLACK_S)

    def touch(node: SimNode) -> None:
        process = node.new_process()
        _do(cluster, process, process.touch(domain, NAME))
        process.kill(unheard=False)

    both = [(write, writer), (touch, keeper)]
    rng.shuffle(both)
    for act, node in both:
        act(node)
        cluster.loop.run_for(rng.choice([0.0, SLACK_S, 2 * SECOND]))
    cluster.loop.run_for(SECOND / keeper.machine.rate + SLACK_S)
    cluster.tell(writer.name, f"GOES, and {keeper.name} has made the file of {NAME.decode()}")
    if rng.random() < 0.5:
        _unlink(cluster, writer, domain)
    else:
        writer.unmount()
        cluster.loop.run_until(lambda: writer.up, 60)
    if cluster.oracle.lock(lock).head.lvb == EMPTY_LVB:
        raise Violation(f"the value of {NAME!r} is forgotten, and {keeper.name} has its file")
    for node in cluster.nodes:
        _unlink(cluster, node, domain)
    if cluster.oracle.lock(lock).head_revision:
        raise Violation(f"nobody has the file of {NAME!r}, and its head is left")


def _unlink(cluster: Cluster, node: SimNode, domain: bytes) -> None:
    process = node.new_process()
    _do(cluster, process, process.unlink(domain, NAME))
    process.kill(unheard=False)


def _do(cluster: Cluster, process: Process, program: Program) -> None:
    process.run(program)
    if not cluster.loop.run_until(lambda: process.program is None, 60):
        raise Violation(f"a program on {process.node.name} waits in the calm")
