"""The device loop: requests of the kernel in, one reply to each out, and notifications.

Rules of this file
------------------
* Whatever arrives and whatever a handler raises, the loop goes on: EINVAL for a malformed
  request, EIO and a traceback in the log for a handler's failure.
* Every request is answered exactly once. One that its handler left pending is in `_pending` until
  `answer`; the kernel sends INTERRUPT once for it (fuse-notes, Critical 2). That is not answered: EAGAIN
  would bring it back at once, with no more to tell (`fs.interrupts`).
* One reader, in order: a RELEASE is seen before any request that was sent after it (Critical 3).
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable
from itertools import dropwhile, takewhile
from typing import Any, Final, Protocol

from dlmfs.errors import Bug, DlmfsError
from dlmfs.fuse import opcodes as op
from dlmfs.fuse import wire
from dlmfs.fuse.requests import IN_HEADER_SIZE, PARSERS, Header, Init, Parser, SetAttr, WireError
from dlmfs.timing import Scheduler

log = logging.getLogger(__name__)

Reply = bytes | int | None
"""What a handler returns: a payload, a positive errno, or None = `Device.answer` will follow."""

DRAIN: Final = 16
"""Requests served for each wake-up. With one, an open and close costs 20.8 us instead of 15.4
(fuse-notes); without a limit a busy client would keep the loop's timers waiting."""

MAX_WRITE: Final = 4096
READ_SIZE: Final = 8192 + IN_HEADER_SIZE + MAX_WRITE
"""The kernel refuses reads of less than 8 KiB, or less than the largest write with its header."""

WANTED: Final = (
    op.PARALLEL_DIROPS | op.HANDLE_KILLPRIV | op.ABORT_ERROR | op.INIT_EXT | op.DONT_MASK
)
"""Features asked for. HANDLE_KILLPRIV: without it each write is preceded by a GETXATTR of
security.capability (fuse-notes 16). Left off on purpose: ATOMIC_O_TRUNC (a truncation must not
travel in OPEN), WRITEBACK_CACHE, READDIRPLUS, POSIX_LOCKS and FLOCK_LOCKS (those locks stay in
the kernel), DONT_MASK (the kernel applies the umask)."""

REFUSED: Final[dict[int, int]] = {
    # CREATE would hold the directory's lock while it waits for ours (fuse-notes, Critical 1).
    op.CREATE: errno.ENOSYS,
    op.FLUSH: errno.ENOSYS,
    op.ACCESS: errno.ENOSYS,
    op.READLINK: errno.EINVAL,
    op.IOCTL: errno.ENOTTY,
    op.FALLOCATE: errno.EOPNOTSUPP,
    op.TMPFILE: errno.EOPNOTSUPP,
}
"""Answered here. Everything else without a handler is ENOSYS, which stops the kernel asking."""


class Operations(Protocol):
    """What a file system does. `h.node` is the inode that the request is about: the directory
    for a name. Names are not empty and have no zero byte, and an entry's no slash; modes have the
    umask applied.

    An OSError or DlmfsError raised by a handler is answered with its errno.
    """

    def lookup(self, h: Header, name: bytes, /) -> Reply: ...
    def forget(self, node: int, count: int, /) -> None: ...
    def getattr(self, h: Header, fh: int | None, /) -> Reply: ...
    def setattr(self, h: Header, change: SetAttr, /) -> Reply: ...
    def mknod(self, h: Header, name: bytes, mode: int, umask: int, rdev: int, /) -> Reply: ...
    def mkdir(self, h: Header, name: bytes, mode: int, umask: int, /) -> Reply: ...
    def unlink(self, h: Header, name: bytes, /) -> Reply: ...
    def rmdir(self, h: Header, name: bytes, /) -> Reply: ...
    def symlink(self, h: Header, name: bytes, target: bytes, /) -> Reply: ...
    def link(self, h: Header, old_node: int, name: bytes, /) -> Reply: ...
    def rename(
        self, h: Header, old_name: bytes, new_parent: int, new_name: bytes, flags: int, /
    ) -> Reply: ...
    def open(self, h: Header, flags: int, /) -> Reply: ...
    def read(self, h: Header, fh: int, offset: int, size: int, /) -> Reply: ...
    def write(self, h: Header, fh: int, offset: int, data: bytes, /) -> Reply: ...
    def release(self, h: Header, fh: int, /) -> Reply: ...
    def statfs(self, h: Header, /) -> Reply: ...
    def fsync(self, h: Header, fh: int, datasync: int, /) -> Reply: ...
    def opendir(self, h: Header, flags: int, /) -> Reply: ...
    def readdir(self, h: Header, fh: int, offset: int, size: int, /) -> Reply: ...
    def releasedir(self, h: Header, fh: int, /) -> Reply: ...
    def fsyncdir(self, h: Header, fh: int, datasync: int, /) -> Reply: ...
    def getxattr(self, h: Header, name: bytes, size: int, /) -> Reply: ...
    def listxattr(self, h: Header, size: int, /) -> Reply: ...
    def setxattr(self, h: Header, name: bytes, value: bytes, flags: int, /) -> Reply: ...
    def removexattr(self, h: Header, name: bytes, /) -> Reply: ...
    def poll(self, h: Header, fh: int, kh: int, flags: int, events: int, /) -> Reply: ...

    def interrupt(self, unique: int, /) -> None:
        """A signal, a stop, a debugger or a freezer for the thread whose request `unique` is pending.
        Told once, whatever comes later: from now on the thread heeds nothing but the answer."""

    def undelivered(self, h: Header, payload: bytes, /) -> None:
        """The reply that a handler returned reached nobody: undo what it granted."""

    def destroy(self) -> None:
        """The kernel lets go of the mount."""


class Loop(Scheduler, Protocol):
    """What the device needs of an event loop."""

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None: ...

    def remove_reader(self, fd: int) -> bool: ...


class Device:
    """One mounted /dev/fuse descriptor. It owns the descriptor: `close` closes it.

    `on_ready` is called once, when the mount answers; `on_bug` with the name of a request whose
    handler raised what is no decision of its own, and what that was; `on_end` with the reason, in
    words, when the kernel has ended it (unmounted, aborted), not after `close`. Set them before `start`.
    """

    def __init__(self, fd: int, operations: Operations, loop: Loop) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[str], None] = lambda _reason: None
        self.on_bug: Callable[[str, Exception], None] = _log_bug
        self._fd = fd
        self._operations = operations
        self._loop = loop
        self._ended = False
        self._pending: dict[int, bool] = {}  # unique: whether its INTERRUPT has come
        self._invalidator: _Invalidator | None = None
        # Before INIT nothing else is served.
        self._table: dict[int, tuple[Parser, Callable[..., Reply]]] = {}
        self._ready = False

    def start(self) -> None:
        """Begin to serve."""
        self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stop serving. The kernel ends what is still pending (ECONNABORTED). May be repeated."""
        if self._fd < 0:
            return
        self._stop()
        os.close(self._fd)
        self._fd = -1

    @property
    def pending(self) -> int:
        """How many requests wait for `answer`."""
        return len(self._pending)

    # -- requests -----------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(DRAIN):
            try:
                message = os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # the process died while its request was being copied
                self._end(_REASONS.get(error.errno or 0, f"reading the FUSE device: {error}"))
                return
            if not message:
                self._end(_REASONS[errno.ENODEV])
                return
            self._serve(message)
            if self._ended:
                return

    def _serve(self, message: bytes) -> None:
        """Answer one request, or note that it is pending."""
        try:
            header = wire.parse_header(message)
        except WireError as error:
            self._garbled(message, error)
            return
        entry = self._table.get(header.opcode)
        if entry is None:
            self._serve_rare(header, message)
            return
        unique = header.unique
        if unique in self._pending:
            log.error("request %d came again while it is pending; dropped", unique)
            return
        parser, handler = entry
        try:
            arguments = parser(message, IN_HEADER_SIZE)
        except (WireError, struct.error) as error:
            log.warning("malformed request with opcode %d: %s", header.opcode, error)
            self._send(unique, errno.EINVAL)
            return
        result: Reply
        try:
            result = handler(header, *arguments)
        except Exception as error:
            result = _errno_of(header.opcode, error, self.on_bug)
        if result is None:
            self._pending[unique] = False
        elif not self._send(unique, result) and isinstance(result, bytes):
            self._undelivered(header, result)

    def _serve_rare(self, header: Header, message: bytes) -> None:
        """INIT, what has no reply, and what has no handler."""
        opcode = header.opcode
        arguments: tuple[Any, ...] = ()
        if opcode in PARSERS:
            try:
                arguments = wire.parse_body(opcode, message)
            except WireError as error:
                log.warning("malformed request: %s", error)
                if opcode not in op.UNANSWERED and header.unique not in self._pending:
                    self._send(header.unique, errno.EINVAL)
                return
        if opcode == op.INIT and not self._ready:
            self._init(header, *arguments)
        elif opcode in op.UNANSWERED:
            try:
                self._serve_unanswered(header, arguments)
            except Exception as error:
                _errno_of(opcode, error, self.on_bug)
        elif header.unique not in self._pending:
            self._send(header.unique, REFUSED.get(opcode, errno.ENOSYS))

    def _serve_unanswered(self, header: Header, arguments: tuple[Any, ...]) -> None:
        if not self._ready:
            return
        if header.opcode == op.FORGET:
            self._operations.forget(header.node, arguments[0])
        elif header.opcode == op.BATCH_FORGET:
            for node, count in arguments[0]:
                self._operations.forget(node, count)
        elif header.opcode == op.INTERRUPT:
            # With one reader an INTERRUPT never precedes its request, so one that is not pending
            # has been answered. Nor does the kernel send a second; should it, once is enough.
            unique = arguments[0]
            if self._pending.get(unique) is False:
                self._pending[unique] = True
                self._operations.interrupt(unique)

    def _garbled(self, message: bytes, error: WireError) -> None:
        """Not a whole request. Answer it if one can tell what it was."""
        log.warning("malformed request: %s", error)
        if len(message) < IN_HEADER_SIZE:
            return
        _length, opcode, unique, *_rest = struct.unpack_from("=IIQ", message)
        if opcode not in op.UNANSWERED and unique not in self._pending:
            self._send(unique, errno.EINVAL)

    def _undelivered(self, header: Header, payload: bytes) -> None:
        try:
            self._operations.undelivered(header, payload)
        except Exception as error:
            _errno_of(header.opcode, error, self.on_bug)

    # -- replies ------------------------------------------------------------------------------

    def answer(self, unique: int, reply: bytes | int) -> bool:
        """Answer a pending request: a payload or a positive errno.

        False if the answer reached nobody, since the request or the whole mount is gone: a caller
        that granted something must take it back. Raises Bug if no such request is pending (a
        handler's own request is pending once the handler has returned None).
        """
        if self._ended:
            return False
        if self._pending.pop(unique, None) is None:
            raise Bug(f"answered FUSE request {unique}, which is not pending")
        return self._send(unique, reply)

    def _send(self, unique: int, reply: bytes | int) -> bool:
        if isinstance(reply, int):
            if not 0 < reply <= op.ERRNO_MAX:
                log.error("a handler answered with errno %d; EIO sent instead", reply)
                reply = errno.EIO
            data = wire.error(unique, reply)
        else:
            data = wire.reply(unique, reply)
        try:
            os.write(self._fd, data)
        except OSError as error:
            if error.errno not in _GONE:
                self._send_refused(unique, error)
            return False
        return True

    def _send_refused(self, unique: int, error: OSError) -> None:
        """The kernel does not like the form of a reply: end the request, lest it wait forever."""
        log.error("the kernel refused the reply to request %d: %s", unique, error)
        try:
            os.write(self._fd, wire.error(unique, errno.EIO))
        except OSError as second:
            log.debug("nor an error for request %d: %s", unique, second)

    # -- notifications ------------------------------------------------------------------------

    def notify_poll(self, kh: int) -> None:
        """Wake the processes that poll(2) the open file with this kernel handle. Never fails."""
        self._notify(wire.notify_poll(kh))

    def invalidate_inode(self, node: int) -> None:
        """Make the kernel ask for the attributes again. Never fails."""
        self._notify(wire.notify_inval_inode(node, -1, 0))

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """Make the kernel forget a name, soon. Never fails, never blocks the caller."""
        if self._ended:
            return
        if self._invalidator is None:
            self._invalidator = _Invalidator(self._fd)
        self._invalidator.send(wire.notify_inval_entry(parent, name))

    def _notify(self, data: bytes) -> None:
        if not self._ended:
            _write_notification(self._fd, data)

    # -- begin and end ------------------------------------------------------------------------

    def _init(self, header: Header, init: Init) -> None:
        if init.major > op.MAJOR:
            self._send(header.unique, wire.init_out_major())  # and INIT will come again
            return
        if init.major < op.MAJOR or init.minor < op.MINOR_MIN:
            self._send(header.unique, errno.EPROTO)
            version = f"{init.major}.{init.minor}"
            self._end(f"the kernel's FUSE protocol {version} is too old: it must be 7.23 or later")
            return
        minor = min(init.minor, op.MINOR)
        flags = init.flags & WANTED
        payload = wire.init_out(minor, init.max_readahead, flags, MAX_WRITE)
        if not self._send(header.unique, payload):
            return  # unmounted already; the next read says so
        self._ready = True
        self._table = _table(self._operations)
        self.on_ready()

    def _stop(self) -> None:
        if not self._ended:
            self._ended = True
            self._pending.clear()
            self._loop.remove_reader(self._fd)
            if self._invalidator is not None:
                self._invalidator.close()

    def _end(self, reason: str) -> None:
        self._stop()
        self.on_end(reason)


_REQUESTS: Final = ("LOOKUP", "UNANSWERED")
_NAMES: Final = {
    number: name
    for name, number in takewhile(
        lambda item: item[0] != _REQUESTS[1],
        dropwhile(lambda item: item[0] != _REQUESTS[0], vars(op).items()),
    )
}
"""For people. In `opcodes` the requests stand between these two."""

_GONE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED})
"""Errors of a write that mean: nobody waits for this any more."""

_REASONS: Final = {
    errno.ENODEV: "unmounted",
    errno.ECONNABORTED: "the FUSE connection was aborted",
    errno.ENOTCONN: "the FUSE connection was aborted",
}


def _table(operations: Operations) -> dict[int, tuple[Parser, Callable[..., Reply]]]:
    """The handler of each request that has a reply."""

    def destroy(_header: Header) -> Reply:
        operations.destroy()
        return b""

    handlers: dict[int, Callable[..., Reply]] = {
        op.LOOKUP: operations.lookup,
        op.GETATTR: operations.getattr,
        op.SETATTR: operations.setattr,
        op.MKNOD: operations.mknod,
        op.MKDIR: operations.mkdir,
        op.UNLINK: operations.unlink,
        op.RMDIR: operations.rmdir,
        op.SYMLINK: operations.symlink,
        op.LINK: operations.link,
        op.RENAME: operations.rename,
        op.RENAME2: operations.rename,
        op.OPEN: operations.open,
        op.READ: operations.read,
        op.WRITE: operations.write,
        op.RELEASE: operations.release,
        op.STATFS: operations.statfs,
        op.FSYNC: operations.fsync,
        op.OPENDIR: operations.opendir,
        op.READDIR: operations.readdir,
        op.RELEASEDIR: operations.releasedir,
        op.FSYNCDIR: operations.fsyncdir,
        op.GETXATTR: operations.getxattr,
        op.LISTXATTR: operations.listxattr,
        op.SETXATTR: operations.setxattr,
        op.REMOVEXATTR: operations.removexattr,
        op.POLL: operations.poll,
        op.DESTROY: destroy,
    }
    return {opcode: (PARSERS[opcode], handler) for opcode, handler in handlers.items()}


def _log_bug(request: str, error: Exception) -> None:
    log.error("the handler of %s failed", request, exc_info=error)


def _errno_of(opcode: int, error: Exception, on_bug: Callable[[str, Exception], None]) -> int:
    """What to answer for an exception; reports those that are no decision of the handler."""
    if isinstance(error, DlmfsError) and not isinstance(error, Bug):
        return error.errno
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    on_bug(f"request {_NAMES.get(opcode, opcode)}", error)
    return errno.EIO


def _write_notification(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError as error:
        # ENOENT: the kernel does not have what we speak of, so there is nothing to forget.
        if error.errno not in _GONE:
            log.debug("a notification was refused: %s", error)


class _Invalidator:
    """Sends the notifications that take a directory's lock, from a thread of its own.

    The kernel holds that lock while a process's LOOKUP, MKNOD, UNLINK and so on wait for us, be
    they pending here or not even read yet. A write from the loop would sleep on the lock, the
    request that holds it would never be answered, and both would stay so for ever.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # A daemon thread: the process must be able to exit while the thread sleeps in a write.
        threading.Thread(target=self._run, name="fuse-invalidate", daemon=True).start()

    def send(self, data: bytes) -> None:
        self._queue.put(data)

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            _write_notification(self._fd, data)
        os.close(self._fd)
