"""What must hold in a state of the whole cluster; each function says what is wrong, or nothing.

Commits, and what programs see, are judged in `oracle`, step by step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dlmfs.sim.exhaustive import oracle
from dlmfs.sim.exhaustive.actors import Facts


def exclusion(nodes: Iterable[Facts]) -> str:
    """No two nodes believe in levels that exclude each other (promise 1)."""
    levels: dict[bytes, list[int]] = {}
    for known in nodes:
        for lock, level in known.levels:
            if level:
                levels.setdefault(lock, []).append(level)
    for lock, found in levels.items():
        if len(found) > 1 and max(found) > 1:
            return f"two nodes are at levels of {lock.decode()} that exclude each other"
    return ""


def stuck(nodes: Mapping[str, Facts], data: oracle.Data) -> str:
    """For a state in which nothing need happen any more: nobody waits, all is at rest (promise 5)."""
    for name, known in nodes.items():
        if known.waits:
            return f"an open of {known.waits[0][0].decode()} on {name} waits for ever"
        if known.restless:
            return f"{known.restless[0].decode()} on {name} never comes to rest"
        if known.unfinished and known.live:
            return f"a program on {name} never gets on"
    wishes = [key for key in data if key.startswith(oracle.WISHES)]
    return f"{wishes[0].decode()} stays in the store" if wishes else ""


def unheard(nodes: Mapping[str, Facts], data: oracle.Data, locks: Iterable[bytes]) -> str:
    """For a state in which only programs and timers go on: whoever holds what another node wishes for
    is told by poll(2), so no wait needs a holder to close by chance; and no trylock waits for a
    user until its time is over (promise 6)."""
    if any(known.timer == "_renew_epoch" for known in nodes.values()):
        return ""  # the store did not answer: this node hears nothing for now
    for name, known in nodes.items():
        for lock, _, trying in known.waits:
            if trying:
                return f"a trylock of {lock.decode()} on {name} waits for a user"
    for lock in locks:
        for wish in oracle.queue(data, lock).values():
            for name, known in nodes.items():
                for held, mode, contended in known.holds:
                    clash = held == lock and oracle.clash(mode, wish.mode)
                    if clash and name != wish.node and not contended:
                        return f"a holder of {lock.decode()} does not hear that {wish.node} waits"
    return ""
