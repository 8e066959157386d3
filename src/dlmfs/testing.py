"""Locks for the tests of programs: no mount, no daemon, no /dev/fuse, and faults on request.

    with dlmfs.testing.locks() as locks:
        ...             # the program: `with dlmfs.Lock("jobs/x"):`, semaphores, elections, asyncio
        locks.lose()    # whatever it holds is lost now

Inside of the block every relative path is a lock of a cluster that lives in this process alone: the real
library, file system and lock protocol, on the store that the simulation has, under holder=file.

Rules of this file
------------------
* The engine runs in one thread, in an event loop; nobody else touches it.
* That thread never waits for a program's: it may be asked to close a file by one who holds a mutex that
  it wants itself. So `close` and `unwatch` are told, and not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from dlmfs.client import base, logic
from dlmfs.client.keeper import Keeper
from dlmfs.client.place import AnyPath, Place
from dlmfs.client.turns import turns
from dlmfs.client.watcher import Watched, tell
from dlmfs.engine.membership import Config, Membership
from dlmfs.errors import Cancelled, DlmfsError, UsageError
from dlmfs.fs.filesystem import FileSystem
from dlmfs.fs.signals import Cause
from dlmfs.fs.tree import ROOT_INO, Tree
from dlmfs.fuse import opcodes, wire
from dlmfs.model import LVB_SIZE, HolderRule
from dlmfs.names import domain_fault, lock_fault
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_store import MemoryStore
from dlmfs.timing import Timing

MOUNT: Final = "/dlmfs-testing"
TTL_S: Final = 3.0
"""A node that is cut off is fenced after two thirds of it."""
GRACE_S: Final = 0.1
"""Between a loss and the return of its node: no process here has to be ended in that time."""
START_S: Final = 60.0

_mutex = threading.Lock()
"""One cluster at a time: it takes the mounts' place for the whole process."""


class Locks:
    """What a test can do to the cluster. Made by `locks`."""

    def __init__(self, ttl_s: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="dlmfs:testing", daemon=True
        )
        self._thread.start()
        self._server = self._do(lambda: MemoryServer(self._loop, start_revision=1000))
        self._node = _Node(self._loop, self._server, "test", ttl_s)
        self._other = _Node(self._loop, self._server, "other", ttl_s)

    def _do(self, what: Callable[[], Any]) -> Any:
        """Have the engine's thread do it."""
        return _ask(self._loop, what)

    def lose(self) -> None:
        """All locks that the program has are lost, now, as by a fence; the node is back a moment later.
        Returns when the holders were told."""
        self._do(self._node.lose)

    def silence(self) -> None:
        """The store answers the program's node no more: what needs it waits, and when two thirds of the
        lease time are over the node is fenced and its locks are lost."""
        self._do(self._node.store.cut)

    def heal(self) -> None:
        """It answers again; a node that was fenced comes back."""
        self._do(self._node.store.heal)

    @contextlib.contextmanager
    def busy(self, path: str, *, shared: bool = False) -> Iterator[None]:
        """Another node has the lock `path` for the block; its holders are waited for."""
        where = _placed(path)
        with contextlib.suppress(FileExistsError):
            self._other.make(where.domain)
        with contextlib.suppress(FileExistsError):
            self._other.make_lock(where)
        fd = self._other.open(where, os.O_RDONLY if shared else os.O_RDWR).fd()
        try:
            yield
        finally:
            self._other.close(fd)

    def _end(self) -> None:
        for node in (self._node, self._other):
            self._do(node.end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def locks(*, ttl: float = TTL_S) -> Iterator[Locks]:
    """A cluster in memory, which the library uses in this process until the end of the block. `ttl`: the
    lease time in seconds. Raises UsageError inside of another one's block."""
    if not _mutex.acquire(blocking=False):
        raise UsageError("there is one cluster for tests at a time")
    try:
        made = Locks(ttl)

        def keeper(request: logic.Request, told: Callable[[], object], event: Any) -> Keeper:
            return _Keeper(request, told, event, made._node)  # noqa: SLF001 - its own module

        before = base.doors
        base.doors = base.Doors(lambda path, _mount: _placed(path), keeper, made._node.attribute)  # noqa: SLF001
        try:
            yield made
        finally:
            base.doors = before
            made._end()  # noqa: SLF001
    finally:
        _mutex.release()


def _placed(path: AnyPath) -> Place:
    """The place of DOMAIN/LOCK, or of MOUNT/DOMAIN/LOCK."""
    text = os.path.normpath(os.fsdecode(path).removeprefix(MOUNT).lstrip("/"))
    domain, _, name = text.partition("/")
    fault = domain_fault(os.fsencode(domain)) or lock_fault(os.fsencode(name))
    if os.fsdecode(path).startswith("/") and not os.fsdecode(path).startswith(MOUNT):
        fault = "inside of dlmfs.testing.locks() paths are relative"
    if fault:
        raise UsageError(f"{os.fsdecode(path)} is not a lock: {fault}")
    return Place(MOUNT, "0:0", "testing", domain, name, os.getuid())


def _ask(loop: asyncio.AbstractEventLoop, what: Callable[[], Any]) -> Any:
    answer: Future[Any] = Future()

    def act() -> None:
        try:
            answer.set_result(what())
        except BaseException as error:
            answer.set_exception(error)

    loop.call_soon_threadsafe(act)
    return answer.result()


class _Files(FileSystem):
    """There is no process to be looked at: who is interrupted is so for good."""

    def cause(self, thread: int) -> Cause:  # noqa: ARG002 - part of the file system
        return Cause.FATAL


class _Request:
    """One under way."""

    def __init__(self, unique: int) -> None:
        self.unique = unique
        self.reply: Future[bytes | int] = Future()

    def result(self) -> bytes:
        """The payload of the answer. Raises OSError."""
        reply = self.reply.result()
        if isinstance(reply, int):
            raise OSError(reply, os.strerror(reply))
        return reply

    def fd(self) -> int:
        """The number of what was opened. Raises OSError."""
        return wire.opened_fh(self.result())


class _Node:
    """One node, and what the kernel is to it. For any thread, but for what says otherwise."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, server: MemoryServer, name: str, ttl_s: float
    ) -> None:
        self.loop = loop
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Request] = {}
        self._watched: dict[int, Watched] = {}
        self._inodes: dict[int, int] = {}
        started: Future[DlmfsError | None] = Future()

        def start() -> None:
            self.store = MemoryStore(server, machine=loop, clock=time.monotonic)
            config = Config(
                (name,),
                {"node": name},
                lambda _facts: False,
                HolderRule.FILE,
                ttl_s,
                grace_s=GRACE_S,
            )
            self.membership = Membership(self.store, loop, time.monotonic, config)
            self.fs = _Files(Tree(), self.membership, loop, Timing(ttl_s))
            self.fs.device = self
            self.membership.host = self.fs
            self.membership.start(started.set_result)

        _ask(loop, start)
        error = started.result(START_S)
        if error is not None:
            raise error

    # -- requests -----------------------------------------------------------------------------------

    def _send(self, op: str, ino: Callable[[], int], *args: Any) -> _Request:
        """Ask the file system, of the inode that is found then."""
        request = _Request(next(self._numbers))
        pid = threading.get_native_id()

        def act() -> None:
            self._pending[request.unique] = request
            try:
                header = wire.Header(
                    0,
                    getattr(opcodes, op.upper()),
                    request.unique,
                    ino(),
                    os.getuid(),
                    os.getgid(),
                    pid,
                )
                reply = getattr(self.fs, op)(header, *args)
            except DlmfsError as error:
                reply = error.errno
            except OSError as error:
                reply = error.errno or errno.EIO
            except BaseException as error:
                self._pending.pop(request.unique, None)
                request.reply.set_exception(error)
                return
            if reply is not None:
                self.answer(request.unique, reply)

        try:
            self.loop.call_soon_threadsafe(act)
        except RuntimeError:  # the block is over
            request.reply.set_result(errno.ENOTCONN)
        return request

    def _child(self, ino: int, name: str) -> int:
        """In the engine's thread. Raises OSError."""
        header = wire.Header(0, opcodes.LOOKUP, 0, ino, os.getuid(), os.getgid(), 0)
        reply = self.fs.lookup(header, os.fsencode(name))
        if isinstance(reply, bytes):
            return wire.entry_node(reply)
        raise OSError(reply, "no such name")

    def _file(self, where: Place) -> int:
        return self._child(self._child(ROOT_INO, where.domain), where.name)

    def make(self, domain: str) -> None:
        """mkdir(2). Raises OSError."""
        self._send("mkdir", lambda: ROOT_INO, os.fsencode(domain), 0o755, 0).result()

    def make_lock(self, where: Place) -> None:
        """mknod(2). Raises OSError."""
        mode = stat.S_IFREG | logic.MODE
        domain = partial(self._child, ROOT_INO, where.domain)
        self._send("mknod", domain, os.fsencode(where.name), mode, 0, 0).result()

    def open(self, where: Place, flags: int) -> _Request:
        """open(2): a request that may wait, and can be interrupted."""

        def file() -> int:
            ino = self._file(where)
            self._inodes[self.fs.last_fh + 1] = ino
            return ino

        return self._send("open", file, flags & ~os.O_CLOEXEC)

    def interrupt(self, request: _Request) -> None:
        """End its wait, if it still waits."""

        def act() -> None:
            if request.unique in self._pending:
                self.fs.interrupt(request.unique)

        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(act)

    def read(self, fd: int) -> bytes:
        return self._send("read", lambda: self._inodes[fd], fd, 0, LVB_SIZE).result()

    def write(self, fd: int, data: bytes) -> None:
        self._send("write", lambda: self._inodes[fd], fd, 0, data).result()

    def attribute(self, path: str, name: str) -> bytes:
        """getxattr(2) by a path below MOUNT. Raises OSError."""

        def ino() -> int:
            return ROOT_INO if path == MOUNT else self._file(_placed(path))

        return self._send("getxattr", ino, os.fsencode(name), 65536).result()

    def attribute_of(self, fd: int, name: str) -> bytes:
        return self._send("getxattr", lambda: self._inodes[fd], os.fsencode(name), 65536).result()

    def close(self, fd: int) -> None:
        self._send("release", lambda: self._inodes.pop(fd, ROOT_INO), fd)

    # -- notices --------------------------------------------------------------------------------------

    def watch(self, fd: int, holder: Watched) -> None:
        self._watched[fd] = holder
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._look, fd)

    def unwatch(self, fd: int) -> None:
        self._watched.pop(fd, None)

    def _look(self, fd: int) -> None:
        """In the engine's thread: poll(2)."""
        holder = self._watched.get(fd)
        if holder is None:
            return
        header = wire.Header(0, opcodes.POLL, 0, self._inodes.get(fd, ROOT_INO), 0, 0, 0)
        reply = self.fs.poll(header, fd, fd, wire.POLL_SCHEDULE_NOTIFY, 0)
        events = int.from_bytes(reply[:4], "little") if isinstance(reply, bytes) else 0
        if events:
            tell(holder, events)

    # -- what the engine tells, in its thread ------------------------------------------------------------

    def answer(self, unique: int, reply: bytes | int) -> bool:
        request = self._pending.pop(unique, None)
        if request is None:
            return False
        request.reply.set_result(reply)
        return True

    def notify_poll(self, kh: int) -> None:
        self.loop.call_soon(self._look, kh)

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """Names are looked up anew each time."""

    def lose(self) -> None:
        """Fenced; and back when the holders have had their time."""
        assert self.store.session is not None
        self.store.server.expire(self.store.session.lease)

    def end(self) -> None:
        """As a daemon's death: what waits and holds is told."""
        for unique in list(self._pending):
            self.answer(unique, errno.ENOTCONN)
        for holder in list(self._watched.values()):
            tell(holder, select.POLLERR | select.POLLHUP)


class _Keeper(Keeper):
    """As the real one, but for the system calls."""

    def __init__(
        self, request: logic.Request, told: Callable[[], object], event: Any, node: _Node
    ) -> None:
        super().__init__(request, told, event)
        self._node = node
        self._opening: _Request | None = None
        self._ended = threading.Event()

    def _do(self, step: logic.Step) -> object:
        where = self.request.place
        match step:
            case logic.Open(_, flags):
                return self._open(where, flags)
            case logic.MakeLock(_):
                self._node.make_lock(where)
            case logic.MakeDomain(_):
                self._node.make(where.domain)
            case logic.Device(_):
                return os.makedev(0, 0)
            case logic.Token(fd):
                text = self._node.attribute_of(fd, logic.TOKEN)
                if not text:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                self.token = int(text)
            case logic.Close(fd):
                self._close_file(fd)
            case logic.Pause(seconds, why):
                self.away = why
                if self._ended.wait(seconds):
                    raise Cancelled(f"the wait for {where.path} was given up")
            case logic.State(mountpoint):
                return os.fsdecode(self._node.attribute(mountpoint, logic.STATE))
        return 0

    def _open(self, where: Place, flags: int) -> int:
        self._opening = request = self._node.open(where, flags)
        if self._ended.is_set():
            self._node.interrupt(request)
        try:
            return request.fd()
        except OSError as error:
            if error.errno == errno.EINTR:
                raise Cancelled(f"the wait for {where.path} was given up") from None
            raise
        finally:
            self._opening = None

    def _interrupt(self) -> None:
        self._ended.set()
        turns.look()
        opening = self._opening
        if opening is not None:
            self._node.interrupt(opening)

    def _identify(self, fd: int) -> str:
        return f"testing {fd}"

    def _watch(self, fd: int) -> None:
        self._is_watched = True
        self._node.watch(fd, self)

    def _unnotice(self, fd: int) -> None:
        self._is_watched = False
        self._node.unwatch(fd)

    def _close_file(self, fd: int) -> None:
        self._node.unwatch(fd)
        self._node.close(fd)

    def read(self) -> bytes:
        with self.using() as fd:
            return logic.stripped(self._node.read(fd))

    def write(self, value: bytes) -> None:
        data = logic.padded(value)
        with self.using() as fd:
            self._node.write(fd, data)

    def abandoned(self) -> logic.Abandoned | None:
        with self.using() as fd:
            return logic.abandonment(self._node.attribute_of(fd, logic.ABANDONED))
