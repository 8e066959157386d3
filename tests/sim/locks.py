"""Histories of a correct lock whose messages take their time, and a slow judge of small histories."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random

from dlmfs.model import Mode, compatible
from dlmfs.sim.history import Op
from dlmfs.sim.loop import SimLoop

PR, EX = Mode.PR, Mode.EX


@dataclass
class Plan:
    """What the clients do. Chances are of 1."""

    clients: int = 5
    owners: int = 5
    operations: int = 60
    shared: float = 0.4
    trying: float = 0.3
    interrupted: float = 0.1
    lost: float = 0.05
    """Answers that nobody gets; the client then lives on, and its hold is ended for it, or not."""
    unanswered: float = 0.05
    """Releases that nobody answers."""
    think: int = 6
    delay: int = 3


@dataclass(eq=False)
class Asked:
    owner: Hashable
    mode: Mode
    hold: int
    client: int
    kind: str
    invoked: float


class Lock:
    """First come, first served; a message takes 0 to `delay`, in whole numbers: ties are common."""

    def __init__(self, rng: Random, plan: Plan) -> None:
        self.rng, self.plan = rng, plan
        self.loop = SimLoop(rng)
        self.holds: list[Asked] = []
        self.queue: list[Asked] = []
        self.ops: list[Op] = []
        self.asked = 0
        for client in range(plan.clients):
            self.later(plan.think, self.ask, client)
        self.loop.run_for(1e6)
        for a in self.queue:
            self.told(a, "unknown", None)
        self.queue.clear()

    def later(self, most: int, do: object, *args: object) -> None:
        assert callable(do)
        self.loop.call_later(float(self.rng.randint(0, most)), do, *args)

    def chance(self, of: float) -> bool:
        return self.rng.random() < of

    def told(self, a: Asked, outcome: str, returned: float | None) -> None:
        self.ops.append(
            Op(a.client, a.owner, a.kind, a.mode, a.invoked, returned, outcome, a.hold)  # type: ignore[arg-type]
        )

    def ask(self, client: int) -> None:
        if self.asked >= self.plan.operations:
            return
        self.asked += 1
        mode = PR if self.chance(self.plan.shared) else EX
        kind = "try" if self.chance(self.plan.trying) else "acquire"
        owner = f"n{client % self.plan.owners}"
        a = Asked(owner, mode, self.asked, client, kind, self.loop.time())
        self.later(self.plan.delay, self.arrived, a)

    def in_the_way(self, a: Asked, of: Sequence[Asked], *, any_mode: bool = False) -> bool:
        return any(b.owner != a.owner and (any_mode or not compatible(a.mode, b.mode)) for b in of)

    def arrived(self, a: Asked) -> None:
        if a.kind == "acquire":
            self.queue.append(a)
            if self.chance(self.plan.interrupted):
                self.later(4 * self.plan.delay, self.interrupt, a)
            self.serve()
            return
        everybody = self.holds + self.queue
        behind = any(b.owner == a.owner and b.mode is EX for b in self.queue)
        if self.in_the_way(a, everybody, any_mode=behind):
            self.answer(a, "busy")
        else:
            self.grant(a)

    def interrupt(self, a: Asked) -> None:
        if a in self.queue:
            self.queue.remove(a)
            self.answer(a, "failed")
            self.serve()

    def serve(self) -> None:
        for a in list(self.queue):
            if self.in_the_way(a, self.holds):
                return
            self.queue.remove(a)
            self.grant(a)

    def grant(self, a: Asked) -> None:
        assert not self.in_the_way(a, self.holds)
        self.holds.append(a)
        self.answer(a, "ok")

    def answer(self, a: Asked, outcome: str) -> None:
        if not self.chance(self.plan.lost):
            self.later(self.plan.delay, self.answered, a, outcome)
            return
        self.told(a, "unknown", None)
        if outcome == "ok":
            self.later(2 * self.plan.think, self.put_out, a, self.chance(0.5))
        self.later(self.plan.think, self.ask, a.client)

    def put_out(self, a: Asked, recorded: bool) -> None:
        """Its hold ends; who watches may learn of it."""
        if recorded:
            self.released(a, self.loop.time(), None)
        self.later(self.plan.delay, self.drop, a)

    def drop(self, a: Asked) -> None:
        self.holds.remove(a)
        self.serve()

    def answered(self, a: Asked, outcome: str) -> None:
        self.told(a, outcome, self.loop.time())
        if outcome == "ok":
            self.later(self.plan.think, self.release, a)
        else:
            self.later(self.plan.think, self.ask, a.client)

    def release(self, a: Asked) -> None:
        self.later(self.plan.delay, self.give, a, self.loop.time())

    def give(self, a: Asked, since: float) -> None:
        self.drop(a)
        if self.chance(self.plan.unanswered):
            self.released(a, since, None)
            self.later(self.plan.think, self.ask, a.client)
        else:
            self.later(self.plan.delay, self.gave, a, since)

    def gave(self, a: Asked, since: float) -> None:
        self.released(a, since, self.loop.time())
        self.later(self.plan.think, self.ask, a.client)

    def released(self, a: Asked, since: float, returned: float | None) -> None:
        outcome = "ok" if returned is not None else "unknown"
        self.ops.append(
            Op(a.client, a.owner, "release", a.mode, since, returned, outcome, a.hold)  # type: ignore[arg-type]
        )


def history(seed: int, plan: Plan | None = None) -> list[Op]:
    return Lock(Random(seed), plan or Plan()).ops


def possible(ops: Sequence[Op]) -> bool:
    """The same question as `judge`'s, answered by trying every order and every whole-numbered instant
    of it. Times are whole numbers; what returned `ok` was not released before."""

    def end(op: Op) -> float:
        return math.inf if op.returned is None or op.outcome == "unknown" else op.returned

    latest = max([op.invoked for op in ops] + [op.returned or 0 for op in ops], default=0)
    by_hold = {op.hold: i for i, op in enumerate(ops) if op.kind != "release"}
    failed = frozenset(i for i, op in enumerate(ops) if op.outcome == "failed")

    def reason(i: int, now: float, todo: frozenset[int], holds: frozenset[int]) -> bool:
        """Whether trylock `i` may be refused in this state."""
        waiting = {
            j
            for j, op in enumerate(ops)
            if op.kind != "release"
            and op.invoked <= now
            and (
                (op.outcome == "failed" and op.kind == "acquire" and now <= end(op) + op.place)
                or (j in todo and op.outcome == "unknown")
                or (j in todo and op.outcome == "ok" and op.kind == "acquire")
            )
        }
        trying = {
            j
            for j in todo
            if ops[j].kind == "try" and ops[j].outcome == "ok" and ops[j].invoked <= now
        }
        behind = any(ops[j].owner == ops[i].owner and ops[j].mode is EX for j in waiting)
        return any(
            ops[j].owner != ops[i].owner and (behind or not compatible(ops[i].mode, ops[j].mode))
            for j in waiting | holds | (trying if behind else set())
        )

    @functools.cache
    def search(now: float, todo: frozenset[int], holds: frozenset[int]) -> bool:
        if all(end(ops[i]) == math.inf for i in todo):
            return True
        for i in todo:
            op = ops[i]
            if op.invoked > now:
                continue
            left = todo - {i}
            if op.kind == "release":
                acquire = by_hold[op.hold]
                if acquire not in todo:
                    if search(now, left, holds - {acquire}):
                        return True
                elif ops[acquire].outcome == "unknown":  # it took no effect and never will
                    if search(now, left - {acquire}, holds):
                        return True
            elif op.outcome == "busy":
                if reason(i, now, todo, holds) and search(now, left, holds):
                    return True
            elif all(
                ops[j].owner == op.owner or compatible(ops[j].mode, op.mode) for j in holds
            ) and search(now, left, holds | {i}):
                return True
        return (
            now < latest and all(end(ops[i]) > now for i in todo) and search(now + 1, todo, holds)
        )

    return search(0, frozenset(range(len(ops))) - failed, frozenset())
