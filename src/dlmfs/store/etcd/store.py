"""`Store` on etcd: joins codec, connections, watches and the session.

Kept in etcd: everything below `dlmfs/CLUSTER/`, and one key for each session below `dlmfs/CLUSTER!/`.
Nothing else there is read or touched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from dlmfs.errors import DlmfsError, NotPermitted, OutcomeUnknown, StoreRefuses
from dlmfs.store.base import (
    BOUNDS,
    Get,
    Range,
    Txn,
    TxnDone,
    TxnResult,
    WatchBatch,
    WatchGap,
    Witness,
)
from dlmfs.store.check import check
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.about import About, unsound
from dlmfs.store.etcd.certificate import lifetimes
from dlmfs.store.etcd.codec import Codec, never, only_reads
from dlmfs.store.etcd.refusals import LoginRefused
from dlmfs.store.etcd.rpc import (
    RANGE,
    REVOKE,
    TIME_TO_LIVE,
    TXN,
    Access,
    Rpc,
    look_after,
    report,
)
from dlmfs.store.etcd.session import EtcdSession
from dlmfs.store.etcd.trouble import Trouble, kind_of
from dlmfs.store.etcd.watch import EtcdWatch
from dlmfs.timing import Clock

LOOK_S: Final = 1.0
LOOK_EVERY_S: Final = 2.0

T = TypeVar("T")


def certificates(access: Access) -> list[dict[str, object]]:
    """From when and until when the files are good: ours as long as its whole chain, an authority as long
    as the last one of its file."""
    found = []
    for option, pem, of_all in (("cert=", access.cert, min), ("ca=", access.ca, max)):
        known = lifetimes(pem) if pem is not None else []
        if known:
            one = of_all(known, key=lambda each: each.ends)
            found.append({"option": option, "begins": one.begins, "ends": one.ends})
    return found


class EtcdStore:
    """One node's handle. Made after any fork; everything runs on `loop`."""

    bounds = BOUNDS

    def __init__(
        self,
        access: Access,
        cluster: str,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        timeout_s: float,
        *,
        read: Callable[[], Access] | None = None,
    ) -> None:
        """`read`: reads `access` again (`rpc.Rpc`)."""
        self.loop = loop
        self.codec = Codec(f"dlmfs/{cluster}/".encode())
        self.clock = clock
        self.timeout_s = timeout_s
        self.rpc = Rpc(loop, access, self._void, read)
        self.rpc.broken = self._broken
        self.about = About(self.rpc, clock)
        self.session: EtcdSession | None = None
        self.watches: list[EtcdWatch] = []
        self.commits = 0
        self._probed = -LOOK_EVERY_S
        self.renewed: Callable[[EtcdSession], None] | None = None
        """Called with a session that is begun or renewed; may be set later."""
        self._lost: Callable[[DlmfsError], None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        look_after(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _void(self, error: DlmfsError) -> None:
        """The store is another one than it was."""
        if self.session is not None:
            self.session.abandon()
        if self._lost is not None:
            lost, self._lost = self._lost, None
            lost(error)

    def _broken(self) -> None:
        """A connection was given up."""
        if self.session is not None:
            self.session.doubt()

    async def _trusted(self) -> None:
        if self.session is not None:
            await self.session.trusted()

    # -- the contract -------------------------------------------------------------------------

    def txn(self, txn: Txn, done: TxnDone) -> None:
        check(txn, self.bounds)
        self.commits += 1
        self._start(self._answer(self._believe(txn), done))

    async def _answer(
        self, work: Coroutine[Any, Any, T], done: Callable[[T | DlmfsError], None]
    ) -> None:
        """Tell `done` what becomes of `work`: whatever goes wrong in it, it is told once."""
        result: T | DlmfsError
        try:
            result = await work
        except DlmfsError as error:
            result = error
        except Exception as error:
            result = OutcomeUnknown(report(self.loop, "a call", error))
        done(result)

    async def _believe(self, txn: Txn) -> TxnResult:
        """Send it, and take its answer, through a connection that is trusted all the while."""
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._trusted()
        except TimeoutError:
            raise OutcomeUnknown(
                f"etcd at {self.rpc.endpoint} is not proved to be the store that it was"
            ) from None
        generation = self.rpc.generation
        try:
            result = await self._ask(txn)
        except LoginRefused as error:  # as if it were out of reach: the lease decides
            raise OutcomeUnknown(str(error)) from None
        except NotPermitted as error:  # an operator's doing, and his to undo: it breaks no lock
            raise StoreRefuses(str(error)) from None
        if generation != self.rpc.generation:
            raise OutcomeUnknown("the connection was given up")
        return result

    async def _ask(self, txn: Txn) -> TxnResult:
        request = self.codec.txn(txn)
        if not only_reads(request):
            answer = await self.rpc.call(TXN, request, self.timeout_s)
            return self.codec.result(txn, answer, answer.header.revision)
        if len(txn.then) == 1 and not txn.compares:
            (op,) = txn.then
            assert isinstance(op, Get | Range)
            read = await self.rpc.call(RANGE, self.codec.read(op), self.timeout_s)
            return TxnResult(True, read.header.revision, (self.codec.found(op, read.kvs),))
        # Inside of another it is no mere reading any more; it costs a commit, and is rare.
        around = Txn((), (txn,))
        check(around, self.bounds)
        (inner,) = (await self._ask(around)).responses
        assert isinstance(inner, TxnResult)
        return inner

    def watch(
        self,
        prefixes: Sequence[bytes],
        from_revision: int,
        sink: Callable[[WatchBatch | WatchGap], None],
    ) -> EtcdWatch:
        self.watches = [w for w in self.watches if not w.cancelled]
        watch = EtcdWatch(
            self.rpc, self.codec, prefixes, from_revision, sink=sink, trusted=self._trusted
        )
        self.watches.append(watch)
        return watch

    def open_session(
        self,
        node: str,  # noqa: ARG002 - etcd keeps no names of its own
        ttl_s: float,
        lost: Callable[[DlmfsError], None],
        done: Callable[[EtcdSession | DlmfsError], None],
        witness: Witness | None = None,
    ) -> None:
        self._lost = lost
        self.rpc.forget()
        self._start(self._open_session(ttl_s, lost, done, witness))

    async def _open_session(
        self,
        ttl_s: float,
        lost: Callable[[DlmfsError], None],
        done: Callable[[EtcdSession | DlmfsError], None],
        witness: Witness | None,
    ) -> None:
        attempts = len(self.rpc.members) + 1
        for attempt in range(attempts):
            session = EtcdSession(
                self.rpc, self.codec, self.clock, lost, renewed=self._renewed, witness=witness
            )
            try:
                await session.open(ttl_s)
                break
            except DlmfsError as error:
                # Perhaps granted all the same: nothing hangs on it, so let it not stay behind.
                self._start(session.revoke())
                if attempt + 1 == attempts or not isinstance(error, OutcomeUnknown):
                    done(error)
                    return
        first, self.session = self.session is None, session
        if first:  # what is said of the version belongs to the mount's first words
            await self.about.look()
        done(session)

    def _renewed(self, session: EtcdSession) -> None:
        if self.renewed is not None:
            self.renewed(session)
        if session is self.session and self.about.is_due():
            self._start(self.about.look())

    def end_session(self, lease: int, done: Callable[[DlmfsError | None], None]) -> None:
        """End another session, whose owner is known to be over."""
        self._start(self._answer(self._end_session(lease), done))

    async def _end_session(self, lease: int) -> None:
        try:
            await self.rpc.call(REVOKE, pb.LeaseRevokeRequest(id=lease), self.timeout_s)
        except OutcomeUnknown:
            raise
        except DlmfsError:
            return  # it had ended

    def kill_stopped(self, lease: int) -> bool:  # noqa: ARG002 - its lease runs out
        return False

    def lease_left(self, lease: int, done: Callable[[float | DlmfsError | None], None]) -> None:
        self._start(self._answer(self._lease_left(lease), done))

    async def _lease_left(self, lease: int) -> float:
        request = pb.LeaseTimeToLiveRequest(id=lease)
        answer = await self.rpc.call(TIME_TO_LIVE, request, self.timeout_s)
        return float(max(answer.ttl, 0))

    # -- facts --------------------------------------------------------------------------------

    async def look(self) -> None:
        """For who asks how the cluster is: learn whether it takes our writes, within `LOOK_S`. Asked no
        more often than each `LOOK_EVERY_S`."""
        if self.clock() - self._probed < LOOK_EVERY_S:
            return
        self._probed = self.clock()
        # Not cut short: a call that is given up takes its connection along.
        task = self.loop.create_task(self._probe())
        look_after(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task}, timeout=LOOK_S)

    async def _probe(self) -> None:
        """A put under a condition that never holds: refused as any other write, and never applied."""
        with contextlib.suppress(DlmfsError):
            await self.rpc.call(TXN, never(self.codec.root), self.timeout_s)

    def size_mb(self) -> float:
        """The whole database, ours and others'; 0 where etcd does not tell it."""
        return self.about.size_mb

    @property
    def trouble(self) -> Trouble | None:
        """What is wrong with the cluster, if anything is."""
        if self.rpc.refused is not None or self.rpc.trouble is None:
            return self.rpc.refused
        return Trouble(kind_of(self.rpc.trouble), self.rpc.trouble)

    def describe(self) -> dict[str, object]:
        trouble = self.trouble
        return {
            "store": "etcd",
            "endpoints": list(self.rpc.access.endpoints),
            "members": list(self.rpc.members.found),
            "endpoint": self.rpc.endpoint,
            "version": self.about.version,
            "warning": unsound(self.about.version),
            "trouble": trouble.words() if trouble is not None else None,
            "trouble_kind": trouble.kind.value if trouble is not None else None,
            "files": self.rpc.files.trouble,
            "user": self.rpc.access.user,
            "user_asked_for": not self.rpc.login.unasked,
            "certificates": certificates(self.rpc.access),
            "revision": self.rpc.revision,
            "commits": self.commits,
        }

    def close(self) -> None:
        for watch in self.watches:
            watch.cancel()
        if self.session is not None:
            self.session.abandon()
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    async def disconnect(self) -> None:
        """After `close`, to leave no connection behind."""
        await self.rpc.close()
