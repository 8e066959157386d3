"""A service manager's end of what a daemon tells it."""

from __future__ import annotations

import socket
from pathlib import Path

PATIENCE_S = 60.0


class Heard:
    """The manager's end of the socket."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(PATIENCE_S)

    def next(self) -> list[str]:
        """The words of the next message, which is awaited."""
        return self._socket.recv(4096).decode().split("\n")

    def all(self) -> list[str]:
        """All words until now."""
        words: list[str] = []
        self._socket.setblocking(False)
        try:
            while True:
                words += self.next()
        except BlockingIOError:
            return words
        finally:
            self._socket.settimeout(PATIENCE_S)

    def close(self) -> None:
        self._socket.close()
