"""A fuzzer of the FUSE layer with all that is behind it: two nodes, their file systems, one store.

Everything runs in virtual time and in one thread, from a seed: a run is a list of steps, and a step
draws from a generator of its own. `run` raises `Found` for what must not be; `shrink` takes away
steps as long as the same is found.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable
from random import Random
from typing import Any, Final, NamedTuple
from unittest import mock

from dlmfs import proc
from dlmfs.engine.membership import Config, Membership
from dlmfs.engine.timeline import STAMP
from dlmfs.errors import DlmfsError, Unavailable
from dlmfs.fs.filesystem import FileSystem
from dlmfs.fs.tree import LockFile, Tree
from dlmfs.fuse import device as device_module
from dlmfs.fuse import opcodes as op
from dlmfs.fuse.device import Device
from dlmfs.model import HolderRule, Limits
from dlmfs.sim.loop import SimLoop
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_store import Faults, MemoryStore
from tests.fuse import fuzz_requests, messages
from tests.fuse.fuzz_kernel import INTERRUPTIBLE, WAITS, Kernel, PlayedOs, PlayedProc

LENGTH: Final = 60
PATIENCE_S: Final = 120.0
"""In virtual time: longer than every wait of the protocol together."""
SMALL: Final = Limits(max_domains=2, max_locks=5, max_holders=4, max_waiters=2)
OTHER: Final[dict[str, int]] = {"burst": 5, "wait": 8, "cut": 4, "heal": 4, "gone": 4, "died": 1}
"""Steps that are no request, with their weights among the requests'."""


class Found(Exception):
    """Something that must not be."""


class Step(NamedTuple):
    """`kind` is a request's name or one of `OTHER`; the rest of it is drawn from `seed`. `more`: the
    next one is there before the daemon reads this one."""

    side: int
    kind: str
    seed: int
    more: bool = False


class Plan(NamedTuple):
    """One run. `abrupt`: it ends with an unmount in the middle of everything."""

    seed: int
    faults: bool
    small: bool
    owner: HolderRule
    abrupt: bool
    early: int
    steps: tuple[Step, ...]


def plan(seed: int, length: int = LENGTH) -> Plan:
    """What a seed stands for."""
    rng = Random(seed)
    faults = rng.random() < 0.4
    weights = {kind: weight for kind, (weight, _) in fuzz_requests.MAKERS.items()} | OTHER
    if not faults:
        del weights["cut"], weights["heal"]
    # First something to work with, lest most of what follows is about names that do not exist.
    first = ("mkdir", "wait", "mknod", "mknod", "open", "open")
    steps = [Step(side, kind, rng.getrandbits(32)) for kind in first for side in (0, 1)]
    for kind in rng.choices(list(weights), list(weights.values()), k=length):
        side = rng.randrange(2)
        if kind == "burst":
            some = rng.choices(list(fuzz_requests.MAKERS), k=rng.randint(2, 40))
            steps += [Step(side, one, rng.getrandbits(32), more=True) for one in some]
        else:
            steps.append(Step(side, kind, rng.getrandbits(32)))
    return Plan(
        seed,
        faults,
        rng.random() < 0.2,
        rng.choice((HolderRule.NODE, HolderRule.FILE)),
        rng.random() < 0.3,
        rng.choice((0, 0, 3)),
        tuple(steps),
    )


class Loop(SimLoop):
    """Virtual time and, for the descriptors, what is called when one becomes readable."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, Callable[..., Any]] = {}

    def add_reader(self, fd: int, callback: Callable[..., Any], *_args: Any) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> bool:
        return self.readers.pop(fd, None) is not None


class Side:
    """One node: its kernel, device, file system and membership."""

    def __init__(self, name: str, made: Plan, loop: Loop, server: MemoryServer, fake: PlayedOs):
        faults = Faults()
        if made.faults:
            faults = Faults(lose_request=0.02, lose_answer=0.02, apply_late=0.01)
        self.loop = loop
        self.bugs: list[str] = []
        self.store = MemoryStore(server, Random(made.seed), faults)
        config = Config((name,), {}, lambda _facts: False, made.owner)
        self.member = Membership(self.store, loop, loop.time, config)
        limits = SMALL if made.small else None
        tree = Tree(0, 0)
        self.fs = FileSystem(
            tree, self.member, loop, self.member.timing, limits=limits, readers=loop
        )
        self.member.host = self.fs
        self.kernel = fake.open()
        self.kernel.lossy = made.faults
        self.kernel.clock = loop.time
        self.fs.by_kernel = proc.is_64_bit
        self.fs.cause = self.kernel.cause  # type: ignore[method-assign]
        self.device = self.fs.device = Device(self.kernel.fd, self.fs, loop)
        self.device.on_bug = lambda request, error: self.bugs.append(f"{request}: {error!r}")
        self.ends: list[str] = []
        self.device.on_end = self.ends.append
        self.member.start(self._started)

    def _started(self, error: DlmfsError | None) -> None:
        if isinstance(error, Unavailable):  # lost on the way: a service manager would try again
            self.loop.call_later(0.1, self.member.start, self._started)
        elif error is not None:
            self.bugs.append(repr(error))

    def pump(self) -> None:
        """Let the device loop read all there is, as the event loop would."""
        while self.kernel.queue:
            reader = self.loop.readers.get(self.kernel.fd)
            if reader is None:
                raise Found(f"the device loop has ended: {self.ends}")
            reader()

    def ask(self, data: bytes) -> None:
        self.kernel.send(data)
        self.pump()


class Watcher(logging.Handler):
    """Collects what dlmfs logs as an error, but for the ones that are the fuzzer's own doing."""

    EXPECTED = ("came again while it is pending", "is fenced: ")

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info or not any(known in text for known in self.EXPECTED):
            self.lines.append(self.format(record))


class Run:
    """A plan while it is carried out."""

    def __init__(self, made: Plan, fake: PlayedOs, watcher: Watcher) -> None:
        self.plan = made
        self.fake = fake
        self.watcher = watcher
        self.loop = Loop()
        self.server = MemoryServer(self.loop)
        self.sides = [Side(name, made, self.loop, self.server, fake) for name in ("a", "b")]
        self.trace: list[str] = []

    def play(self) -> None:
        rng = Random(self.plan.seed)
        started = [side.member for side in self.sides]
        assert self.loop.run_until(lambda: all(member.serving() for member in started), 60.0)
        for side in self.sides:
            side.device.start()
            for _ in range(self.plan.early):
                side.ask(
                    fuzz_requests.request(rng, side.kernel, rng.choice((3, 14, 26, 38)), bytes(3))
                )
            side.ask(messages.init(side.kernel.unique(), major=8))
            side.ask(messages.init(side.kernel.unique()))
            self.check()
        for step in self.plan.steps:
            self.step(step)
        if self.plan.abrupt:
            for side in self.sides:
                side.store.heal()
        else:
            self.settle()
            self.clear()
        self.unmount()

    # -- steps --------------------------------------------------------------------------------

    def step(self, step: Step) -> None:
        side, rng = self.sides[step.side], Random(step.seed)
        kernel = side.kernel
        if step.kind == "wait":
            self.loop.run_for(rng.choice((0.001, 0.05, 1.1, 4.1, 12.0)))
        elif step.kind == "cut":
            side.store.cut()
        elif step.kind == "heal":
            side.store.heal()
        elif step.kind == "gone":
            kernel.gone.update(kernel.outstanding)
            kernel.next_is_gone = rng.random() < 0.7
        elif step.kind == "died":
            kernel.queue.append(errno.ENOENT)
        else:
            self.send(side, step.kind, rng)
        if step.kind == "cut" and kernel.handles:
            self.send(side, rng.choice(("write", "write", "read")), rng)
        if step.more:
            return
        side.pump()
        self.loop.run_for(rng.choice((0.0, 0.0, 0.0005, 0.01)))
        self.check()

    def send(self, side: Side, kind: str, rng: Random) -> None:
        data = fuzz_requests.MAKERS[kind][1](rng, side.kernel)
        if rng.random() < 0.1:
            data = fuzz_requests.mutated(rng, side.kernel, data)
        self.trace.append(f"{side.member.name} {kind} {data[:120].hex(' ', -4)}")
        side.kernel.send(data)

    # -- what must hold -----------------------------------------------------------------------

    def check(self) -> None:
        if self.watcher.lines:
            raise Found(f"logged: {self.watcher.lines[0]}")
        for side in self.sides:
            kernel = side.kernel
            kernel.check_interrupt()
            if side.bugs or kernel.wrong or side.ends:
                raise Found(f"{side.bugs or kernel.wrong or side.ends}")
            if not kernel.queue and side.device.pending != len(kernel.outstanding):
                raise Found(
                    f"{side.device.pending} requests pending, unanswered {kernel.outstanding}"
                )
            late = [s for s in kernel.outstanding.values() if s.opcode not in WAITS]
            if late:
                raise Found(f"not answered at once: {late}")

    def settle(self) -> None:
        """Interrupt what waits, close and forget everything; then nobody may owe anything."""
        for side in self.sides:
            side.store.heal()
        for side in self.sides:
            side.pump()
            kernel = side.kernel
            kernel.dying = True
            for unique, sent in list(kernel.outstanding.items()):
                if sent.opcode in INTERRUPTIBLE:
                    body = struct.pack("=Q", unique)
                    side.ask(messages.request(op.INTERRUPT, unique | 1, body))
        self.loop.run_for(PATIENCE_S)
        self.check()
        for side in self.sides:
            if side.kernel.outstanding:
                raise Found(f"never answered: {side.kernel.outstanding}")
            rng = Random(0)
            for fh, inode in list(side.kernel.handles.items()):
                side.ask(fuzz_requests.release_of(rng, side.kernel, fh, inode))
            for inode, count in list(side.kernel.nodes.items()):
                side.ask(fuzz_requests.forget_of(side.kernel, inode, count))
        self.loop.run_for(PATIENCE_S)
        self.check()
        for side in self.sides:
            self.no_claims(side)
            self.no_references(side)

    def no_claims(self, side: Side) -> None:
        fs = side.fs
        left = {
            "handles": fs.handles,
            "waiting": fs.waiting,
            "pending": fs.pending,
            "places": fs.places._places,
            "interrupts": {n: 1 for n in [len(fs.interrupts)] if n},
        }
        for user in fs.usage.users.values():
            left["holders and waiters"] = {n: 1 for n in (user.holders, user.waiters) if n}
        for space in fs.spaces.values():
            for name, lock in space.locks.items():
                left[f"claims of {name!r}"] = {
                    **lock.res.holders,
                    **dict(enumerate(lock.res.waiters)),
                }
        if left := {what: found for what, found in left.items() if found}:
            raise Found(f"leaked: {left}")

    def no_references(self, side: Side) -> None:
        fs = side.fs
        counted = sum(inode.lookups for inode in fs.tree.inodes.values())
        unlinked = [inode.ino for inode in fs.tree.inodes.values() if not inode.linked]
        files = sum(isinstance(inode, LockFile) for inode in fs.tree.inodes.values())
        if counted or unlinked:
            raise Found(f"{counted} references that the kernel gave back, kept: {unlinked}")
        domains = len(fs.tree.root.children)
        if (fs.usage.domains, fs.usage.locks) != (domains, files):
            raise Found(f"counted {fs.usage.domains}, {fs.usage.locks} of {domains}, {files}")
        if sum(u.locks for u in fs.usage.users.values()) != files:
            raise Found("the users' sums of locks are wrong")

    def clear(self) -> None:
        """Remove every name. On a store without faults that leaves nothing in it either."""
        for side in self.sides:
            side.store.faults = Faults()
            root = side.fs.tree.root
            for domain in list(root.children.values()):
                for name in list(getattr(domain, "children", ())):
                    side.ask(remove(side.kernel, op.UNLINK, domain.ino, name))
                    self.loop.run_for(PATIENCE_S)
                side.ask(remove(side.kernel, op.RMDIR, root.ino, domain.name))
                self.loop.run_for(PATIENCE_S)
            self.check()
            if set(side.fs.tree.inodes) != {root.ino} or side.fs.spaces or side.member.spaces:
                names = [f"{s.domain!r} {s.life}" for s in side.member.spaces.values()]
                raise Found(f"left: {sorted(side.fs.tree.inodes)}, {side.fs.spaces}, {names}")
        # Nodes have ends of their own, and the stamp is the lock space's.
        keys = [key for key in self.server.data if not key.startswith(b"n/") and key != STAMP]
        if keys and not self.plan.faults:
            raise Found(f"left in the store: {keys}")

    def unmount(self) -> None:
        """The kernel goes, and then the node: who waited is sent away, and what was open, of which no
        RELEASE comes, keeps its place for a grace and is lost then."""
        for side in self.sides:
            side.kernel.over = True
            side.loop.readers[side.kernel.fd]()
            side.device.close()
            if side.ends != ["unmounted"] or side.bugs:
                raise Found(f"unmounted: {side.ends} {side.bugs}")
        self.loop.run_for(PATIENCE_S)
        closed: list[object] = []
        for side in self.sides:
            side.store.faults = Faults()
            side.member.ending.begin("a test", closed.append)
            if side.fs.waiting or side.fs.places._places:
                raise Found(f"they wait on: {side.fs.waiting} {side.fs.places._places}")
        self.loop.run_for(PATIENCE_S)
        for side in self.sides:
            for fh in list(side.fs.handles):
                side.fs._close(side.fs.handles[fh])
            side.fs.pending.clear()
            self.no_claims(side)
        for side in self.sides:
            side.store.close()
        self.loop.run_for(PATIENCE_S)
        if closed != [None, None]:
            raise Found(f"left the store with {closed}")
        for thread in threading.enumerate():
            if thread.name == "fuse-invalidate":
                thread.join(30.0)
        if self.fake.kernels or self.loop.readers:
            raise Found(f"descriptors left: {self.fake.kernels} {self.loop.readers}")
        if self.loop.pending():
            raise Found(f"{self.loop.pending()} timers left")
        if self.watcher.lines:
            raise Found(f"logged: {self.watcher.lines[0]}")


def remove(kernel: Kernel, opcode: int, parent: int, name: bytes) -> bytes:
    return messages.request(opcode, kernel.unique(), name + b"\0", node=parent)


def run(made: Plan) -> tuple[str | None, list[str]]:
    """What was found, or None, and what was sent."""
    fake, watcher = PlayedOs(), Watcher()
    logger = logging.getLogger("dlmfs")
    level = logger.level
    logger.addHandler(watcher)
    logger.setLevel(logging.ERROR)
    started = Run(made, fake, watcher)
    before = set(os.listdir("/proc/self/fd"))
    try:
        played = PlayedProc(made.seed)
        looks = {name: getattr(played, name) for name in ("read", "numbers", "link", "user")}
        with mock.patch.object(device_module, "os", fake), mock.patch.multiple(proc, **looks):
            try:
                started.play()
            except Exception as error:
                return f"{type(error).__name__}: {error}{_place(error)}", started.trace
            finally:
                for side in started.sides:
                    side.device.close()
                    side.fs.places.clear()
                for thread in threading.enumerate():
                    if thread.name == "fuse-invalidate":
                        thread.join(30.0)
        after = set(os.listdir("/proc/self/fd"))
        return (None if len(after) <= len(before) else f"descriptors: {after}"), started.trace
    finally:
        logger.removeHandler(watcher)
        logger.setLevel(level)


def _place(error: Exception) -> str:
    """Where an exception that is no finding of ours was raised."""
    where = error.__traceback__
    if isinstance(error, Found) or where is None:
        return ""
    while where.tb_next is not None:
        where = where.tb_next
    return f" ({os.path.basename(where.tb_frame.f_code.co_filename)}:{where.tb_lineno})"


def kind_of(finding: str | None) -> str | None:
    """The finding without its numbers, to tell two of them apart."""
    return None if finding is None else "".join(c for c in finding if not c.isdigit())[:60]


def shrink(made: Plan) -> Plan:
    """Take away steps, in ever smaller pieces, as long as the same is found."""
    wanted = kind_of(run(made)[0])
    piece = max(1, len(made.steps) // 2)
    while True:
        place, shrunk = 0, False
        while place < len(made.steps):
            fewer = made._replace(steps=made.steps[:place] + made.steps[place + piece :])
            if kind_of(run(fewer)[0]) == wanted:
                made, shrunk = fewer, True
            else:
                place += piece
        if piece == 1 and not shrunk:
            return made
        piece = max(1, piece // 2)


def report(made: Plan) -> str:
    """A failing plan for people: shrunk, with what is sent."""
    made = shrink(made)
    finding, trace = run(made)
    steps = "\n".join(f"  {step}" for step in made.steps)
    return "\n".join([f"{finding}", f"{made._replace(steps=())}", steps, *trace])
