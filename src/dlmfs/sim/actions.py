"""What the simulated programs do, one step at a time. Each draws its details from the step's own
generator; one that cannot happen now is left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.model import HolderRule, Mode
from dlmfs.sim.programs import OpenFile, Process

if TYPE_CHECKING:
    from dlmfs.sim.kernel import Program
    from dlmfs.sim.node import SimNode

PROCESSES_MAX: Final = 6
"""On one node at a time."""


def _idle(node: SimNode) -> list[Process]:
    return [p for p in node.processes.values() if p.program is None]


def _open(node: SimNode, rng: Random) -> None:
    """Some process opens some lock, in an order of locks that cannot deadlock."""
    cluster = node.cluster
    process = rng.choice([*_idle(node), None]) if rng.random() < 0.5 else None
    if process is None:
        if len(node.processes) >= PROCESSES_MAX:
            return
        process = node.new_process()
    domain, name = rng.choice(cluster.domains), rng.choice(cluster.names)
    mode = rng.choice([Mode.PR, Mode.EX])
    lock = (domain, name)
    held = [file.grant for file in _lineage(process)]
    if any(grant.lock > lock for grant in held):
        return
    own = [grant for grant in held if grant.lock == lock]
    if own and node.rule is HolderRule.FILE and (mode is Mode.EX or own[0].mode is Mode.EX):
        return  # it would wait for itself, and is meant to (rule 11)
    trying = rng.random() < 0.3
    again = rng.choice([0, 0, 1, 3])
    process.run(process.open(domain, name, mode, trying=trying, again=again))


def _lineage(process: Process) -> list[OpenFile]:
    """What it has open, and its ancestors and descendants, who may wait for it."""
    files: list[OpenFile] = []
    for other in process.node.processes.values():
        if _root(other) is _root(process):
            files.extend(other.files)
    return files


def _root(process: Process) -> Process:
    while process.parent is not None:
        process = process.parent
    return process


def _act(node: SimNode, rng: Random) -> None:
    """Some process uses what it has open: reads, writes, or closes it."""
    idle = [process for process in _idle(node) if process.files]
    if not idle:
        return
    process = rng.choice(idle)
    file = rng.choice(process.files)
    draw = rng.random()
    if draw < 0.3:
        process.run(process.read(file))
    elif draw < 0.55 and file.grant.mode is Mode.EX:
        process.run(process.write(file, rng.randrange(57)))
    else:
        process.close(file)


def _signal(node: SimNode, rng: Random) -> None:
    waiting = [process for process in node.processes.values() if process.call is not None]
    if waiting:
        rng.choice(waiting).signal()


def _stop(node: SimNode, rng: Random) -> None:
    """SIGSTOP and SIGCONT while it waits, and then perhaps a signal."""
    waiting = [process for process in node.processes.values() if process.call is not None]
    if not waiting:
        return
    process, cluster = rng.choice(waiting), node.cluster
    cluster.tell(node.name, f"pid {process.pid} is stopped")
    process.stop()
    cluster.loop.call_later(rng.choice([0.0, 0.001, 0.1, 2.0]), process.go_on)
    after = rng.choice([process.signal, partial(process.kill, unheard=False), None])
    if after is not None:
        cluster.loop.call_later(rng.choice([0.0, 0.01, 0.5]), after)


def _storm(node: SimNode, rng: Random) -> None:
    """A process is signalled as it writes."""
    files = [(p, f) for p in _idle(node) for f in p.files if f.grant.mode is Mode.EX]
    if files:
        process, file = rng.choice(files)
        process.run(process.write(file, rng.randrange(57)))
        process.signal()


def _kill(node: SimNode, rng: Random) -> None:
    if node.processes:
        process = rng.choice(list(node.processes.values()))
        node.cluster.tell(node.name, f"pid {process.pid} is killed")
        process.kill(unheard=rng.random() < 0.5)


def _fork(node: SimNode, rng: Random) -> None:
    idle = [process for process in _idle(node) if process.files]
    if idle and len(node.processes) < PROCESSES_MAX:
        parent = rng.choice(idle)
        child = node.new_process(parent)
        if rng.random() < 0.5:
            child.inherit(parent)


def _unlink(node: SimNode, rng: Random) -> None:
    if len(node.processes) < PROCESSES_MAX:
        process = node.new_process()
        domain, name = rng.choice(node.cluster.domains), rng.choice(node.cluster.names)
        process.run(process.unlink(domain, name), lambda: process.kill(unheard=False))


def _touch(node: SimNode, rng: Random) -> None:
    if len(node.processes) < PROCESSES_MAX:
        process = node.new_process()
        domain, name = rng.choice(node.cluster.domains), rng.choice(node.cluster.names)
        process.run(process.touch(domain, name), lambda: process.kill(unheard=False))


def _rmdir(node: SimNode, rng: Random) -> None:
    """The files in it first, as people do."""
    if len(node.processes) < PROCESSES_MAX:
        process = node.new_process()
        domain = rng.choice(node.cluster.domains)

        def program() -> Program:
            for name in node.cluster.names:
                yield from process.unlink(domain, name)
            yield from process.rmdir(domain)

        process.run(program(), lambda: process.kill(unheard=False))


STEPS: Final[dict[str, Callable[[SimNode, Random], None]]] = {
    "open": _open,
    "act": _act,
    "signal": _signal,
    "stop": _stop,
    "storm": _storm,
    "kill": _kill,
    "fork": _fork,
    "unlink": _unlink,
    "touch": _touch,
    "rmdir": _rmdir,
}
