"""One mount with the real classes, but for the kernel, the store and the clock, which are simulated."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable

from dlmfs.engine.lockspace import Lockspace
from dlmfs.errors import DlmfsError
from dlmfs.fs.answer import Reply
from dlmfs.fs.filesystem import FileSystem
from dlmfs.fs.limits import User
from dlmfs.fs.signals import Cause
from dlmfs.fs.tree import Directory, LockFile, Tree
from dlmfs.fuse import opcodes, wire
from dlmfs.fuse.device import Device
from dlmfs.model import HolderRule
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Session
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_store import MemoryStore
from dlmfs.timing import Timing

DOMAIN, LOCK, NODE = b"dom", b"x", "a"
UID = 1000
TTL_S = 15.0
SOON_S = 0.1


class Kernel(Device):
    """Keeps what each request was answered."""

    def __init__(self) -> None:
        self.said: dict[int, bytes | int] = {}

    def answer(self, unique: int, reply: bytes | int) -> bool:
        self.said[unique] = reply
        return True

    def notify_poll(self, kh: int) -> None:
        """Nobody sleeps."""

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """No name is cached."""


class OneDomain:
    """A membership that neither joins nor fails, and leaves when the test says so."""

    def __init__(self) -> None:
        self.leaving: list[Callable[[DlmfsError | None], None]] = []

    def join(self, name: bytes, done: object) -> None:
        raise AssertionError

    def leave(self, space: Lockspace, done: Callable[[DlmfsError | None], None]) -> None:
        self.leaving.append(done)

    def state_mb(self) -> float:
        return 0.0

    def lease_state(self) -> str:
        return "HEALTHY"

    def serving(self) -> bool:
        return True


class Files(FileSystem):
    """Whoever is interrupted is so by a signal that it catches, unless a test says otherwise."""

    why = Cause.CAUGHT

    def cause(self, thread: int) -> Cause:
        return self.why


class Mount:
    """One node with one lock file; this very thread is its only user."""

    def __init__(self) -> None:
        self.loop = SimLoop()
        self.kernel = Kernel()
        self.domains = OneDomain()
        self.fs = Files(Tree(), self.domains, self.loop, Timing(TTL_S))
        self.fs.device = self.kernel
        self.space = self._join()
        domain = self.fs.tree.add(self.fs.tree.root, DOMAIN, stat.S_IFDIR | 0o755, 0, 0)
        assert isinstance(domain, Directory)
        self.fs.spaces[domain.ino] = self.space
        file = self.fs.tree.add(domain, LOCK, stat.S_IFREG | 0o644, 0, 0)
        assert isinstance(file, LockFile)
        self.file = file
        self.fs.usage.count_domain(0, 1)
        self.fs.usage.count_lock(0, 1)
        self._numbers = itertools.count(1)

    def _join(self) -> Lockspace:
        store = MemoryStore(MemoryServer(self.loop, start_revision=1000))
        self.cut = store.cut
        sessions: list[Session | DlmfsError] = []
        store.open_session(NODE, TTL_S, lambda _error: None, sessions.append)
        assert self.loop.run_until(lambda: bool(sessions), 1)
        (session,) = sessions
        assert not isinstance(session, DlmfsError)
        space = Lockspace(
            store,
            self.loop,
            self.fs,
            domain=DOMAIN,
            node=NODE,
            lease=session.lease,
            rule=HolderRule.FILE,
            timing=Timing(TTL_S),
        )
        joined: list[DlmfsError | None] = []
        space.join(joined.append)
        assert self.loop.run_until(lambda: bool(joined), 1)
        assert joined == [None]
        return space

    @property
    def user(self) -> User:
        return self.fs.usage.user(UID)

    def header(self, node: int, opcode: int) -> wire.Header:
        return wire.Header(
            length=0,
            opcode=opcode,
            unique=next(self._numbers),
            node=node,
            uid=UID,
            gid=UID,
            pid=os.getpid(),
        )

    def open(self, flags: int = os.O_RDWR) -> tuple[int, Reply]:
        """The request's number, and its answer if there is one by now."""
        header = self.header(self.file.ino, opcodes.OPEN)
        reply = self.fs.open(header, flags)
        self.loop.run_for(SOON_S)
        return header.unique, self.kernel.said.get(header.unique) if reply is None else reply

    def open_another(self) -> int:
        """An open, now, of a lock that nobody has had: the request's number. It must wait."""
        file = self.fs.tree.add(self.file.domain, b"another", stat.S_IFREG | 0o644, 0, 0)
        header = self.header(file.ino, opcodes.OPEN)
        assert self.fs.open(header, os.O_RDWR) is None
        return header.unique

    def hold(self) -> int:
        """An open that must succeed: its handle."""
        _, reply = self.open()
        assert isinstance(reply, bytes), reply
        return wire.opened_fh(reply)

    def interrupted(self) -> None:
        """An open that waits, and gets a signal."""
        unique, reply = self.open()
        assert reply is None
        self.fs.interrupt(unique)
        assert self.kernel.said[unique] == errno.EINTR

    def close(self, fh: int) -> None:
        self.fs.release(self.header(self.file.ino, opcodes.RELEASE), fh)
        self.loop.run_for(SOON_S)

    def unlink(self) -> Reply:
        return self.fs.unlink(self.header(self.file.domain.ino, opcodes.UNLINK), LOCK)

    def rmdir(self) -> tuple[int, Reply]:
        """The request's number, and its answer if there is one at once."""
        header = self.header(self.fs.tree.root.ino, opcodes.RMDIR)
        return header.unique, self.fs.rmdir(header, DOMAIN)

    def counts(self) -> tuple[int, int]:
        """Holders and waiters, as the user is charged for them."""
        return self.user.holders, self.user.waiters
