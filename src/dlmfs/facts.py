"""What a node knows of locks and of the processes at them, for itself and for nodes that ask.

Bounded in room and time: it is asked for inside the daemon's event loop, at nodes whose owners
may not know who asks. Everything is a fact of this node alone; `why` puts them together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from dlmfs import __version__, identity
from dlmfs.engine.questions import LETTER_MAX
from dlmfs.fs import kin

if TYPE_CHECKING:
    from dlmfs.core.events import Claim
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.fs.handle import Handle
    from dlmfs.node import Node

Facts = dict[str, Any]

LOCKS_MAX: Final = 8
"""Locks per question."""
CLAIMS_MAX: Final = 16
"""Holders, and waiters, told of each lock; of the others only how many there are."""
THREADS_MAX: Final = 64
"""Threads of whose processes the waits are asked for."""
FAMILY_MAX: Final = 512
"""Threads looked at for one answer."""
WAITS_MAX: Final = 64


def reply(node: Node, question: Facts) -> Facts:
    """The answer to {"locks": [[domain, lock], ...], "threads": [[place, pid, thread], ...]}: the node,
    what it knows of those locks, and what the locks' holders, and those threads that are of its place,
    wait for here themselves."""
    names = [(str(domain), str(lock)) for domain, lock in question["locks"][:LOCKS_MAX]]
    locks = [lock_facts(node, *name) for name in names]
    own = node_facts(node)
    roots: list[Root] = [
        (int(pid), int(thread), None)
        for place, pid, thread in question["threads"][:THREADS_MAX]
        if place == own["place"]
    ]
    return fitting({**own, "locks": locks, "waits": waits(node, roots + _holding(node, names))})


def fitting(answer: Facts) -> Facts:
    """The answer, of which so many rows are left out that it fits into a letter, the longest list's
    first: long names, that a user may draw, must not keep a node from answering."""
    lists = [(answer, "waits")]
    lists += [(lock, what) for lock in answer["locks"] for what in ("holders", "waiters")]
    while len(json.dumps(answer)) > LETTER_MAX:
        facts, what = max(lists, key=lambda each: len(json.dumps(each[0][each[1]])))
        rows = facts[what]
        if not rows:
            break
        facts[what] = rows[: len(rows) // 2]
        if facts is not answer:
            facts[f"more_{what}"] += len(rows) - len(facts[what])
    return answer


def node_facts(node: Node) -> Facts:
    """Who answers, and in what state it is. `secret`: its host keeps its users' processes from each
    other."""
    member = node.membership
    member.serving()
    own = identity.own()
    return {
        "node": member.name,
        "version": __version__,
        "state": member.state.value,
        "reason": member.reason,
        "holder_rule": node.config.options.holder.value,
        "host": own["host"],
        "place": f"{own['boot']}/{own['pidns']}",
        "pid": own["pid"],
        "secret": node.fs.secret,
        "mountpoint": node.config.mountpoint,
    }


def _find(node: Node, domain: str, lock: str) -> ClusterLock | None:
    space = node.membership.spaces.get(os.fsencode(domain))
    return None if space is None else space.locks.get(os.fsencode(lock))


def lock_facts(node: Node, domain: str, name: str) -> Facts:
    """One lock as this node has it; at NL and without claims if it knows nothing of it."""
    lock = _find(node, domain, name)
    facts: Facts = {"domain": domain, "lock": name}
    if lock is None:
        nobody = {"holders": [], "more_holders": 0, "waiters": [], "more_waiters": 0}
        return {**facts, "level": "NL", "phase": "idle", **nobody}
    res = lock.res
    facts |= {"level": res.level.name, "phase": lock.phase}
    facts |= _claims(node, "holders", res.holders)
    facts |= _claims(node, "waiters", res.waiters)
    for row, claim in zip(facts["waiters"], res.waiters.values(), strict=False):
        row["before_others"] = res.before_others(claim)
    return facts


def _claims(node: Node, what: str, claims: Mapping[int, Claim]) -> Facts:
    rows = [claim_facts(node, claim) for claim in islice(claims.values(), CLAIMS_MAX)]
    return {what: rows, f"more_{what}": len(claims) - len(rows)}


def claim_facts(node: Node, claim: Claim) -> Facts:
    """One claim, and the process that made it. `id` names it on this mount; `pid` 0 is a process of
    another pid namespace; `gone`: it has ended, and somebody has inherited its descriptor."""
    process = kin.process(claim.pid)
    return {
        "id": claim.fh,
        "mode": claim.mode.name,
        "try": claim.trying,
        "since_s": round(node.loop.time() - claim.since, 3),
        "thread": claim.pid,
        "pid": process.pid if process else claim.pid,
        "command": process.command if process else "",
        "run": process.state if process else "",
        "gone": process is None and claim.pid != 0,
    }


# -- what processes wait for ------------------------------------------------------------------------


Root = tuple[int, int, "Handle | None"]
"""A process whose waits are sought, the thread that opened a lock, and its open file if that is here."""


def _holding(node: Node, names: Iterable[tuple[str, str]]) -> list[Root]:
    """The first holders of those locks."""
    found: list[Root] = []
    for domain, name in names:
        lock = _find(node, domain, name)
        for claim in islice(lock.res.holders.values(), CLAIMS_MAX) if lock is not None else ():
            process = kin.process(claim.pid)
            if process is not None:
                found.append((process.pid, claim.pid, cast("Handle", claim)))
    return found


def waits(node: Node, roots: Iterable[Root]) -> list[Facts]:
    """What these processes wait for on this mount, and who for them.

    `by` says how the waiting is theirs: "itself" (the thread that opened what it holds), "inherited"
    (a descendant that has the descriptor, too), "thread" (another one of the process) or "child" (a
    descendant; whether the process waits for it cannot be seen).
    """
    waiting = node.fs.waiting
    if not waiting:
        return []
    whose: dict[int, list[tuple[int, Root]]] = {}
    families: dict[int, dict[int, int]] = {}
    for root in roots:
        pid = root[0]
        if pid not in families:
            looked = sum(map(len, families.values()))
            families[pid] = kin.family(pid, FAMILY_MAX - looked)
        for thread, group in families[pid].items():
            whose.setdefault(thread, []).append((group, root))
    found: dict[tuple[int, int], Facts] = {}
    for handle in waiting.values():
        for group, root in whose.get(handle.pid, ()):
            by = _by(node, handle, group, root)
            known = found.get((root[0], handle.fh))
            if known is None or _CERTAINTY.index(by) < _CERTAINTY.index(known["by"]):
                found[root[0], handle.fh] = {
                    "pid": root[0],
                    "by": by,
                    "domain": os.fsdecode(handle.lock.space.domain),
                    "lock": os.fsdecode(handle.lock.name),
                    "claim": claim_facts(node, handle),
                }
        if len(found) >= WAITS_MAX:
            break
    return list(found.values())


_CERTAINTY: Final = ("itself", "inherited", "thread", "child")


def _by(node: Node, waiter: Handle, group: int, root: Root) -> str:
    pid, thread, held = root
    if group == pid:
        return "itself" if thread == waiter.pid else "thread"
    if held is not None:
        file = held.file
        if kin.has_open(group, file.ino, file.path(), node.fs.mount_device):
            return "inherited"
    return "child"
