"""A lease in etcd, renewed, and each renewal confirmed.

Which renewals count is `core.lease.Renewal`'s to say; the read that confirms one must also find our key
(etcd-notes 5).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Callable
from typing import Final

import grpc

from dlmfs.core.lease import Renewal
from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.answers import check
from dlmfs.store.etcd.codec import Codec
from dlmfs.store.etcd.rpc import (
    GRANT,
    KEEP_ALIVE,
    RANGE,
    REVOKE,
    TXN,
    Rpc,
    cancelling,
    look_after,
    report,
)
from dlmfs.timing import Clock, Timing

RETRY_S: Final = 0.2
CLOSE_MAX_S: Final = 1.0


class EtcdSession:
    """See `store.base.Session`. Made by `open_session`."""

    def __init__(
        self,
        rpc: Rpc,
        codec: Codec,
        clock: Clock,
        lost: Callable[[DlmfsError], None],
        renewed: Callable[[EtcdSession], None],
    ) -> None:
        """`renewed`: called each time that `renewed_at` is another."""
        self.rpc = rpc
        self.codec = codec
        self.clock = clock
        self.lost = lost
        self.renewed = renewed
        self.lease = secrets.randbits(63) | 1
        self.ttl_s = 0.0
        self.renewal: Renewal | None = None
        self._key = codec.root[:-1] + b"!/%016x" % self.lease
        self._ended = False
        self._task: asyncio.Task[None] | None = None

    @property
    def renewed_at(self) -> float | None:
        return None if self.renewal is None else self.renewal.renewed_at

    async def open(self, ttl_s: float) -> None:
        """Get the lease. Raises OutcomeUnknown if the store is out of reach, NotPermitted."""
        timeout_s = Timing(ttl_s).renew_every_s
        sent = self.clock()
        request = pb.LeaseGrantRequest(id=self.lease, ttl=math.ceil(ttl_s))
        granted = await self.rpc.call(GRANT, request, timeout_s)
        self.ttl_s = float(granted.ttl)
        put = pb.PutRequest(key=self._key, value=b"{}", lease=self.lease)
        txn = pb.TxnRequest(success=[pb.RequestOp(request_put=put)])
        before = self.rpc.generation
        term = (await self.rpc.call(TXN, txn, timeout_s)).header.raft_term
        self.renewal = Renewal(sent, term, self._unbroken(before))
        self.renewed(self)
        self._task = self.rpc.loop.create_task(self._keep())
        look_after(self._task)

    # -- renewal ------------------------------------------------------------------------------

    async def _keep(self) -> None:
        every = Timing(self.ttl_s).renew_every_s
        while not self._ended:
            sent = self.clock()
            try:
                wait = every if await self._renew(sent, every) else 0.0
            except LockLost as error:
                self._lose(error)
                return
            except DlmfsError:
                wait = RETRY_S
            except Exception as error:  # without a renewal all would be lost
                report(self.rpc.loop, "a renewal", error)
                wait = RETRY_S
            await asyncio.sleep(max(0.0, wait - (self.clock() - sent)) if wait else 0.0)

    async def _renew(self, sent: float, timeout_s: float) -> bool:
        """Renew and confirm; False if the leader or the member changed, so that it does not count.
        Raises LockLost if the lease is over, OutcomeUnknown."""
        before = self.rpc.generation
        left_s = await self._keep_alive(timeout_s)
        answer = await self.rpc.call(RANGE, pb.RangeRequest(key=self._key), timeout_s)
        if left_s <= 0 or not answer.kvs:
            raise LockLost("the lease has ended in the store")
        assert self.renewal is not None
        counts = self.renewal.confirmed(sent, answer.header.raft_term, self._unbroken(before))
        if counts:
            self.renewed(self)
        return counts

    def _unbroken(self, generation: int) -> int | None:
        """The connection, if it was this one all the while."""
        return generation if generation == self.rpc.generation else None

    async def _keep_alive(self, timeout_s: float) -> int:
        """The seconds left after a renewal; 0 if the lease is gone."""
        generation, request = self.rpc.generation, pb.LeaseKeepAliveRequest(id=self.lease)
        try:
            stream = await self.rpc.stream(KEEP_ALIVE, timeout_s)
            try:
                await stream.write(request)
                answer = await stream.read()
            finally:
                stream.cancel()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return 0
            self.rpc.failed(generation, error.details() or error.code().name)
            raise OutcomeUnknown("no answer to a renewal") from None
        except asyncio.CancelledError:
            if cancelling():
                raise
            raise OutcomeUnknown("the connection was given up") from None
        self.rpc.believe(generation, lambda: check(request, answer))
        assert isinstance(answer, pb.LeaseKeepAliveResponse)
        return answer.ttl

    # -- the end ------------------------------------------------------------------------------

    def _lose(self, error: DlmfsError) -> None:
        if not self._ended:
            self._ended = True
            self.lost(error)

    def abandon(self) -> None:
        """Renew no more; the lease runs out by itself."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()

    async def revoke(self) -> None:
        """End the session: its keys vanish in one revision. Out of reach, it runs out."""
        self.abandon()
        with contextlib.suppress(DlmfsError):
            await self.rpc.call(REVOKE, pb.LeaseRevokeRequest(id=self.lease), CLOSE_MAX_S)

    def close(self, done: Callable[[DlmfsError | None], None]) -> None:
        task = self.rpc.loop.create_task(self.revoke())
        task.add_done_callback(lambda _task: done(None))
