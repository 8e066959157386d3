"""A TCP proxy before one server, for what the kernel cannot do to a connection here: delay, silence
in one direction, an end without warning.

What is said during a silence is not lost but comes later, as TCP does it after a cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from typing import Any

from tests.etcd.server import CLIENT_PORT, PATIENCE_S, loopback

CHUNK = 65536


class Proxy:
    """Runs in a thread of its own, from its making to `close`."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self.host = loopback()
        self.endpoint = f"{self.host}:{CLIENT_PORT}"
        self.connections = 0
        """How many there have been."""
        self.passed = 0
        """Bytes from the server that were let through."""
        self._delay_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._open: dict[str, asyncio.Event] = {}
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._do(self._begin())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _begin(self) -> None:
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        for gate in self._open.values():
            gate.set()
        await self._listen()

    async def _listen(self) -> None:
        # One Python may still be closing what another opened: the address is ours alone.
        sock = socket.create_server((self.host, CLIENT_PORT), reuse_port=False)
        self._server = await asyncio.start_server(self._serve, sock=sock)

    # -- the harm -------------------------------------------------------------------------------

    def silence(self, *, up: bool = True, down: bool = True) -> None:
        """Let nothing through to the server (`up`), from it (`down`); connections stay."""

        async def change() -> None:
            if up:
                self._open["up"].clear()
            if down:
                self._open["down"].clear()

        self._do(change())

    def delay(self, seconds: float) -> None:
        """Each piece arrives so much later, in either direction."""
        self._delay_s = seconds

    def cut(self) -> None:
        """End every connection and refuse new ones."""

        async def change() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            await self._drop()

        self._do(change())

    async def _drop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def heal(self) -> None:
        async def change() -> None:
            for gate in self._open.values():
                gate.set()
            if self._server is None:
                await self._listen()

        self._delay_s = 0.0
        self._do(change())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    # -- the way through --------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._join(reader, writer)
        writer.transport.abort()
        self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open["up"].wait()  # a connection is two-way silence until its first packet
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        ways = (
            asyncio.create_task(self._way("up", reader, far_writer)),
            asyncio.create_task(self._way("down", far_reader, writer)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.transport.abort()

    async def _way(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Each piece with the time at which it is due, so that a delay does not thin the stream."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.create_task(self._send(name, pieces, writer))
        try:
            while data := await reader.read(CHUNK):
                pieces.put_nowait((self._loop.time() + self._delay_s, data))
            pieces.put_nowait((self._loop.time() + self._delay_s, b""))
            await sending
        finally:
            sending.cancel()

    async def _send(
        self, name: str, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(due - self._loop.time())
            await self._open[name].wait()
            if not data:
                return
            if name == "down":
                self.passed += len(data)
            writer.write(data)
            await writer.drain()
