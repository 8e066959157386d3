"""A kernel that is played by the fuzzer, in place of /dev/fuse: it keeps account of every request.

It takes the part of the module `os` that the device loop uses, so that it can check each reply as
the real kernel does, and refuse one (ENOENT) as if the process had died.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Final, NamedTuple

from dlmfs.fs.signals import Cause
from dlmfs.fuse import opcodes as op
from dlmfs.fuse import wire

HEADER_SIZE: Final = 40

WAITS: Final = frozenset({op.OPEN, op.READ, op.WRITE, op.MKDIR, op.RMDIR, op.UNLINK})
"""What may be answered later."""
INTERRUPTIBLE: Final = frozenset({op.OPEN, op.READ, op.WRITE})
ENDS_S: Final = 1.6
"""A signal has ended a wait after so long, whatever it waits for."""

KNOWN: Final = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES EAGAIN EBADF EBUSY EDEADLK EDQUOT EEXIST EINTR EINVAL EISDIR ENAMETOOLONG ENODATA "
        "ENOENT ENOLCK ENOSPC ENOSYS ENOTDIR ENOTEMPTY ENOTTY EOPNOTSUPP EPERM ERANGE ESTALE "
        "ETXTBSY"
    ).split()
)
"""Every errno that the file system has a reason for. EIO is added where a lease was lost."""

ENTRY_SIZE: Final = wire.ENTRY_OUT.size + wire.ATTR.size
ATTR_SIZE: Final = wire.ATTR_OUT.size + wire.ATTR.size
EXACT: Final = {
    **dict.fromkeys((op.LOOKUP, op.MKNOD, op.MKDIR, op.SYMLINK, op.LINK), ENTRY_SIZE),
    **dict.fromkeys((op.GETATTR, op.SETATTR), ATTR_SIZE),
    **dict.fromkeys((op.OPEN, op.OPENDIR), wire.OPEN_OUT.size),
    **dict.fromkeys((op.UNLINK, op.RMDIR, op.RENAME, op.RENAME2, op.RELEASE, op.RELEASEDIR), 0),
    **dict.fromkeys((op.FSYNC, op.FSYNCDIR, op.SETXATTR, op.REMOVEXATTR, op.DESTROY), 0),
    **dict.fromkeys((op.WRITE, op.POLL), wire.U32_PADDED.size),
    op.STATFS: wire.STATFS_OUT.size,
}
"""The sizes that the kernel insists on."""


class Sent(NamedTuple):
    """A request that has to be answered."""

    opcode: int
    node: int
    body: bytes
    pid: int


def room(sent: Sent) -> int:
    """How many bytes the kernel has room for in the answer to a request without a fixed size."""
    if sent.opcode in (op.READ, op.READDIR):
        return int(struct.unpack_from("=I", sent.body, 16)[0])
    if sent.opcode in (op.GETXATTR, op.LISTXATTR):
        return int(struct.unpack_from("=I", sent.body)[0]) or wire.U32_PADDED.size
    return 1 << 20


class Kernel:
    """One mount's kernel: `queue` is what the daemon reads, `outstanding` what it owes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.clock: Callable[[], float] = lambda: 0.0
        self.dying = False
        """Every process is being killed."""
        self.queue: deque[bytes | int] = deque()  # an int is the errno of the read
        self.outstanding: dict[int, Sent] = {}
        self.last: list[bytes] = []
        self.gone: set[int] = set()
        self.next_is_gone = False
        self.over = False
        self.lossy = False
        self.wrong: list[str] = []
        self.nodes: dict[int, int] = {}  # references to each
        self.names: dict[tuple[int, bytes], int] = {}
        self.handles: dict[int, int] = {}
        self.notified: list[int] = []
        self._unique = itertools.count(2, 2)
        self._interrupted: dict[int, float] = {}
        self._fatally: set[int] = set()

    def unique(self) -> int:
        return next(self._unique)

    def send(self, data: bytes) -> None:
        """Have the daemon read a message."""
        self.queue.append(data)
        self.last = [*self.last[-7:], data]

    def _is_read(self, data: bytes) -> None:
        """Note what the daemon owes, now that it has the message."""
        if len(data) < HEADER_SIZE:
            return
        length, opcode, unique, node = struct.unpack_from("=IIQQ", data)
        body = data[HEADER_SIZE:]
        if length == len(data):
            self._give_back(opcode, unique, node, body)
            if opcode == op.INTERRUPT and len(body) >= 8:
                self._interrupt(struct.unpack_from("=Q", body)[0])
        if opcode in op.UNANSWERED or unique in self.outstanding:
            return  # the second of the same number is dropped as long as the first is pending
        (pid,) = struct.unpack_from("=I", data, 32)
        self.outstanding[unique] = Sent(opcode, node, body, pid)
        if self.next_is_gone:
            self.gone.add(unique)
            self.next_is_gone = False

    def cause(self, thread: int) -> Cause:
        """Why whatever this thread waits for is interrupted: a played /proc."""
        return Cause.FATAL if self.dying else list(Cause)[thread % len(Cause)]

    def _interrupt(self, unique: int) -> None:
        sent = self.outstanding.get(unique)
        if sent is not None and sent.opcode in INTERRUPTIBLE and unique not in self._interrupted:
            self._interrupted[unique] = self.clock()
            if self.cause(sent.pid) is Cause.FATAL:
                self._fatally.add(unique)

    def check_interrupt(self) -> None:
        """A signal that ends the process ends its wait before anything else is read; one that is caught,
        or a freezer, does soon."""
        for unique in self._fatally & self.outstanding.keys():
            self.wrong.append(f"request {unique} of one that is being killed was not answered")
        self._fatally.clear()
        for unique, since in list(self._interrupted.items()):
            sent = self.outstanding.get(unique)
            if sent is None:
                del self._interrupted[unique]
            elif self.cause(sent.pid) is not Cause.NOTHING and self.clock() > since + ENDS_S:
                if not self.dying:
                    self.wrong.append(f"opcode {sent.opcode} was interrupted and not answered")

    def _give_back(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        """Note what the daemon need not keep any more, if this is a whole request."""
        if opcode == op.RELEASE and len(body) >= 24 and unique not in self.outstanding:
            self.handles.pop(struct.unpack_from("=Q", body)[0], None)
        elif opcode == op.FORGET and len(body) >= 8:
            self._forget(node, struct.unpack_from("=Q", body)[0])
        elif opcode == op.BATCH_FORGET and len(body) >= 8:
            (count,) = struct.unpack_from("=I", body)
            if len(body) == 8 + 16 * count:
                for inode, references in struct.iter_unpack("=QQ", body[8:]):
                    self._forget(inode, references)

    def _forget(self, node: int, count: int) -> None:
        left = self.nodes.get(node, 0) - count
        if left > 0:
            self.nodes[node] = left
            return
        self.nodes.pop(node, None)
        for key in [key for key, value in self.names.items() if value == node]:
            del self.names[key]

    # -- as the module os ---------------------------------------------------------------------

    def read(self) -> bytes:
        if self.over:
            raise OSError(errno.ENODEV, "unmounted")
        self.check_interrupt()
        if not self.queue:
            raise BlockingIOError(errno.EAGAIN, "nothing to read")
        item = self.queue.popleft()
        if isinstance(item, int):
            raise OSError(item, "reading the played device")
        self._is_read(item)
        return item

    def write(self, data: bytes) -> int:
        if self.over:
            raise OSError(errno.ENODEV, "unmounted")
        length, code, unique = struct.unpack_from("=IiQ", data)
        if length != len(data):
            self.wrong.append(f"a reply of {len(data)} bytes that claims {length}")
        elif unique == 0 and code > 0:
            self.notified.append(code)
        else:
            self._reply(unique, -code, data[16:])
        return len(data)

    def _reply(self, unique: int, code: int, payload: bytes) -> None:
        sent = self.outstanding.pop(unique, None)
        if sent is None:
            self.wrong.append(f"request {unique} was answered twice, or never asked")
            return
        if unique in self.gone:
            self.gone.discard(unique)
            raise OSError(errno.ENOENT, "the process is gone")
        if code == errno.EINTR and self.cause(sent.pid) is Cause.NOTHING:
            self.wrong.append(f"opcode {sent.opcode} was answered EINTR for nothing")
        if code:
            may_fail = self.lossy or self._is_closed(sent)
            if payload or code not in KNOWN | ({errno.EIO} if may_fail else set()):
                name = errno.errorcode.get(code, str(code))
                self.wrong.append(f"opcode {sent.opcode} was answered {name} {payload!r}")
            return
        self._check_size(sent, payload)
        self._note(sent, payload)

    def _is_closed(self, sent: Sent) -> bool:
        """Whether it uses a descriptor that was released while it was under way: its lock is gone.
        A real kernel releases nothing that is in use."""
        if sent.opcode not in (op.READ, op.WRITE) or len(sent.body) < 8:
            return False
        return struct.unpack_from("=Q", sent.body)[0] not in self.handles

    def _check_size(self, sent: Sent, payload: bytes) -> None:
        exact = EXACT.get(sent.opcode)
        bad = len(payload) > room(sent) if exact is None else len(payload) != exact
        if bad:
            self.wrong.append(f"opcode {sent.opcode} was answered with {len(payload)} bytes")

    def _note(self, sent: Sent, payload: bytes) -> None:
        """What the kernel knows from now on."""
        if len(payload) == ENTRY_SIZE and EXACT.get(sent.opcode) == ENTRY_SIZE:
            (node,) = struct.unpack_from("=Q", payload)
            self.nodes[node] = self.nodes.get(node, 0) + 1
            skip = {op.LOOKUP: 0, op.MKDIR: 8}.get(sent.opcode, 16)
            self.names[sent.node, sent.body[skip:].rstrip(b"\0")] = node
        elif sent.opcode == op.OPEN:
            fh = wire.opened_fh(payload)
            if fh in self.handles:
                self.wrong.append(f"the handle {fh} was given out twice")
            self.handles[fh] = sent.node


class PlayedOs:
    """The functions of `os` that the device loop calls, on descriptors that are no files."""

    def __init__(self) -> None:
        self.kernels: dict[int, Kernel] = {}
        self._fds = itertools.count(1_000_000)

    def open(self) -> Kernel:
        fd = next(self._fds)
        kernel = self.kernels[fd] = Kernel(fd)
        return kernel

    def read(self, fd: int, _size: int) -> bytes:
        return self.kernels[fd].read()

    def write(self, fd: int, data: bytes) -> int:
        return self.kernels[fd].write(data)

    def dup(self, fd: int) -> int:
        new = next(self._fds)
        self.kernels[new] = self.kernels[fd]
        return new

    def close(self, fd: int) -> None:
        del self.kernels[fd]


class PlayedProc:
    """What `dlmfs.proc` reads, played: processes that are gone, odd, or named in any bytes at all."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(f"proc {seed}")

    def read(self, *parts: object, most: int = -1) -> bytes | None:
        """A file: as it should be, with something in the middle of it, or anything."""
        rng = self._rng
        if rng.random() < 0.1:
            return None
        text = PROC_FILES.get(str(parts[-1]), PROC_FILES["fdinfo"])
        if rng.random() < 0.5:
            at = rng.randrange(len(text))
            text = text[:at] + self._odd() + text[at:]
        return text if most < 0 else text[:most]

    def numbers(self, *_parts: object, most: int | None = None) -> list[int]:
        return [self._rng.randrange(5000) for _ in range(min(self._rng.randrange(6), most or 6))]

    def link(self, *_parts: object) -> bytes | None:
        return self._rng.choice((None, b"/mnt/dom/x", b"/dom/y (deleted)", self._odd()))

    def user(self, _thread: int) -> int | None:
        return self._rng.choice((None, 0, 1000))

    def _odd(self) -> bytes:
        rng = self._rng
        return rng.choice((b"\374", b"\r", b"\xc3", b"\0", b"-1", b"9" * 5000, rng.randbytes(40)))


PROC_FILES: Final = {
    "status": b"Name:\tx\nTgid:\t40\nPPid:\t1\nSigPnd:\t0\nShdPnd:\t0\nState:\tS (sleeping)\n",
    "stat": b"40 (x) S 1 " + b"0 " * 17 + b"77 0",
    "comm": b"x\n",
    "mountinfo": b"31 1 0:99 / /mnt rw - fuse.dlmfs local rw\n",
    "auxv": (33).to_bytes(8, "little") + bytes(8),
    "fdinfo": b"pos:\t0\nflags:\t0100000\nmnt_id:\t31\nino:\t3\n",
}
