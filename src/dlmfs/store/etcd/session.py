"""A lease in etcd, renewed, and each renewal confirmed.

Rules of this file
------------------
* Which renewals count is `core.lease.Renewal`'s to say; the reads that confirm one must also find our
  key as we put it (etcd-notes 5), and nothing that the witness finds amiss (`store.base`).
* When a connection is given up trust is lost: the next one may lead to a store that was restored. It is
  believed once the witness has looked through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Final

import grpc

from dlmfs.core.lease import Renewal
from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown, StoreRestored
from dlmfs.store.base import TIMELINE, Get, KeyValue, Look, Range, Txn, TxnResult, Witness
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
LOOK_S: Final = 2.0
"""How long a look may take while nothing is served for want of it."""
PIECE: Final = 100
"""Keys that are read at once: etcd's default bound is 128."""
CLOSE_MAX_S: Final = 1.0


class EtcdSession:
    """See `store.base.Session`. Made by `open_session`."""

    def __init__(
        self,
        rpc: Rpc,
        codec: Codec,
        clock: Clock,
        lost: Callable[[DlmfsError], None],
        *,
        renewed: Callable[[EtcdSession], None],
        witness: Witness | None = None,
    ) -> None:
        """`renewed`: called each time that `renewed_at` is another."""
        self.rpc = rpc
        self.codec = codec
        self.clock = clock
        self.lost = lost
        self.renewed = renewed
        self.lease = secrets.randbits(63) | 1
        self.ttl_s = 0.0
        self.born = 0
        self.witness = witness
        self.renewal: Renewal | None = None
        self._key = codec.root[:-1] + b"!/%016x" % self.lease
        self._ended = False
        self._trusted = asyncio.Event()
        self._trusted.set()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def seen(self) -> int:
        return self.rpc.seen

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
        header = (await self.rpc.call(TXN, txn, timeout_s)).header
        self.born = header.revision
        self.renewal = Renewal(sent, header.raft_term, self._unbroken(before))
        self.renewed(self)
        self._task = self.rpc.loop.create_task(self._keep())
        look_after(self._task)

    # -- trust --------------------------------------------------------------------------------

    def doubt(self) -> None:
        """The connection was given up."""
        if self.witness is not None and not self._ended:
            self._trusted.clear()
            self.witness.doubt()
            self._hurry.set()

    async def trusted(self) -> None:
        """Until what the present connection says may be believed, or nobody would ask any more."""
        while not self._trusted.is_set():  # the next connection may be lost before this goes on
            await self._trusted.wait()

    # -- renewal ------------------------------------------------------------------------------

    async def _keep(self) -> None:
        every = Timing(self.ttl_s).renew_every_s
        while not self._ended:
            sent = self.clock()
            patience = every if self._trusted.is_set() else min(every, LOOK_S)
            try:
                wait = every if await self._renew(sent, patience) else 0.0
            except LockLost as error:
                self._lose(error)
                return
            except DlmfsError:
                await asyncio.sleep(RETRY_S)
                continue
            except Exception as error:  # without a renewal all would be lost
                report(self.rpc.loop, "a renewal", error)
                await asyncio.sleep(RETRY_S)
                continue
            await self._rest(max(0.0, wait - (self.clock() - sent)) if wait else 0.0)

    async def _rest(self, seconds: float) -> None:
        """Until the next renewal is due: at once when a connection was lost."""
        if not seconds:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def _renew(self, sent: float, timeout_s: float) -> bool:
        """Renew and confirm; False if the leader or the member changed, so that it does not count.
        Raises LockLost if the lease is over, OutcomeUnknown."""
        before = self.rpc.generation
        self._hurry.clear()
        left_s = await self._keep_alive(timeout_s)
        term, look = await self._look(timeout_s)
        assert self.renewal is not None
        error = self._judge(term, look._replace(mine=look.mine and left_s > 0))
        if error is not None:
            raise error
        through = self._unbroken(before)
        counts = self.renewal.confirmed(sent, term, through)
        if counts:
            self.renewed(self)
        if through is not None and self.witness is not None and not self._trusted.is_set():
            self._trusted.set()
            self.witness.trust()
        return counts

    async def _look(self, timeout_s: float) -> tuple[int, Look]:
        """The raft term, and what there is to see."""
        keys = self.witness.keys() if self.witness is not None else ()
        own = await self.rpc.call(RANGE, pb.RangeRequest(key=self._key), timeout_s)
        mine = bool(own.kvs) and own.kvs[0].mod_revision == self.born
        every = Range(TIMELINE)
        answer = await self.rpc.call(RANGE, self.codec.read(every), timeout_s)
        timeline = self.codec.found(every, answer.kvs)
        assert isinstance(timeline, tuple)
        records = tuple(kv for kv in timeline if isinstance(kv, KeyValue))
        found: list[KeyValue | None] = []
        for start in range(0, len(keys), PIECE):
            found += await self._read(keys[start : start + PIECE], timeout_s)
        return own.header.raft_term, Look(mine, records, tuple(found), own.header.revision)

    async def _read(self, keys: Sequence[bytes], timeout_s: float) -> list[KeyValue | None]:
        """Some keys, in a transaction inside of another: one that only reads is never sent."""
        reads = Txn((), (Txn((), tuple(Get(key) for key in keys)),))
        answer = await self.rpc.call(TXN, self.codec.txn(reads), timeout_s)
        (inner,) = self.codec.result(reads, answer, answer.header.revision).responses
        assert isinstance(inner, TxnResult)
        return [kv if isinstance(kv, KeyValue) else None for kv in inner.responses]

    def _judge(self, term: int, look: Look) -> DlmfsError | None:
        assert self.renewal is not None
        if term < self.renewal.ruled:
            return StoreRestored(
                f"the store went back from raft term {self.renewal.ruled} to {term}: it was restored"
            )
        if self.witness is not None:
            return self.witness.judge(look)
        return None if look.mine else LockLost("the lease has ended in the store")

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
            if not self.rpc.login.is_old(error):
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
            self._trusted.set()
            self.lost(error)

    def abandon(self) -> None:
        """Renew no more; the lease runs out by itself."""
        self._ended = True
        self._trusted.set()
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
