"""The Linux kernel above one simulated node: requests in order, names it caches, one process a task.

As far as a lock file system notices: CREATE is MKNOD and OPEN, names are looked up once, a directory's
lock is held across MKNOD, MKDIR, UNLINK and RMDIR, ESTALE from OPEN is tried again, INTERRUPT is sent
once for each request (for a stop as for a signal, and nothing else ends the wait but the answer), RELEASE
comes when the last descriptor is closed (fuse-notes).
"""

from __future__ import annotations

import errno
import stat
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dlmfs.errors import Bug, DlmfsError
from dlmfs.fs.tree import ROOT_INO
from dlmfs.fuse import opcodes, wire

if TYPE_CHECKING:
    from dlmfs.fs.filesystem import FileSystem
    from dlmfs.sim.machine import Machine

Reply = bytes | int
"""A payload or an errno."""

UID: Final = 1000
FILE_MODE: Final = stat.S_IFREG | 0o644


class Injected(Exception):
    """An exception that the simulation plays into the product."""


class Request(NamedTuple):
    """A call of the file system that a process waits for. `note` is kept with it for the checks."""

    op: str
    ino: int
    args: tuple[Any, ...] = ()
    note: object = None


class LockDirectory(NamedTuple):
    """The kernel's lock on a directory; given back with `Kernel.unlock`."""

    ino: int


Program = Generator[Request | LockDirectory, Reply, Any]
"""What a process does: it yields a request and is sent the reply."""


class Call:
    """One request under way. `gone`: its process died, and the answer will reach nobody."""

    __slots__ = ("gone", "header", "interrupted_at", "overtaken", "request", "then")

    def __init__(
        self, header: wire.Header, request: Request, then: Callable[[Call, Reply], None]
    ) -> None:
        self.header = header
        self.request = request
        self.then = then
        self.interrupted_at: float | None = None
        """By the machine's clock."""
        self.overtaken = False
        """The daemon was paused between its last look at the clock and this answer."""
        self.gone = False


class Kernel:
    """See the head of the file. `watcher` is told of each request that the daemon takes up, and of
    each answer, before the process hears of it."""

    def __init__(
        self, machine: Machine, fs: FileSystem, watcher: Callable[[str, Call, Reply | None], None]
    ) -> None:
        self.machine = machine
        self.fs = fs
        self.watcher = watcher
        self.dead = False
        self.names: dict[tuple[int, bytes], int] = {}
        self.sleepers: dict[int, Callable[[], None]] = {}
        """Who sleeps in poll(2), by the kernel's handle."""
        self.pending: dict[int, Call] = {}
        self.walkers = 0
        """Programs in the middle of something: they may refer to an inode that has lost its name."""
        self.open_mode = FILE_MODE
        """Of a file that is made to be opened."""
        self._lookups: dict[int, int] = {}
        self._unnamed: list[int] = []
        self._inbox: deque[Call | tuple[str, int, int]] = deque()
        self._outbox: deque[tuple[Call, Reply]] = deque()
        self._locked: dict[int, deque[Callable[[], None]]] = {}
        self._unique = 1

    # -- requests -----------------------------------------------------------------------------

    def call(self, pid: int, request: Request, then: Callable[[Call, Reply], None]) -> Call:
        """Send a request; `then` gets the answer. The daemon being dead is an answer, too."""
        self._unique += 2
        opcode = getattr(opcodes, request.op.upper())
        header = wire.Header(0, opcode, self._unique, request.ino, UID, UID, pid)
        call = Call(header, request, then)
        if self.dead:
            self.machine.loop.call_soon(then, call, errno.ENOTCONN)
        else:
            self._post(call)
        return call

    def _post(self, message: Call | tuple[str, int, int]) -> None:
        self._inbox.append(message)
        self.machine.call_soon(self._drain)

    def interrupt(self, call: Call) -> None:
        """A signal, or a stop, for the process: told once, whatever comes later."""
        if call.interrupted_at is None:
            call.interrupted_at = self.machine.time()
            self._post(("interrupt", call.header.unique, 0))

    def release(self, ino: int, fh: int) -> None:
        """The last descriptor is closed; nobody waits for the answer."""
        if not self.dead:
            header = wire.Header(0, 0, 0, ino, UID, UID, 0)
            self._post(Call(header, Request("release", ino, (fh,)), lambda _call, _reply: None))

    def _drain(self) -> None:
        if not self._inbox or self.dead:
            return
        message = self._inbox.popleft()
        if isinstance(message, tuple):
            kind, number, count = message
            if kind == "forget":
                self.fs.forget(number, count)
            elif number in self.pending:
                self.fs.interrupt(number)
            return
        self.watcher("taken", message, None)
        reply = self._handle(message)
        unique = message.header.unique
        if reply is None:
            self.pending[unique] = message
        elif unique:
            self.machine.effect()
            if not self._deliver(message, reply) and isinstance(reply, bytes):
                self.fs.undelivered(message.header, reply)

    def _handle(self, call: Call) -> Reply | None:
        handler: Callable[..., Reply | None] = getattr(self.fs, call.request.op)
        try:
            return handler(call.header, *call.request.args)
        except Bug:
            raise
        except Injected as error:  # as the device does with whatever nobody expected
            self.fs.broken(f"request {call.request.op}", error)
            return errno.EIO
        except DlmfsError as error:
            return error.errno
        except OSError as error:
            return error.errno or errno.EIO

    # -- what the daemon tells (`fs.openfiles.Kernel`) -------------------------------------------

    def answer(self, unique: int, reply: bytes | int) -> bool:
        if self.dead:
            return False
        call = self.pending.pop(unique, None)
        if call is None:
            raise Bug(f"answered request {unique}, which is not pending")
        self.machine.effect()
        return self._deliver(call, reply)

    def _deliver(self, call: Call, reply: Reply) -> bool:
        call.overtaken = self.machine.overtaken
        if call.gone:
            return False
        self._outbox.append((call, reply))
        self.machine.loop.call_later(self.machine.lag(), self._arrive)
        return True

    def _arrive(self) -> None:
        call, reply = self._outbox.popleft()  # in the order in which they were written
        if self.dead:
            reply = errno.ECONNABORTED
        self.watcher("answered", call, reply)
        call.then(call, reply)

    def notify_poll(self, kh: int) -> None:
        sleeper = self.sleepers.get(kh)
        if sleeper is not None:
            self.machine.loop.call_later(self.machine.lag(), sleeper)

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        self.machine.loop.call_later(self.machine.lag(), self.drop_name, parent, name)

    def die(self) -> None:
        """The daemon is gone: whoever waits hears so, and everything else fails from now on."""
        self.dead = True
        calls = [*self.pending.values(), *(m for m in self._inbox if isinstance(m, Call))]
        self.pending.clear()
        self._inbox.clear()
        for call in calls:
            if call.header.unique:
                self.machine.loop.call_soon(call.then, call, errno.ECONNABORTED)

    # -- names --------------------------------------------------------------------------------

    def drop_name(self, parent: int, name: bytes) -> None:
        """Forget a name."""
        ino = self.names.pop((parent, name), None)
        if ino is not None:
            self._unnamed.append(ino)
            self._forget()

    def _forget(self) -> None:
        """Tell the daemon of the inodes that nobody refers to any more."""
        if self.walkers or self.dead:
            return
        unnamed, self._unnamed = self._unnamed, []
        for ino in unnamed:
            self._post(("forget", ino, self._lookups.pop(ino, 0)))

    def enter(self) -> None:
        """A program begins something."""
        self.walkers += 1

    def leave(self) -> None:
        """It is done."""
        self.walkers -= 1
        self._forget()

    def _learn(self, parent: int, name: bytes, entry: bytes) -> int:
        ino = wire.entry_node(entry)
        known = self.names.get((parent, name), ino)
        if known != ino:  # a lost file's successor, seen by two at once
            self._unnamed.append(known)
        self.names[parent, name] = ino
        self._lookups[ino] = self._lookups.get(ino, 0) + 1
        return ino

    def unlock(self, ino: int) -> None:
        """Give a directory's lock to the next."""
        queue = self._locked[ino]
        if queue:
            queue.popleft()()
        else:
            del self._locked[ino]

    def lock(self, ino: int, then: Callable[[], None]) -> None:
        if ino in self._locked:
            self._locked[ino].append(then)
        else:
            self._locked[ino] = deque()
            then()

    def look_up(self, parent: int, name: bytes) -> Program:
        """The inode number of a name, or a negative errno."""
        ino = self.names.get((parent, name))
        if ino is not None:
            return ino
        reply = yield Request("lookup", parent, (name,))
        return -reply if isinstance(reply, int) else self._learn(parent, name, reply)

    def make(self, op: str, parent: int, name: bytes, mode: int) -> Program:
        """MKDIR or MKNOD under the directory's lock; as `look_up`."""
        args = (0o755, 0) if op == "mkdir" else (mode, 0, 0)
        yield LockDirectory(parent)
        reply = yield Request(op, parent, (name, *args))
        self.unlock(parent)
        return -reply if isinstance(reply, int) else self._learn(parent, name, reply)

    def find(self, parent: int, name: bytes, op: str, mode: int = FILE_MODE) -> Program:
        """Look a name up, and make it if it is not there."""
        ino = yield from self.look_up(parent, name)
        if ino == -errno.ENOENT:
            ino = yield from self.make(op, parent, name, mode)
            if ino == -errno.EEXIST:
                ino = yield from self.look_up(parent, name)
        return ino

    def remove(self, op: str, parent: int, name: bytes, note: object = None) -> Program:
        """UNLINK or RMDIR under the directory's lock: 0 or an errno."""
        yield LockDirectory(parent)
        reply = yield Request(op, parent, (name,), note)
        self.unlock(parent)
        if isinstance(reply, int):
            return reply
        self.drop_name(parent, name)
        return 0

    def open(self, domain: bytes, name: bytes, flags: int, note: object) -> Program:
        """open(2) with O_CREAT, domain and all: (inode, handle) or an errno."""
        parent = yield from self.find(ROOT_INO, domain, "mkdir")
        if parent < 0:
            return -parent
        reply: Reply = errno.ESTALE
        for _ in range(2):  # the kernel looks a stale name up once more
            ino = yield from self.find(parent, name, "mknod", self.open_mode)
            if ino < 0:
                return -ino
            reply = yield Request("open", ino, (flags,), note)
            if reply != errno.ESTALE:
                break
            self.drop_name(parent, name)
        return reply if isinstance(reply, int) else (ino, wire.opened_fh(reply))
