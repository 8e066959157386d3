"""One simulated node: the real membership, engine, core and file system on a simulated machine.

What `dlmfs.node.Node` joins for a real mount is joined here: a store handle, the membership, the file
system and a kernel. A node that dies is followed by another life under the same name.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, cast

from dlmfs.core.events import Claim
from dlmfs.core.lease import LeaseState
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.membership import Config, Membership
from dlmfs.errors import DlmfsError
from dlmfs.fs.filesystem import FileSystem
from dlmfs.fs.handle import Handle
from dlmfs.fs.signals import Cause
from dlmfs.fs.tree import Directory, Tree
from dlmfs.fuse.wire import Header
from dlmfs.model import DeadValue, HolderRule, Mode
from dlmfs.sim.kernel import Call, Injected, Kernel, Reply
from dlmfs.sim.machine import Machine
from dlmfs.sim.oracle import Arbiter, Lock, Violation
from dlmfs.sim.programs import Process
from dlmfs.store.base import Txn, TxnResult
from dlmfs.store.memory_store import MemoryStore
from dlmfs.timing import Timing

if TYPE_CHECKING:
    from dlmfs.sim.checks import Checks
    from dlmfs.sim.cluster import Cluster

RESTART_S = 1.0
SLOW_KIN_S = (0.0, 0.0, 0.001, 0.5)


class NamedStore(MemoryStore):
    """A store handle whose transactions carry the node's name, for the oracle."""

    node: SimNode

    def _apply(self, txn: Txn) -> TxnResult | DlmfsError:
        arbiter = cast("Arbiter", self.server)
        arbiter.author = self.node.name
        try:
            return super()._apply(txn)
        finally:
            arbiter.author = None


class Files(FileSystem):
    """The real file system; what it would ask /proc it asks the simulated processes."""

    node: SimNode
    faulty = False
    """The next open that is served raises."""

    def identify(
        self, claim: Claim, holders: Sequence[Claim], done: Callable[[bool], None]
    ) -> None:
        """As the real one, by a thread that takes its time: at once, or a little later."""
        kin, machine = self._is_kin(claim, holders), self.node.machine
        if self.node.slow_kin:
            machine.call_later(self.node.slow_kin * machine.rng.random(), done, kin)
        else:
            done(kin)

    def _is_kin(self, claim: Claim, holders: Sequence[Claim]) -> bool:
        handle = cast("Handle", claim)
        pids = {holder.pid for holder in holders}
        process = self.node.processes.get(claim.pid)
        if process is not None and any(file.ino == handle.file.ino for file in process.files):
            return True
        while process is not None:
            if process.pid in pids:
                return True
            process = process.parent
        return False

    def mknod(self, h: Header, name: bytes, mode: int, umask: int, rdev: int) -> Reply | None:
        reply = super().mknod(h, name, mode, umask, rdev)
        if isinstance(reply, bytes):
            self.node.checks.made(self.node, (self._directory(h.node).name, name))
        return reply

    def rejoined(self, space: Lockspace) -> None:
        super().rejoined(space)
        for lock in [lock for lock in self.node.files if lock[0] == space.domain]:
            self.node.checks.made(self.node, lock)

    def _serve(self, handle: Handle) -> bytes:
        if self.faulty:
            self.faulty = False
            raise Injected("a bug in a request")
        if handle.mode is Mode.EX:
            lock = (handle.file.domain.name, handle.file.name)
            self.node.cluster.oracle.had_ex(lock, self.node.name)
        return super()._serve(handle)

    def fate(self, pid: int) -> int | None:
        process = self.node.processes.get(pid)
        return None if process is None or process.dying else pid

    def cause(self, thread: int) -> Cause:
        process = self.node.processes.get(thread)
        if process is None or process.dying:
            return Cause.FATAL
        return Cause.CAUGHT if process.caught else Cause.NOTHING

    def domain_lost(self, domain: bytes, reason: str) -> None:
        self.node.checks.lost(self.node, domain)
        space = self.node.space(domain)
        if space is not None:
            self.node.checks.oracle.lost.add((domain, self.node.name, space.incarnation))
        super().domain_lost(domain, reason)

    def broken(self, where: str, error: Exception) -> None:
        """Nothing breaks by itself: what does is a finding."""
        if not isinstance(error, Injected) and where not in self.node.spoiled:
            raise error
        self.node.spoiled.discard(where)
        self.node.cluster.tell(self.node.name, f"a fault in {where}: {error!r}")

    def lock_lost(self, lock: ClusterLock, *claims: Sequence[Claim]) -> None:
        self.node.checks.lock_lost(self.node, (lock.space.domain, lock.name))
        super().lock_lost(lock, *claims)

    def ends(self, reason: str) -> None:
        self.node.cluster.tell(self.node.name, f"ends: {reason}")
        self.node.checks.node_ends(self.node)
        super().ends(reason)

    def fenced(self, reason: str) -> None:
        self.node.cluster.tell(self.node.name, f"is fenced: {reason}")
        if "in the store has" in reason or "is not of dlmfs" in reason:
            raise Violation(f"a record that cannot be read cost {self.node.name}: {reason}")
        super().fenced(reason)


class SimNode:
    """A name in the cluster and its present life, if it has one."""

    machine: Machine
    store: NamedStore
    membership: Membership
    fs: Files
    kernel: Kernel

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.checks: Checks = cluster.checks
        self.number = number
        self.name = f"n{number}"
        self.rule = HolderRule(cluster.scenario.rules[number])
        self.rate = cluster.scenario.rates[number]
        self.slow_kin = Random(f"kin {cluster.scenario.seed}").choice(SLOW_KIN_S)
        """How long it may take to know whose process another is."""
        dead_values = cluster.scenario.dead_values
        self.dead_value = DeadValue(dead_values[number]) if dead_values else DeadValue.KEEP
        self.life = 0
        self.up = False
        """Mounted: programs can use it."""
        self.leaving = False
        self.files: dict[Lock, float] = {}
        """The lock files made here in this life, and since when its present membership knows of them."""
        self.processes: dict[int, Process] = {}
        self.last_served: dict[int, float] = {}
        """By lease: when something was last served under it."""
        self.spoiled: set[str] = set()
        """Where an exception is to be expected, once."""
        self._over: set[int] = set()
        self._pid = 0

    # -- lives --------------------------------------------------------------------------------

    def start(self) -> None:
        """A new daemon begins."""
        cluster, scenario = self.cluster, self.cluster.scenario
        self.life += 1
        self.up = self.leaving = False
        rng = Random(f"{scenario.seed} {self.name} {self.life}")
        self.machine = machine = Machine(cluster.loop, rng, self.rate)
        machine.fitful, machine.nap_s = cluster.fitful, scenario.nap_s
        self.store = NamedStore(
            cluster.arbiter,
            rng,
            cluster.faults,
            machine=machine,
            clock=machine.clock,
            lag=machine.lag,
            leased=scenario.leased,
        )
        self.store.node = self
        facts = {"node": self.name, "life": self.life}
        config = Config(
            (self.name,),
            facts,
            self._is_over,
            self.rule,
            scenario.ttl_s,
            scenario.lock_delay_s,
            dead_value=self.dead_value,
        )
        self.membership = Membership(self.store, machine, machine.clock, config)
        self.fs = Files(
            Tree(),
            self.membership,
            machine,
            Timing(scenario.ttl_s),
            forget_s=scenario.forget_s or None,
        )
        self.fs.node = self
        self.membership.host = self.fs
        self.kernel = Kernel(machine, self.fs, self._watch)
        self.fs.device = self.kernel
        if scenario.transient:
            self.kernel.open_mode |= stat.S_ISVTX
        self.processes, self.files = {}, {}
        self.membership.start(partial(self._started, self.life))

    def _started(self, life: int, error: DlmfsError | None) -> None:
        if life != self.life or self.machine.dead:
            return
        if error is None:
            self.up = True
            self.cluster.tell(self.name, "is up")
        else:  # as a service manager does
            self.cluster.tell(self.name, f"does not start: {error}")
            self.crash()

    def _is_over(self, facts: Mapping[str, object]) -> bool:
        return self.cluster.scenario.provable and facts["life"] in self._over

    def crash(self) -> None:
        """The daemon dies, and its processes with it. Another life begins a little later."""
        if self.machine.dead:
            return
        self.checks.crashed(self)
        self._end()
        self.store.crash()
        self.cluster.loop.call_later(RESTART_S, self._restart, self.life)

    def _restart(self, life: int) -> None:
        if life != self.life or self.cluster.ending:
            return
        if self.cluster.restores.untold:
            self.cluster.loop.call_later(RESTART_S, self._restart, life)
        else:
            self.start()

    def _end(self) -> None:
        self.up = False
        self.cluster.outlast(self.machine)
        self.machine.crash()
        self.kernel.die()
        self._over.add(self.life)
        for process in list(self.processes.values()):
            process.dying = process.dead = True
        self.processes = {}

    def unmount(self) -> bool:
        """umount(8): refused while a file is open. False: refused."""
        busy = self.processes or self.fs.handles or self.fs.pending
        if not self.up or self.leaving or busy:
            return False
        self.up, self.leaving = False, True
        self.kernel.dead = True
        self.membership.ending.begin("umount", partial(self._departed, self.life))
        return True

    def end(self) -> None:
        """A signal to the daemon, whatever its programs have open."""
        if self.up and not self.leaving:
            self.leaving = True
            self.membership.ending.begin("a signal", partial(self._departed, self.life))

    def abort(self) -> None:
        """The connection to the kernel is gone: no close is seen any more."""
        if self.up and not self.leaving:
            self.up, self.leaving = False, True
            self.checks.node_ends(self)
            self.kernel.die()
            self.membership.ending.begin("aborted", partial(self._departed, self.life))

    def _departed(self, life: int, _error: DlmfsError | None) -> None:
        if life == self.life and not self.machine.dead:
            self.cluster.tell(self.name, "has left")
            self._end()
            self.store.dead = True
            self.store.close()
            self.cluster.loop.call_later(RESTART_S, self._restart, self.life)

    def network_faults(self) -> int:
        """Messages of its present life that were lost, late or repeated, and its pauses."""
        return self.store.mishaps + self.machine.stalls

    @property
    def has_session(self) -> bool:
        return not self.machine.dead and self.membership.up

    @property
    def settled(self) -> bool:
        """Whether it knows something of the store, if it lives at all."""
        return self.machine.dead or self.up or self.leaving

    @property
    def gone(self) -> bool:
        """Evicted, or its store was another one: only a new daemon helps."""
        return self.membership.final

    # -- what it would serve ----------------------------------------------------------------------

    def space(self, domain: bytes) -> Lockspace | None:
        return self.membership.spaces.get(domain)

    def has_file(self, lock: Lock) -> bool:
        """Whether its lock's file stands here."""
        directory = self.fs.tree.root.children.get(lock[0])
        return isinstance(directory, Directory) and lock[1] in directory.children

    def lock(self, lock: Lock) -> ClusterLock | None:
        space = self.space(lock[0])
        return None if space is None else space.locks.get(lock[1])

    def deadline(self) -> float:
        """When, in true time, its lease is over by its own clock; infinity if it does not run out."""
        session = self.membership.session
        if session is None or session.renewed_at is None:
            return float("inf")
        fence_at = session.renewed_at + self.membership.timing.fence_after_s
        return self.machine.true_time(fence_at)

    def serves(self, lock: Lock) -> Mode:
        """The level of a lock that the node would serve a program at this instant."""
        member = self.membership
        if self.machine.dead or self.machine.stands_still or not (self.up or self.leaving):
            return Mode.NL
        # UNPROVED it serves nothing, unless it does not know that it should be.
        if member.state not in (LeaseState.HEALTHY, LeaseState.SUSPECT) or self.fs.ending:
            return Mode.NL
        fence_at = member.fence_at
        if fence_at is not None and self.machine.boottime() >= fence_at:
            return Mode.NL
        found = self.lock(lock)
        space = self.space(lock[0])
        return (
            found.res.level if found is not None and space is not None and space.live else Mode.NL
        )

    # -- programs -------------------------------------------------------------------------------

    def new_process(self, parent: Process | None = None) -> Process:
        self._pid += 1
        process = Process(self, self.number * 10_000 + self._pid, parent)
        self.processes[process.pid] = process
        return process

    def _watch(self, what: str, call: Call, reply: Reply | None) -> None:
        if what == "taken":
            self.checks.taken(self, call)
        else:
            assert reply is not None
            self.checks.answered(self, call, reply)
            if self.cluster.trace is not None:
                self.cluster.tell_answer(self, call, reply)
