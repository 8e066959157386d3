"""The processes of one simulated node: what they have open, what they wait for, and how they end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from dlmfs.fs.tree import ROOT_INO
from dlmfs.fuse import opcodes, wire
from dlmfs.model import LVB_SIZE, Mode
from dlmfs.sim.kernel import Call, Kernel, LockDirectory, Program, Reply, Request

if TYPE_CHECKING:
    from dlmfs.sim.checks import Open
    from dlmfs.sim.node import SimNode

POLLIN: Final = 0x001


def flags_of(mode: Mode, *, trying: bool) -> int:
    access = os.O_RDONLY if mode is Mode.PR else os.O_RDWR
    return access | (os.O_NONBLOCK if trying else 0)


class OpenFile:
    """A lock file that is open: the grant that it came from, and the processes that share it."""

    __slots__ = ("fh", "grant", "ino", "kernel", "noticed", "users")

    def __init__(self, kernel: Kernel, ino: int, fh: int, grant: Open, user: Process) -> None:
        self.kernel = kernel
        self.ino = ino
        self.fh = fh
        self.grant = grant
        self.noticed = False
        """poll(2) said POLLIN or POLLERR."""
        self.users = [user]


class Process:
    """One single-threaded process. `program` is what it is doing, None when it is idle."""

    def __init__(self, node: SimNode, pid: int, parent: Process | None = None) -> None:
        self.node = node
        self.kernel = node.kernel
        self.pid = pid
        self.parent = parent
        self.files: list[OpenFile] = []
        self.program: Program | None = None
        self.call: Call | None = None
        self.dying = False
        self.dead = False
        self.listens = False
        """It sleeps in poll(2) on all that it has open."""
        self.deaf = False
        """It heeds no notices."""
        self.caught = False
        """A signal that it catches is pending: its handler runs when its call returns."""
        self.interrupted_at = 0.0
        """When its last call was, by the clock of its machine."""
        self.signalled = False
        """One came before its last call returned, or its death."""
        self.stopped = False
        self._held_back: tuple[Call, Reply] | None = None
        """What it gets when it goes on."""
        self._then: Callable[[], None] | None = None

    # -- running ------------------------------------------------------------------------------

    def run(self, program: Program, then: Callable[[], None] | None = None) -> None:
        """Do `program`, then call `then`."""
        assert self.program is None
        self.program, self._then = program, then
        self.kernel.enter()
        self._advance(None)

    def _advance(self, reply: Reply | None) -> None:
        self.call = None
        assert self.program is not None
        try:
            wanted = self.program.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            self.program = None
            self.kernel.leave()
            self._finished()
            return
        if isinstance(wanted, LockDirectory):
            self.kernel.lock(wanted.ino, lambda: self._advance(0))
        else:
            self.call = self.kernel.call(self.pid, wanted, self._answered)

    def _answered(self, call: Call, reply: Reply) -> None:
        if self.stopped and not self.dying:
            self._held_back = call, reply
        elif not call.gone:
            self.signalled, self.caught = self.caught or self.dying, False
            self.interrupted_at = call.interrupted_at or 0.0
            self._advance(reply)
        elif call.request.op == "open" and isinstance(reply, bytes):
            # It was answered already when the process was killed: the kernel closes what it got.
            self.kernel.release(call.request.ino, wire.opened_fh(reply))

    def _finished(self) -> None:
        then, self._then = self._then, None
        if self.dying:
            self._exit()
        elif then is not None:
            then()
        else:
            self.node.cluster.idle(self)

    @property
    def waits(self) -> bool:
        """Whether it is in open(2), and may be for long."""
        return self.call is not None and self.call.request.op == "open"

    # -- signals and ends ---------------------------------------------------------------------

    def signal(self) -> None:
        """A signal that is caught."""
        if self.call is not None:
            self.caught = True
            self.kernel.interrupt(self.call)
            self.node.checks.ends(self, self.call)

    def stop(self) -> None:
        """SIGSTOP. It stands still when its call returns, and not before."""
        if self.call is not None:
            self.stopped = True
            self.kernel.interrupt(self.call)

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped = False
        held_back, self._held_back = self._held_back, None
        if held_back is not None:
            self._answered(*held_back)

    def kill(self, *, unheard: bool) -> None:
        """SIGKILL. `unheard`: the answer that it waits for will reach nobody."""
        if self.dead:
            return
        self.dying = True
        if self.program is None:
            self._exit()
        elif self.call is not None:
            self.kernel.interrupt(self.call)
            if unheard and self.waits:
                self.call.gone = True
                self._exit()
            else:
                self.node.checks.ends(self, self.call)
            self.go_on()

    def _exit(self) -> None:
        self.dead = True
        if self.program is not None:
            self.kernel.leave()
        for file in list(self.files):
            self.close(file)
        self.node.processes.pop(self.pid, None)

    def close(self, file: OpenFile) -> None:
        """close(2)."""
        self.files.remove(file)
        file.users.remove(self)
        last = ", not the last" if file.users else ""
        self.node.cluster.tell(self.node.name, f"pid {self.pid}: close {file.grant.number}{last}")
        if not file.users:
            self.node.checks.closing(file)
            self.kernel.sleepers.pop(file.fh, None)
            self.kernel.release(file.ino, file.fh)

    def inherit(self, other: Process) -> None:
        """The descriptors that came by fork(2)."""
        for file in other.files:
            file.users.append(self)
            self.files.append(file)

    # -- what a program does --------------------------------------------------------------------

    def open(self, domain: bytes, name: bytes, mode: Mode, *, trying: bool, again: int) -> Program:
        """open(2); after EINTR `again` more times, as a runtime does."""
        for _ in range(again + 1):
            grant = self.node.checks.opening(self, domain, name, mode, trying=trying)
            result = yield from self.kernel.open(domain, name, flags_of(mode, trying=trying), grant)
            if isinstance(result, tuple):
                ino, fh = result
                file = OpenFile(self.kernel, ino, fh, grant, self)
                self.files.append(file)
                yield from self.poll(file)
                return
            self.node.checks.refused(grant, result, signalled=self.signalled)
            if result != errno.EINTR or self.dying:
                return

    def poll(self, file: OpenFile) -> Program:
        """poll(2), and sleep in it."""
        self.kernel.sleepers[file.fh] = lambda: self.woken(file)
        args = (file.fh, file.fh, opcodes.POLL_SCHEDULE_NOTIFY, POLLIN)
        reply = yield Request("poll", file.ino, args)
        if isinstance(reply, bytes) and int.from_bytes(reply[:4], "little"):
            self.noticed(file)

    def poll_all(self) -> Program:
        for file in list(self.files):
            yield from self.poll(file)

    def woken(self, file: OpenFile) -> None:
        """The kernel woke the poll(2): it asks again."""
        if file in self.files and self.program is None and not self.dead:
            self.run(self.poll(file))
        elif file in self.files:
            self.noticed(file)

    def noticed(self, file: OpenFile) -> None:
        file.noticed = True
        for user in file.users:
            self.node.cluster.noticed(user, file)

    def read(self, file: OpenFile) -> Program:
        floor = self.node.checks.reading(file)
        reply = yield Request("read", file.ino, (file.fh, 0, LVB_SIZE), file)
        if isinstance(reply, bytes):
            self.node.checks.read(file, reply, floor)

    def write(self, file: OpenFile, offset: int) -> Program:
        write = self.node.checks.writing(file, offset)
        reply = yield Request("write", file.ino, (file.fh, offset, write.data), file)
        self.node.checks.wrote(self, write, reply)

    def touch(self, domain: bytes, name: bytes) -> Program:
        """Make the lock's file, and its domain; nothing is opened."""
        parent = yield from self.kernel.find(ROOT_INO, domain, "mkdir")
        if parent > 0:
            yield from self.kernel.find(parent, name, "mknod")

    def unlink(self, domain: bytes, name: bytes) -> Program:
        parent = yield from self.kernel.look_up(ROOT_INO, domain)
        if parent > 0 and (yield from self.kernel.look_up(parent, name)) > 0:
            yield from self.kernel.remove("unlink", parent, name)

    def rmdir(self, domain: bytes) -> Program:
        if (yield from self.kernel.look_up(ROOT_INO, domain)) > 0:
            yield from self.kernel.remove("rmdir", ROOT_INO, domain)
