"""Bells between the daemons of one host.

A bell is a byte that carries no data: "look at the log". The socket being full is harmless, since
an unread bell is then there already. End-of-file says that a daemon *may* have died; the proof is in
`lives`. Whatever keeps a bell from being heard costs its hearer a second, since all look by themselves
once a second.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

from dlmfs.store.lives import Lives

PAUSE_S: Final = 0.2


class ReaderLoop(Protocol):
    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None: ...

    def remove_reader(self, fd: int) -> bool: ...

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any: ...


class Bells:
    """The sockets of one session. All three callbacks come from the event loop."""

    def __init__(
        self,
        loop: ReaderLoop,
        lives: Lives,
        *,
        rung: Callable[[], None],
        joined: Callable[[], None],
        hung_up: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._rung = rung
        self._joined = joined
        self._hung_up = hung_up
        self._lives = lives
        self._listener: socket.socket | None = None
        self._incoming: set[socket.socket] = set()
        self._peers: dict[int, socket.socket] = {}

    def listen(self, lease: int) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        self._listener = listener
        os.fchmod(listener.fileno(), 0o600)  # before it has a name: that can lead elsewhere
        listener.bind(self._lives.address(lease))
        listener.listen(128)
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
            peer.connect(self._lives.address(lease))
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
        try:
            self._peers[lease].send(b"!", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass  # it has one to read
        except OSError:
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

    def close(self) -> None:
        """Close everything; the socket's name stays."""
        for peer in list(self._peers):
            self.forget(peer)
        for connection in [*self._incoming, self._listener]:
            if connection is not None:
                self._loop.remove_reader(connection.fileno())
                connection.close()
        self._incoming.clear()
        self._listener = None
