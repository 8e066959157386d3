"""A node of the exhaustive check: the real engine, with everything that comes to it made a choice.

Nothing happens here by itself. What the engine calls for later stands in `Clock`, what it sends in
`Handle.sent`; the explorer takes one of them at a time. A node touches nothing outside of itself, so
what one event makes of it depends on its own state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

from dlmfs.core.events import Claim, Phase, Stage
from dlmfs.engine.forgetting import leave_unused
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.errors import Bug, DlmfsError
from dlmfs.model import LVB_SIZE, HolderRule, Mode
from dlmfs.sim.exhaustive.snapshot import Parts
from dlmfs.store.base import Bounds, Txn, TxnDone, WatchBatch, WatchGap
from dlmfs.store.check import check
from dlmfs.store.memory import MemoryServer

DOMAIN: Final = b"x"
MODES: Final = {"pr": Mode.PR, "ex": Mode.EX}


class Call:
    """Something to be called later; `cancel` takes it away."""

    __slots__ = ("args", "callback", "clock", "when")

    def __init__(
        self, clock: Clock, when: float, callback: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        self.clock = clock
        self.when = when
        self.callback = callback
        self.args = args

    def cancel(self) -> None:
        if self in self.clock.timers:
            self.clock.timers.remove(self)


class Clock:
    """A node's scheduler. Its time moves only when one of its timers fires."""

    __slots__ = ("now", "soon", "timers")

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: list[Call] = []
        self.timers: list[Call] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> Call:
        call = Call(self, self.now, callback, args)
        self.soon.append(call)
        return call

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Call:
        call = Call(self, self.now + delay, callback, args)
        self.timers.append(call)
        return call

    def next_timer(self) -> Call:
        return min(self.timers, key=lambda call: call.when)

    def run_soon(self) -> None:
        """asyncio runs such calls in the order in which they were made."""
        call = self.soon.pop(0)
        call.callback(*call.args)

    def run_timer(self) -> None:
        call = self.next_timer()
        self.timers.remove(call)
        self.now = max(self.now, call.when)
        call.callback(*call.args)


class NoTime:
    """The store's clock: leases end by choice."""

    def time(self) -> float:
        return 0.0

    def call_soon(self, _callback: Callable[..., Any], *_args: Any) -> object:
        raise Bug("the store calls nobody")

    def call_later(self, _delay: float, _callback: Callable[..., Any], *_args: Any) -> NoTimer:
        return NoTimer()


class NoTimer:
    def cancel(self) -> None:
        """It never fires."""


class Watching(NamedTuple):
    prefixes: tuple[bytes, ...]
    from_revision: int


class Watch:
    __slots__ = ("handle",)

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def cancel(self) -> None:
        self.handle.sink = None


class Handle:
    """The node's way to the store: what it sends waits in `sent` until the world takes it."""

    __slots__ = ("bounds", "pending", "sent", "sink", "watching")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.pending: dict[int, TxnDone] = {}
        self.sent: list[tuple[int, Txn]] = []
        self.watching: Watching | None = None
        self.sink: Callable[[WatchBatch | WatchGap], None] | None = None

    def txn(self, txn: Txn, done: TxnDone) -> None:
        check(txn, self.bounds)
        slot = next(i for i in range(len(self.pending) + 1) if i not in self.pending)
        self.pending[slot] = done
        self.sent.append((slot, txn))

    def watch(
        self,
        prefixes: Sequence[bytes],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> Watch:
        self.watching, self.sink = Watching(tuple(prefixes), from_revision), sink
        return Watch(self)

    def open_session(self, *_args: object) -> NoReturn:
        raise Bug("sessions are the explorer's")

    def end_session(self, *_args: object) -> NoReturn:
        raise Bug("sessions are the explorer's")

    def describe(self) -> dict[str, object]:
        return {"store": "explored"}

    def kill_stopped(self, lease: int) -> bool:  # noqa: ARG002
        return False

    def lease_left(self, lease: int, done: Callable[[float | DlmfsError | None], None]) -> None:  # noqa: ARG002
        raise Bug("nobody asks here why a lock is not free")

    def size_mb(self) -> float:
        return 0.0

    def close(self) -> None:
        raise Bug("the explorer ends a node by taking it away")


class Step(NamedTuple):
    """One thing that a program does. `verb` is an open's mode, or what it says."""

    verb: str
    lock: bytes
    trying: bool
    interruptible: bool


def parse(program: str) -> tuple[Step, ...]:
    """The steps of a program: words `pr`, `ex`, `try-pr`, `try-ex`, `close` (what it opened last),
    `put`, `get` (the value, by what it opened last), `unlink`, `idle` (the node looks whether the lock is
    used), `leave`; `@b` names another lock than `a`; `?` behind an open: a signal may end the wait."""
    steps = []
    for word in program.split():
        verb, _, lock = word.rstrip("?").partition("@")
        trying = verb.startswith("try-")
        verb = verb.removeprefix("try-")
        if verb not in (*MODES, "close", "put", "get", "unlink", "idle", "leave"):
            raise Bug(f"a program knows no {word!r}")
        steps.append(Step(verb, lock.encode() or b"a", trying, word.endswith("?")))
    return tuple(steps)


class Seen(NamedTuple):
    """What a program got to know, for the checks: granted, failed, written, read."""

    what: str
    lock: bytes
    program: int
    mode: Mode = Mode.NL
    token: int = 0
    reason: int = 0
    value: bytes = b""
    holds: bool = False
    """Whether its program has the lock open already."""
    trying: bool = False


class Descriptor(Claim):
    """An open file of a program."""

    __slots__ = ("clock", "lock", "program")

    def __init__(self, fh: int, step: Step, program: int, clock: Clock) -> None:
        super().__init__(fh, MODES[step.verb], trying=step.trying, pid=1 + program)
        self.clock = clock
        self.lock = step.lock
        self.program = program


class Program:
    """A process: its steps, how far it is, what it has open. It waits for each step's end."""

    __slots__ = ("at", "number", "opened", "steps", "waits_for_store")

    def __init__(self, number: int, steps: tuple[Step, ...]) -> None:
        self.number = number
        self.steps = steps
        self.at = 0
        self.opened: list[Descriptor] = []
        self.waits_for_store = False

    @property
    def waiting(self) -> bool:
        return bool(self.opened) and self.opened[-1].stage is Stage.WAITING

    @property
    def step(self) -> Step | None:
        return self.steps[self.at] if self.at < len(self.steps) else None

    def give_up(self) -> None:
        """An open failed: nothing is left to do but to close what it has."""
        self.at = len(self.steps)
        self.steps += tuple(Step("close", d.lock, False, False) for d in self.opened)


class Node:
    """One life of a node: its lock space, and the programs on it."""

    def __init__(
        self,
        name: str,
        number: int,
        lease: int,
        rule: HolderRule,
        programs: Iterable[Program],
        *,
        bounds: Bounds,
    ) -> None:
        self.number = number
        self.clock = Clock()
        self.handle = Handle(bounds)
        self.programs = list(programs)
        self.seen: list[Seen] = []
        self.joined = False
        self.fh = 0
        self.space = Lockspace(
            self.handle, self.clock, self, domain=DOMAIN, node=name, lease=lease, rule=rule
        )
        self.space.join(self._joined)

    def _joined(self, error: DlmfsError | None) -> None:
        if error is not None:
            raise error
        self.joined = True

    # -- Host -----------------------------------------------------------------------------------

    def granted(self, claim: Claim) -> None:
        assert isinstance(claim, Descriptor)
        if claim.mode is Mode.EX:  # as the file system does
            lock = self._lock(claim)
            lock.view.had_ex = lock.res.revision
        self.seen.append(self._of("granted", claim, token=claim.token))

    def failed(self, claim: Claim, reason: int) -> None:
        assert isinstance(claim, Descriptor)
        program = self.programs[claim.program]
        program.opened.remove(claim)
        holds = any(d.lock == claim.lock for d in program.opened)
        self.seen.append(self._of("failed", claim, reason=reason)._replace(holds=holds))
        program.give_up()

    def notify(self, claim: Claim) -> None:
        """Seen by `contended` in every state."""

    def identify(
        self, claim: Claim, holders: Sequence[Claim], done: Callable[[bool], None]
    ) -> None:
        done(any(h.pid == claim.pid for h in holders))

    def domain_lost(self, domain: bytes, reason: str) -> None:
        raise Bug(f"a node whose lease stands lost {domain!r}: {reason}")

    def lock_lost(
        self, lock: ClusterLock, holders: Sequence[Claim], waiters: Sequence[Claim]
    ) -> None:
        """`broken` has raised what it was."""

    def broken(self, where: str, error: Exception) -> None:  # noqa: ARG002 - part of `Host`
        raise error

    @staticmethod
    def _of(what: str, claim: Descriptor, *, token: int = 0, reason: int = 0) -> Seen:
        return Seen(what, claim.lock, claim.program, claim.mode, token, reason, trying=claim.trying)

    # -- programs -------------------------------------------------------------------------------

    def may_act(self, program: Program) -> bool:
        """Whether the program's next step can be taken now."""
        step = program.step
        if step is None or program.waiting or program.waits_for_store or not self.joined:
            return False
        if self.space.life is not Life.JOINED:
            return step.verb == "close" and self.space.live
        if step.verb == "leave":  # an unmount: nothing is open any more
            return not any(lock.res.in_use for lock in self.space.locks.values())
        if step.verb == "unlink":
            lock = self.space.locks.get(step.lock)
            return lock is None or not lock.res.in_use
        return True

    def may_interrupt(self, program: Program) -> bool:
        return program.waiting and program.steps[program.at - 1].interruptible

    def act(self, number: int) -> None:
        program = self.programs[number]
        step = program.step
        assert step is not None
        program.at += 1
        if step.verb in MODES:
            self._open(program, step)
        elif step.verb == "close":
            claim = program.opened.pop()
            self.space.locks[claim.lock].close(claim)
        elif step.verb == "get":
            claim = program.opened[-1]
            program.waits_for_store = True
            self._lock(claim).read_lvb(partial(self._read, program, claim))
        elif step.verb == "put":
            claim = program.opened[-1]
            program.waits_for_store = True
            value = bytes([65 + 16 * self.number + 4 * number + program.at % 4]) * LVB_SIZE
            self._lock(claim).write_lvb(0, value, partial(self._wrote, program, claim, value))
        elif step.verb == "unlink":
            if step.lock in self.space.locks:
                program.waits_for_store = True
                done = partial(self._unlinked, program, step.lock)
                self.space.locks[step.lock].forget(done)
        elif step.verb == "idle":
            lock = self.space.locks.get(step.lock)
            if lock is not None:  # a look at whether somebody uses it (`fs.unused`)
                lock.enter(leave_unused, lock, partial(self.space.drop, step.lock))
        else:
            program.waits_for_store = True
            self.space.leave(partial(self._left, program))

    def _lock(self, claim: Descriptor) -> ClusterLock:
        return self.space.locks[claim.lock]

    def _open(self, program: Program, step: Step) -> None:
        self.fh += 1
        claim = Descriptor(self.fh, step, program.number, self.clock)
        program.opened.append(claim)
        if self.space.lock(step.lock).open(claim):
            self.granted(claim)

    def interrupt(self, number: int) -> None:
        program = self.programs[number]
        claim = program.opened.pop()
        program.give_up()
        self._lock(claim).interrupt(claim)

    def _read(self, program: Program, claim: Descriptor, value: bytes) -> None:
        program.waits_for_store = False
        self.seen.append(self._of("read", claim)._replace(value=value))

    def _wrote(
        self, program: Program, claim: Descriptor, value: bytes, error: DlmfsError | None
    ) -> None:
        program.waits_for_store = False
        if error is not None:
            raise Bug(f"a holder's write failed: {error}")
        self.seen.append(self._of("wrote", claim)._replace(value=value))

    def _unlinked(self, program: Program, lock: bytes, error: DlmfsError | None) -> None:
        program.waits_for_store = False
        if error is None:
            self.space.drop(lock)

    @staticmethod
    def _left(program: Program, error: DlmfsError | None) -> None:
        program.waits_for_store = False
        if error is not None:
            raise Bug(f"a clean leave failed: {error}")


class Facts(NamedTuple):
    """What the explorer has to know of a node's state without thawing it."""

    soon: bool
    timer: str
    """The earliest timer's callback; empty: none."""
    acts: tuple[int, ...]
    interrupts: tuple[int, ...]
    levels: tuple[tuple[bytes, Mode], ...]
    waits: tuple[tuple[bytes, Mode, bool], ...]
    """Who waits: lock, mode, whether it is a trylock."""
    holds: tuple[tuple[bytes, Mode, bool], ...]
    """Who holds: lock, mode, and whether poll(2) tells that somebody waits."""
    restless: tuple[bytes, ...]
    """Locks where something is under way."""
    unfinished: bool
    """Whether a program has steps to take, or to end."""
    watching: Watching | None
    """The watch that is open."""
    to_watch: bool
    """Whether a watch will be opened that begins at an earlier revision."""
    live: bool


def facts(node: Node) -> Facts:
    space = node.space
    locks = sorted(space.locks.items())
    claims = [(n, lock, c) for n, lock in locks for c in lock.res.waiters.values()]
    holders = [(n, lock, c) for n, lock in locks for c in lock.res.holders.values()]
    clock = node.clock
    timer = clock.next_timer().callback.__name__ if clock.timers else ""
    return Facts(
        soon=bool(clock.soon),
        timer=timer,
        acts=tuple(p.number for p in node.programs if node.may_act(p)),
        interrupts=tuple(p.number for p in node.programs if node.may_interrupt(p)),
        levels=tuple((n, lock.res.level) for n, lock in locks) if space.live else (),
        waits=tuple((n, c.mode, c.trying) for n, _, c in claims),
        holds=tuple((n, c.mode, lock.res.contended) for n, lock, c in holders),
        restless=tuple(n for n, lock in locks if _restless(lock)) if space.live else (),
        unfinished=any(p.step is not None or p.waits_for_store for p in node.programs),
        watching=node.handle.watching if node.handle.sink is not None else None,
        to_watch=node.handle.sink is None and (space.live or space.life is Life.JOINING),
        live=space.live,
    )


def _restless(lock: ClusterLock) -> bool:
    return not lock.idle or lock.res.phase is not Phase.IDLE


def _space_parts(space: Lockspace) -> Iterable[object]:
    """All but what is only counted for `dlmfs status`."""
    return (
        value for name, value in sorted(vars(space).items()) if name not in ("commits", "answers")
    )


def _clock_parts(clock: Clock) -> Iterable[object]:
    """Times count from now: the engine only ever takes differences."""
    yield [(c.callback, c.args) for c in clock.soon]
    yield [(round(c.when - clock.now, 6), c.callback, c.args) for c in clock.timers]


def _call_parts(call: Call) -> Iterable[object]:
    """A timer's handle: which one it is, or None if it has fired."""
    timers = call.clock.timers
    return (timers.index(call) if call in timers else None,)


def _claim_parts(claim: Descriptor) -> Iterable[object]:
    yield from (claim.fh, claim.kin, claim.mode, claim.pid, claim.seq, claim.stage, claim.token)
    yield from (claim.trying, claim.lock, claim.program)
    # Only a trylock's wait is ever measured.
    timed = claim.trying and claim.stage is Stage.WAITING
    yield round(claim.clock.now - claim.since, 6) if timed else None


def _server_parts(server: MemoryServer) -> Iterable[object]:
    """Keys are sorted when they are asked for; the history lies with the watchers (`World.told`); a
    lease's keys follow from the data."""
    return (server.revision, [server.data[k] for k in sorted(server.data)], set(server.leases))


SPECIAL: Final[dict[type, Parts]] = {
    Lockspace: _space_parts,
    Clock: _clock_parts,
    Call: _call_parts,
    Descriptor: _claim_parts,
    MemoryServer: _server_parts,
}
