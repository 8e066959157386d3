"""Calls to an etcd cluster: one member at a time, the next one when it does not answer.

Rules of this file
------------------
* A call that got no answer is `OutcomeUnknown`: it may have been applied, or be applied later
  (etcd-notes 10). Only what etcd says before it proposes anything is definite.
* An answer that is none (`answers`) is no answer: so is whatever goes wrong here in reading it.
* Any failure moves on to the next member, once for all calls that were under way on the old one.
* With each connection the files of the mount are read again (`files`): certificates end and are renewed.
* An answer whose revision is below one seen before it was asked for is from a store that went back
  in time (restored or wiped): everything we know is void (etcd-notes 11). That is not all: one that was
  restored may show larger revisions, so with each connection trust is lost (`session`).
* Channels are made after forking, or gRPC's threads stay behind in the parent (etcd-notes 3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dlmfs.errors import DlmfsError, OutcomeUnknown, StoreRestored
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.answers import Nonsense, check, check_jump
from dlmfs.store.etcd.codec import only_reads, puts
from dlmfs.store.etcd.files import Files
from dlmfs.store.etcd.login import NO_TOKEN, Login
from dlmfs.store.etcd.members import Members
from dlmfs.store.etcd.refusals import LoginRefused, meaning, tls
from dlmfs.store.etcd.trouble import REFUSALS, Trouble, kind_of

log = logging.getLogger("dlmfs.etcd")

MESSAGE_MAX: Final = 64 << 20
"""Bytes of an answer. The largest of ours, the wishes of a domain with 1,000 nodes of which each waits
for 200 locks, is half of it; whatever may be longer is read in pages."""

CHANNEL_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 6000),  # etcd closes connections that ask more often than each 5 s
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 0),  # nor does it allow them then
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MESSAGE_MAX),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
    ("grpc.enable_http_proxy", 0),  # whatever the environment says, it would be told the password
    ("grpc.service_config_disable_resolution", 1),  # nor does DNS say how we call
)
NEEDS_LEADER: Final = ("hasleader", "true")
"""A stream at a member without a leader is ended instead of staying silent."""


GRACE_S: Final = 10.0
"""How long a connection that was given up stays open for what is under way on it."""


def cancelling() -> bool:
    """Whether this task is being cancelled, and not just the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def look_after(task: asyncio.Task[Any]) -> None:
    """Have the loop told if the task fails: a broken invariant must not end in silence."""
    task.add_done_callback(_looked_after)


def _looked_after(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        context = {"message": "a task of the etcd store failed", "exception": error}
        task.get_loop().call_exception_handler(context)


def report(loop: asyncio.AbstractEventLoop, where: str, error: Exception) -> str:
    """Have an exception named that nobody expected; what of it may be told."""
    loop.call_exception_handler(
        {"message": f"{where} of the etcd store failed", "exception": error}
    )
    return f"a fault of this daemon ({type(error).__name__})"


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("token", token),) if token else ()


class Method(NamedTuple):
    path: str
    request: type[Any]
    response: type[Any]

    def read(self, data: bytes) -> Any:
        """The answer; the bytes themselves if they are none, which gRPC would log with a traceback."""
        try:
            return self.response.FromString(data)
        except DecodeError:
            return data


RANGE: Final = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
TXN: Final = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
GRANT: Final = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE: Final = Method(
    "/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse
)
KEEP_ALIVE: Final = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse
)
TIME_TO_LIVE: Final = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse
)
WATCH: Final = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)
STATUS: Final = Method("/etcdserverpb.Maintenance/Status", pb.StatusRequest, pb.StatusResponse)
MEMBER_LIST: Final = Method(
    "/etcdserverpb.Cluster/MemberList", pb.MemberListRequest, pb.MemberListResponse
)
AUTHENTICATE: Final = Method(
    "/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse
)


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the cluster. The certificates are PEM texts; without `ca` nothing is
    encrypted."""

    endpoints: tuple[str, ...]
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    user: str | None = None
    password: str = ""


class Stream(Protocol):
    """A two-way call, as grpc.aio's StreamStreamCall."""

    async def write(self, request: Any) -> None: ...

    async def read(self) -> Any: ...

    def cancel(self) -> bool: ...


class Rpc:
    """See the rules at the head of the file."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        access: Access,
        lost: Callable[[DlmfsError], None],
        read: Callable[[], Access] | None = None,
    ) -> None:
        """`lost(error)` is called when the store went back. `read`: reads `access` again; None: nothing
        is read again. Raises DlmfsError."""
        self.loop = loop
        self.lost = lost
        self.files = Files(loop, access, read)
        self.login = Login(self.files, self._authenticate, loop.time)
        self.members = Members(access.endpoints, encrypted=access.ca is not None)
        self.generation = 0
        """Counts the connections; names the one that a failure is about."""
        self.broken: Callable[[], None] | None = None
        """Called when a connection is given up."""
        self.revision = 0
        self.seen = 0
        """The largest revision that was ever answered; `revision`: since the present session began."""
        self.cluster_id = 0
        self.trouble: str | None = None
        """What the last call ended with, if it failed."""
        self.refused: Trouble | None = None
        """What the last write was refused with. Readings, and so the lease, may go on meanwhile."""
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def access(self) -> Access:
        return self.files.access

    @property
    def endpoint(self) -> str:
        return self.members.endpoint

    # -- connections --------------------------------------------------------------------------

    async def _connected(self) -> grpc.aio.Channel:
        if self._channel is None and self.generation:
            await self.files.look()
        if self._channel is None:
            access = self.access
            target = f"dns:///{self.endpoint}"  # a host may be called as one of gRPC's schemes is
            if access.ca is None:
                self._channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
            else:
                credentials = grpc.ssl_channel_credentials(access.ca, access.key, access.cert)
                self._channel = grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
        return self._channel

    def failed(self, generation: int, why: str) -> None:
        """The connection of that generation is of no use: go to the next member."""
        if generation != self.generation:
            return  # another call has seen it
        why = tls(why) or why
        if self.trouble is None:
            log.warning("etcd at %s: %s", self.endpoint, why)
        self.trouble = why
        self._disconnect()
        self.generation += 1
        self.members.next()
        if self.broken is not None:
            self.broken()

    def _disconnect(self) -> None:
        """Let go of the connection; what is under way on it may still be answered."""
        channel, self._channel = self._channel, None
        if channel is not None:
            task = self.loop.create_task(channel.close(GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Leave no connection behind."""
        for task in list(self._closing):
            task.cancel()
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    # -- calls --------------------------------------------------------------------------------

    async def call(self, method: Method, request: Any, timeout_s: float) -> Any:
        """One request and its answer. Raises OutcomeUnknown, or what is definite: LockLost (no such
        lease), NotPermitted, Bug (a request that etcd cannot accept)."""
        assert method is not TXN or not only_reads(request), "it may make the server panic"
        floor, generation = self.revision, self.generation
        answer, endpoint = await self._call(method, request, timeout_s)
        self.believe(generation, lambda: self._check(request, answer, endpoint, floor))
        if self.trouble is not None:
            log.info("etcd at %s answers", endpoint)
            self.trouble = None
        if self.refused is not None and method is TXN and puts(request):
            log.warning("etcd at %s takes writes again", self.endpoint)
            self.refused = None
        if method is TXN or method is RANGE:
            self._look_back(answer.header, floor)
        return answer

    async def inquire(self, method: Method, request: Any, timeout_s: float) -> Any:
        """The same for a question by which nothing stands or falls: whatever comes of it, the connection
        is kept, and nobody hears of trouble. Raises OutcomeUnknown, NotPermitted, Bug."""
        answer, endpoint = await self._call(method, request, timeout_s, harmless=True)
        try:
            self._check(request, answer, endpoint, 0)
        except Nonsense as error:
            raise OutcomeUnknown(f"etcd at {endpoint}: {error}") from None
        return answer

    def believe(self, generation: int, look: Callable[[], None]) -> None:
        """Have an answer looked through. Raises OutcomeUnknown if it is none."""
        try:
            look()
        except Nonsense as error:
            endpoint = self.endpoint
            self.failed(generation, str(error))
            raise OutcomeUnknown(f"etcd at {endpoint}: {error}") from None

    def _check(self, request: Any, answer: Any, endpoint: str, floor: int) -> None:
        check(request, answer)
        check_jump(floor, answer.header.revision)
        if not self.members.are(endpoint, answer.header.cluster_id):
            raise Nonsense("it is of another cluster than those that named it")

    async def _call(
        self, method: Method, request: Any, timeout_s: float, *, harmless: bool = False
    ) -> tuple[Any, str]:
        """The answer, and who gave it."""
        for attempt in range(2):
            generation, token = self.generation, NO_TOKEN
            try:
                token = await self._token(timeout_s)
                return await self._send(method, request, timeout_s, token)
            except grpc.aio.AioRpcError as error:
                if self.login.is_old(error, token) and attempt == 0:
                    continue
                if method is TXN or method is GRANT:
                    self._heed(error.details() or "")
                self._raise(error, generation, harmless=harmless)
            except asyncio.CancelledError:
                if cancelling():
                    raise
                raise OutcomeUnknown("the connection was given up") from None
            except DlmfsError:
                raise
            except Exception as error:
                why = report(self.loop, "a call", error)
                self.failed(generation, why)
                raise OutcomeUnknown(f"etcd at {self.endpoint}: {why}") from None
        raise AssertionError

    async def _send(
        self, method: Method, request: Any, timeout_s: float, token: str
    ) -> tuple[Any, str]:
        channel, endpoint = await self._connected(), self.endpoint
        stub = channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.read,
        )
        return await stub(request, timeout=timeout_s, metadata=_metadata(token)), endpoint

    async def stream(self, method: Method, timeout_s: float | None = None) -> Stream:
        """A two-way call on the present connection. The caller reports its failure."""
        metadata = (*_metadata(await self._token(timeout_s or 5.0)), NEEDS_LEADER)
        channel = await self._connected()
        stub = channel.stream_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.read,
        )
        return stub(metadata=metadata, timeout=timeout_s)

    # -- the user -----------------------------------------------------------------------------

    async def _token(self, timeout_s: float) -> str:
        try:
            return await self.login.token(timeout_s)
        except LoginRefused as error:
            self._note(str(error))
            raise

    async def _authenticate(
        self, request: pb.AuthenticateRequest, timeout_s: float
    ) -> pb.AuthenticateResponse:
        generation = self.generation
        answer, _ = await self._send(AUTHENTICATE, request, timeout_s, NO_TOKEN)
        self.believe(generation, lambda: check(request, answer))
        assert isinstance(answer, pb.AuthenticateResponse)
        return answer

    # -- answers ------------------------------------------------------------------------------

    def _raise(self, error: grpc.aio.AioRpcError, generation: int, *, harmless: bool) -> NoReturn:
        meant = meaning(error.code(), error.details() or "no details", self.endpoint)
        if meant.broken and not harmless:
            assert meant.trouble is not None
            self.failed(generation, meant.trouble)
        elif meant.trouble is not None and not harmless:
            self._note(meant.trouble)
        raise meant.error from None

    def _note(self, trouble: str) -> None:
        """What is wrong lies not in the connection."""
        if self.trouble is None and self.refused is None:
            log.warning("%s", trouble)
        self.trouble = trouble

    def _heed(self, details: str) -> None:
        """What a write failed with is told of until one is taken."""
        kind = kind_of(details)
        if kind in REFUSALS:
            trouble = Trouble(kind, details)
            if self.refused != trouble:
                log.error("etcd at %s: %s", self.endpoint, trouble.words())
            self.refused = trouble

    def _look_back(self, header: pb.ResponseHeader, floor: int) -> None:
        if self.cluster_id not in (0, header.cluster_id):
            self._void(f"another etcd cluster answers at {self.endpoint}")
        if header.revision < floor:
            self._void(
                f"the store at {self.endpoint} went back from revision {floor} to "
                f"{header.revision}: it was restored or wiped"
            )
        self.cluster_id = header.cluster_id
        self.revision = max(self.revision, header.revision)
        self.seen = max(self.seen, header.revision)

    def forget(self) -> None:
        """A session begins: it knows nothing of the store yet."""
        self.revision = self.cluster_id = 0

    def _void(self, why: str) -> None:
        error = StoreRestored(why)
        self.forget()
        self.lost(error)
        raise error
