"""One run: a cluster, the steps of its scenario, healing, and the end at which nothing may be left.

Phases
------
1. The steps: programs act, and trouble comes, as the scenario says.
2. Everything heals. Whoever holds a lock closes it when poll(2) tells that it is wanted, and not before:
   a lost notice shows as somebody who waits for ever (promise 5).
3. Each node takes each lock once more, exclusively, and reads and writes its value.
4. Many wait, and one of them stands still (`crowd`); one node writes a value and goes (`kept`); one dies
   with a lock that others wait for (`recovery`).
5. All files are unlinked, domains left, nodes unmounted: the store must be empty but for marks, and no
   timer may be left.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

from dlmfs.engine.eviction import EVICT
from dlmfs.engine.lockspace import Life
from dlmfs.engine.records import HEADS, NODES, decode_head
from dlmfs.engine.timeline import OFFSET, STAMP
from dlmfs.model import Mode
from dlmfs.names import LOCK_NAME_MAX
from dlmfs.sim import actions, trouble, words
from dlmfs.sim.checks import Checks, Open
from dlmfs.sim.crowd import crowd
from dlmfs.sim.kept import kept
from dlmfs.sim.kernel import Call, Reply
from dlmfs.sim.loop import SimLoop
from dlmfs.sim.machine import Machine
from dlmfs.sim.node import SimNode
from dlmfs.sim.once import once
from dlmfs.sim.oracle import Arbiter, Oracle, Violation
from dlmfs.sim.programs import OpenFile, Process
from dlmfs.sim.recovery import recover
from dlmfs.sim.restores import Restores
from dlmfs.sim.scenario import Scenario, Step
from dlmfs.sim.spoiling import mend_all
from dlmfs.store.base import BOUNDS, Event
from dlmfs.store.memory_store import Faults

if TYPE_CHECKING:
    from dlmfs.store.base import KeyValue

EVENTS_MAX: Final = 200_000
"""Of a run; most need a hundredth of it."""


class Cluster:
    """See the head of the file. With `trace` everything that happens is noted in words."""

    def __init__(self, scenario: Scenario, *, trace: bool = False) -> None:
        self.scenario = scenario
        self.trace: list[str] | None = [] if trace else None
        self.rng = Random(f"run {scenario.seed}")
        self.loop = SimLoop(self.rng, EVENTS_MAX)
        self.faults = replace(scenario.faults)
        self.fitful = scenario.fitful
        self.ending = False
        self.polite = False
        """From the second phase on: notices are heeded."""
        self.injected = 0
        self.spoilt: dict[bytes, int] = {}
        """Keys whose records nobody can read, and since which revision (`spoiling`)."""
        delay_s = 0.0 if scenario.lenient else scenario.lock_delay_s / max(scenario.rates)
        self.oracle = Oracle(delay_s, self.loop.time, lock_delay=scenario.lock_delay_s > 0)
        self.arbiter = Arbiter(self.loop, 1000, scenario.bounds, self.oracle)
        self.arbiter.expired = self._lease_ended
        if trace:
            self.arbiter.told = self._commit
        self.checks = Checks(self, self.oracle)
        self.restores = Restores(self)
        self.domains = [b"dom%d" % number for number in range(scenario.domains)]
        self.names = _names(scenario)
        self.nodes = [SimNode(self, number) for number in range(scenario.nodes)]
        self._troubled_until = 0.0
        self._still_until = 0.0

    # -- telling --------------------------------------------------------------------------------

    def tell(self, who: str, what: str) -> None:
        """A line of the history."""
        if self.trace is not None:
            self.trace.append(f"{self.loop.time():12.6f}  {who:<8}  {what}")

    def _commit(self, author: str | None, revision: int, events: tuple[Event, ...]) -> None:
        self.tell("store", f"{revision}, {author or 'by itself'}: {words.commit(events)}")

    def tell_answer(self, node: SimNode, call: Call, reply: Reply) -> None:
        """A line for an answer that a program got."""
        if call.request.op in ("lookup", "mknod", "poll"):
            return
        said = errno.errorcode.get(reply, str(reply)) if isinstance(reply, int) else "ok"
        note = call.request.note
        what = call.request.op
        if isinstance(note, Open):
            token = f", token {note.token}" if note.token else ""
            what = f"{'try' if note.trying else 'open'} {note.number} {note.mode.name}"
            what += f" of {b'/'.join(note.lock).decode()}"
            said += token
        elif isinstance(note, OpenFile):
            what += f" through {note.grant.number}"
        late = " (overtaken by a pause)" if call.overtaken else ""
        self.tell(node.name, f"pid {call.header.pid}: {what}: {said}{late}")

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation, or whatever assertion of the product was broken."""
        for node in self.nodes:
            node.start()
        self.loop.run_for(1.0)
        for step in self.scenario.steps:
            self.loop.run_for(step.after_s)
            self._do(step)
        self._heal()
        self.restores.check()
        self._probe()
        crowd(self)
        kept(self)
        recover(self)
        self._settle()
        once(self)
        self._leave()
        self.checks.judge()

    def _do(self, step: Step) -> None:
        node = self.nodes[step.node % len(self.nodes)]
        rng = Random(step.salt)
        program: Callable[[SimNode, Random], None] | None = actions.STEPS.get(step.verb)
        if program is not None:
            if node.up:
                program(node, rng)
            return
        self.injected += 1
        self.disturb(2 * self.scenario.ttl_s)
        self.tell(node.name, f"TROUBLE: {step.verb}")
        trouble.STEPS[step.verb](self, node, rng)

    def disturb(self, seconds: float) -> None:
        """Trouble, and its consequences for so long."""
        self._troubled_until = max(self._troubled_until, self.loop.time() + seconds)

    def outlast(self, machine: Machine) -> None:
        """What is due on a machine that died while it stood still is due when it would have gone on."""
        self._still_until = max(self._still_until, machine.awake_at)

    @property
    def calm(self) -> bool:
        """Whether nothing but the programs themselves can be the reason for what they are told."""
        faults = self.faults
        lossy = faults.lose_request or faults.lose_answer or faults.apply_late or self.fitful
        waited = self.scenario.lock_delay_s
        return not lossy and self.loop.time() > self._troubled_until + 2 * waited

    # -- hooks ----------------------------------------------------------------------------------

    def noticed(self, process: Process, file: OpenFile) -> None:
        """poll(2) told a program that its lock is wanted, or lost."""
        self.tell(process.node.name, f"pid {process.pid}: notice on {file.grant.number}")
        if self.polite:
            self.loop.call_later(self.rng.choice([0.0, 0.01]), self._obey, process)

    def _obey(self, process: Process) -> None:
        if not process.dead and not process.deaf and process.program is None:
            for file in [f for f in process.files if f.noticed]:
                process.close(file)

    def _lease_ended(self, lease: int, node: str) -> None:
        self.tell("store", f"the lease {lease} of {node} ends")
        self.checks.lease_ended(self.nodes[int(node[1:])], lease)

    # -- healing ----------------------------------------------------------------------------------

    def _heal(self) -> None:
        self.tell("all", "EVERYTHING HEALS")
        self.polite = True
        if not self.calm:
            self.disturb(2 * self.scenario.ttl_s)
        self.fitful = 0.0
        self.faults.__dict__.update(Faults().__dict__)
        for node in self.nodes:
            if node.up and not node.machine.dead:
                node.machine.call_soon(trouble.find_bugs, node)
        if not self.arbiter.available:
            trouble.elect(self)
        mend_all(self)
        for node in self.nodes:
            node.machine.fitful = 0.0
            if self.scenario.lenient:
                node.rate = 1.0
                node.machine.set_rate(1.0)
            node.store.refresh()
            node.store.heal()
            if node.gone:
                node.crash()
            for process in list(node.processes.values()):
                if process.program is None:
                    self.idle(process)
        # Whoever stood still, or has a slow clock, may not know yet that its lease is over.
        scenario = self.scenario
        self.loop.run_until(lambda: not any(n.machine.stands_still for n in self.nodes), 1e6)
        self.loop.run_for(1.0 + scenario.ttl_s * 0.3 / min(scenario.rates))
        self._settle()

    def _settle(self) -> None:
        """Every waiter is granted, and every node has all that it should have."""
        scenario = self.scenario
        limit = 4 * scenario.ttl_s / min(scenario.rates) + 3 * scenario.lock_delay_s + 60
        if not self.loop.run_until(self._settled, limit):
            raise Violation(f"after {limit:.0f} s of calm: {self._unsettled()}")

    def idle(self, process: Process) -> None:
        """A program is done, and has its ear free for what it was told meanwhile."""
        if self.polite and not process.listens:
            process.listens = True
            process.run(process.poll_all())
        elif self.polite:
            self._obey(process)

    def _settled(self) -> bool:
        return not self._unsettled(brief=True)

    def _unsettled(self, *, brief: bool = False) -> str:
        if self.spoilt:
            return f"not mended: {list(self.spoilt)}"
        for node in self.nodes:
            if not node.up:
                return f"{node.name} is not up"
            if node.gone:
                node.crash()
                return f"{node.name} was evicted"
            if not node.membership.serving():
                return f"{node.name} is {node.membership.state.value}"
            if any(space.life is not Life.JOINED for space in node.membership.spaces.values()):
                return f"{node.name} is not back in its domains"
            for space in node.membership.spaces.values():
                if any(lock.wreck_left is not None for lock in space.locks.values()):
                    return f"{node.name} has not recovered all locks"
            for process in node.processes.values():
                if process.program is not None:
                    if brief:
                        return "busy"
                    note = process.call.request.note if process.call is not None else None
                    what = (
                        f"{note.mode.name} of {note.lock}"
                        if isinstance(note, Open)
                        else "something"
                    )
                    return f"pid {process.pid} on {node.name} still waits for {what}"
        return ""

    # -- the last round ---------------------------------------------------------------------------

    def _probe(self) -> None:
        """Every node takes every lock once more, and nobody is in the way who does not hear of it."""
        for domain in self.domains:
            for name in self.names:
                for node in self.nodes:
                    process = node.new_process()
                    process.deaf = True
                    self._run(process, process.open(domain, name, Mode.EX, trying=False, again=2))
                    if not process.files:
                        raise Violation(f"{node.name} cannot get {name!r} in the calm")
                    file = process.files[0]
                    self._run(process, process.read(file))
                    self._run(process, process.write(file, 0))
                    self._run(process, process.read(file))
                    process.kill(unheard=False)
                    self.loop.run_for(0.01)

    def _run(self, process: Process, program: object) -> None:
        process.run(program)  # type: ignore[arg-type]
        if not self.loop.run_until(
            lambda: process.program is None, 60 + 3 * self.scenario.lock_delay_s
        ):
            raise Violation(f"pid {process.pid} on {process.node.name} waits in the calm")

    def _leave(self) -> None:
        """The end: nothing is left."""
        for node in self.nodes:
            for process in list(node.processes.values()):
                process.kill(unheard=False)
        self.loop.run_for(2.0)
        for node in self.nodes:
            process = node.new_process()
            for domain in self.domains:
                for name in self.names:
                    self._run(process, process.unlink(domain, name))
                self._run(process, process.rmdir(domain))
            process.kill(unheard=False)
            self.loop.run_for(0.1)
            self._nothing_open(node)
        self.ending = True
        for node in self.nodes:
            if not node.unmount():
                raise Violation(f"{node.name} cannot be unmounted")
        self.loop.run_until(lambda: all(n.machine.dead for n in self.nodes), 60.0)
        still = max(0.0, self._still_until - self.loop.time())
        self.loop.run_for(still + 4 * self.scenario.ttl_s + 60)
        self._nothing_left()

    def _nothing_open(self, node: SimNode) -> None:
        fs = node.fs
        left = {
            "handles": fs.handles,
            "waiting": fs.waiting,
            "pending": fs.pending,
            "places": fs.places,
            "files": fs.tree.root.children,
            "spaces": node.membership.spaces,
            "requests": node.kernel.pending,
        }
        for what, things in left.items():
            if things:
                raise Violation(f"{node.name} is left with {what}: {things}")
        if len(fs.tree.inodes) > 1:
            raise Violation(f"{node.name} is left with inodes: {fs.tree.inodes}")
        for user in fs.usage.users.values():
            if user.holders or user.waiters or user.locks or user.domains:
                raise Violation(f"{node.name} counts {vars_of(user)} for nobody")

    def _nothing_left(self) -> None:
        for node in self.nodes:
            if not node.machine.dead:
                raise Violation(f"{node.name} did not leave")
        left = [kv.key for kv in self.arbiter.data.values() if not self._may_stay(kv)]
        if left:
            raise Violation(f"left in the store: {left}")
        if self.arbiter.leases:
            raise Violation(f"sessions left: {self.arbiter.leases}")
        if self.arbiter.watchers:
            raise Violation(f"{len(self.arbiter.watchers)} watches left")
        pending = self.loop.pending()
        if pending:
            raise Violation(f"{pending} timers left")

    def _may_stay(self, kv: KeyValue) -> bool:
        """Heads that tell of a death which no exclusive holder knows of, or whose last members crashed;
        marks that a node could not hear; and the timeline's records."""
        if kv.key.startswith(NODES):
            return kv.key.endswith(EVICT)
        if not kv.key.startswith(HEADS):
            return kv.key in (STAMP, OFFSET)
        head = decode_head(kv)
        domain, name = kv.key[len(HEADS) :].split(b"/", 1)
        seen = head.forgettable() or bool(self.oracle.lock((domain, name)).seers)
        return bool(head.members) or not seen


def _names(scenario: Scenario) -> list[bytes]:
    """The locks' names; in a quarter of the runs whose commits are of real size, as long as can be."""
    names = [b"lock%d" % number for number in range(scenario.locks)]
    if scenario.bounds.size < BOUNDS.size or Random(f"names {scenario.seed}").random() >= 0.25:
        return names
    return [name.ljust(LOCK_NAME_MAX, b"x") for name in names]


def vars_of(user: object) -> dict[str, int]:
    """What is counted for a user."""
    return {name: getattr(user, name) for name in ("holders", "waiters", "locks", "domains")}
