"""Bells between the daemons of one host, and the proof of their deaths.

A bell is a byte that carries no data: "look at the log". The socket being full is harmless, since
an unread bell is then there already. End-of-file says that a daemon *may* have died; the proof is
the POSIX lock that a live daemon holds on its session's file. (Not flock and not an OFD lock:
those would be inherited by children.) A POSIX lock goes with the first close of *any* descriptor
of the file in its process, so a daemon never opens its own lock file twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

FLOCK: Final = struct.Struct("@hhqqi4x")
PAUSE_S: Final = 0.2
_OWN: set[Path] = set()
"""Lock files held by this very process: its own locks never conflict with its questions."""


class ReaderLoop(Protocol):
    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None: ...

    def remove_reader(self, fd: int) -> bool: ...

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any: ...


def holder(fd: int, start: int = 0) -> int:
    """The pid that holds a POSIX write lock on one byte of the file; 0: nobody; -1: a process in
    another pid namespace, of which the kernel tells no number."""
    query = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    return 0 if kind == fcntl.F_UNLCK else int(pid) or -1


class Life:
    """The lock file of one session, held as long as this process lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        _OWN.add(path)

    def end(self) -> None:
        _OWN.discard(self.path)
        with contextlib.suppress(OSError):  # on a disk gone read-only the others sweep it up
            self.path.unlink()
        os.close(self._fd)


def alive(path: Path, pid: int) -> bool:
    """Whether the session with this lock file lives; `pid`: its process, from its row.

    In doubt it does: to bury a live daemon would give its locks away.
    """
    if path in _OWN:
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        # Somebody tidied up, or the daemon fenced itself: only a dead process is surely over.
        return pid != os.getpid() and os.path.exists(f"/proc/{pid}")
    except OSError:
        return True  # out of descriptors: look again later
    try:
        return holder(fd) != 0
    finally:
        os.close(fd)


class Bells:
    """The sockets of one session. All three callbacks come from the event loop."""

    def __init__(
        self,
        loop: ReaderLoop,
        folder: Path,
        *,
        rung: Callable[[], None],
        joined: Callable[[], None],
        hung_up: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._rung = rung
        self._joined = joined
        self._hung_up = hung_up
        # Named through a descriptor: the path may be longer than the 108 bytes of sun_path.
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listener: socket.socket | None = None
        self._incoming: set[socket.socket] = set()
        self._peers: dict[int, socket.socket] = {}

    def _address(self, lease: int) -> str:
        return f"/proc/self/fd/{self._folder}/{lease:x}.sock"

    def listen(self, lease: int) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        listener.bind(self._address(lease))
        # For the folder's owner, if that is not us: root may share a user's state.
        os.chmod(self._address(lease), 0o666)  # noqa: S103 - the folder is 0700
        listener.listen(128)
        self._listener = listener
        self._loop.add_reader(listener.fileno(), self._accept)

    def connect(self, lease: int) -> bool:
        """Connect to a peer's bell, once; False if nobody listens there."""
        if lease in self._peers:
            return True
        try:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return False  # out of descriptors: the sweep tries again
        peer.setblocking(False)
        try:
            peer.connect(self._address(lease))
        except OSError:
            peer.close()
            return False
        self._peers[lease] = peer
        self._loop.add_reader(peer.fileno(), self._peer_gone, lease)
        return True

    def ring(self, lease: int) -> None:
        peer = self._peers.get(lease)
        if peer is None and not self.connect(lease):
            self._hung_up()
            return
        with contextlib.suppress(BlockingIOError):
            try:
                self._peers[lease].send(b"!", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError):
                self._peer_gone(lease)

    def forget(self, lease: int) -> None:
        """Drop a peer's sockets: its session has ended."""
        peer = self._peers.pop(lease, None)
        if peer is not None:
            self._loop.remove_reader(peer.fileno())
            peer.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors: not ready again until some are free
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(PAUSE_S, self._accept_again)
            return
        connection.setblocking(False)
        self._incoming.add(connection)
        self._loop.add_reader(connection.fileno(), self._hear, connection)
        self._joined()

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _hear(self, connection: socket.socket) -> None:
        heard = False
        try:
            while connection.recv(16):
                heard = True
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
        else:
            self._drop(connection)
        if heard:
            self._rung()

    def _drop(self, connection: socket.socket) -> None:
        self._incoming.discard(connection)
        self._loop.remove_reader(connection.fileno())
        connection.close()
        self._hung_up()

    def _peer_gone(self, lease: int) -> None:
        self.forget(lease)
        self._hung_up()

    def close(self, lease: int | None) -> None:
        """Close everything; remove our socket's name if the session ends with it."""
        for peer in list(self._peers):
            self.forget(peer)
        for connection in [*self._incoming, self._listener]:
            if connection is not None:
                self._loop.remove_reader(connection.fileno())
                connection.close()
        self._incoming.clear()
        self._listener = None
        if lease is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._address(lease))
        os.close(self._folder)
