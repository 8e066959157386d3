"""A watch that survives its connection: a restarted member, a silent link, a lost leader.

It resumes behind the last event that it delivered, never at a revision that a header names:
those run ahead of the events (etcd-notes 1).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc

from dlmfs.errors import DlmfsError
from dlmfs.store.base import WatchBatch, WatchGap
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.answers import Nonsense, check_events, check_jump
from dlmfs.store.etcd.codec import Codec
from dlmfs.store.etcd.rpc import MESSAGE_MAX, WATCH, Rpc, Stream, cancelling, look_after, report

SILENCE_S: Final = 2.0
"""After this long without a word the server is asked for one; after as long again the stream is
given up."""
RETRY_S: Final = 0.1
REFUSED_S: Final = 0.5
"""A new token costs the server some work."""


class EtcdWatch:
    """See the store contract; `sink` is called on the event loop."""

    def __init__(
        self,
        rpc: Rpc,
        codec: Codec,
        prefixes: Sequence[bytes],
        from_revision: int,
        *,
        sink: Callable[[WatchBatch | WatchGap], None],
        trusted: Callable[[], Awaitable[None]],
    ) -> None:
        """`trusted`: waits until what the present connection says may be believed."""
        self.rpc = rpc
        self.trusted = trusted
        self.codec = codec
        self.prefixes = tuple(prefixes)
        self.next = from_revision
        self.sink = sink
        self.cancelled = False
        self.told = 0
        """The store's revision in the last word of the server; all events up to it are delivered."""
        self._heard = True
        self._stream: Stream | None = None
        self._task = rpc.loop.create_task(self._run())
        look_after(self._task)

    def cancel(self) -> None:
        self.cancelled = True
        self._task.cancel()

    async def ask(self) -> None:
        """Ask the server for a word: how far it has told."""
        if self._stream is not None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._stream.write(
                    pb.WatchRequest(progress_request=pb.WatchProgressRequest())
                )

    async def _run(self) -> None:
        while not self.cancelled:
            await self.trusted()
            generation = self.rpc.generation
            try:
                stream = await self.rpc.stream(WATCH)
                try:
                    await self._follow(stream, generation)
                finally:
                    stream.cancel()
                why = "the watch was ended by the server"
            except (grpc.aio.AioRpcError, DlmfsError) as error:
                why = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
            except Nonsense as error:
                why = str(error)
            except asyncio.CancelledError:
                if cancelling():
                    raise
                why = "the connection was given up"
            except Exception as error:  # of whoever is told: it goes on behind what it has told
                why = report(self.rpc.loop, "a watch", error)
            if not self.cancelled:
                self.rpc.failed(generation, why)
                await asyncio.sleep(RETRY_S)

    async def _follow(self, stream: Stream, generation: int) -> None:
        """Deliver until the stream is of no use any more. `generation`: of the connection that was
        trusted; by now there may be another."""
        request = self.codec.watch(self.prefixes, self.next)
        await stream.write(pb.WatchRequest(create_request=request))
        self._stream = stream
        listening = self.rpc.loop.create_task(self._listen(stream))
        pending: list[pb.Event] = []
        size = 0
        try:
            while generation == self.rpc.generation:
                response = await stream.read()
                if generation != self.rpc.generation:
                    return  # another store may answer by now: this is delivered when that is known
                self._heard = True
                if isinstance(response, bytes):
                    raise Nonsense("what it sent is no message")
                if not isinstance(response, pb.WatchResponse):
                    return  # the end of the stream
                check_events(request, response)
                if response.compact_revision:
                    self.cancelled = True
                    self.sink(WatchGap(response.compact_revision))
                    return
                if response.canceled:
                    await self._refused(response.cancel_reason)
                    return
                pending.extend(response.events)
                size += response.ByteSize()
                if size > MESSAGE_MAX:
                    raise Nonsense("a commit that it tells of has no end")
                if not response.fragment:
                    if pending:
                        check_jump(self.next - 1, pending[-1].kv.mod_revision)
                    self._deliver(pending)
                    if (
                        not response.created
                    ):  # which tells only of what is there, not of what was told
                        self.told = max(self.told, response.header.revision)
                    pending, size = [], 0
        finally:
            listening.cancel()

    async def _refused(self, reason: str) -> None:
        """The server ended the watch, perhaps for its user: older ones do not tell a token that is not
        known any more from a right that is not there."""
        if "permission denied" in reason or "auth" in reason or "user name is empty" in reason:
            self.rpc.login.forget()
            await asyncio.sleep(REFUSED_S)

    async def _listen(self, stream: Stream) -> None:
        """Ask for a word after a silence, and give the stream up after another: a link may be dead
        without telling (etcd-notes, "its watch dies silently")."""
        asked = self._heard = False
        while True:
            await asyncio.sleep(SILENCE_S)
            if asked and not self._heard:
                stream.cancel()
                return
            asked = not self._heard
            self._heard = False  # now: what is asked for may be here before `ask` returns
            if asked:
                await self.ask()

    def _deliver(self, events: Sequence[pb.Event]) -> None:
        for batch in self.codec.batches(events, self.prefixes):
            if self.cancelled:
                return
            if batch.revision >= self.next:
                self.next = batch.revision + 1
                self.sink(batch)
        if events:
            self.next = max(self.next, events[-1].kv.mod_revision + 1)
