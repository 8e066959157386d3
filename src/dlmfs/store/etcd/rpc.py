"""Calls to an etcd cluster: one member at a time, the next one when it does not answer.

Rules of this file
------------------
* A call that got no answer is `OutcomeUnknown`: it may have been applied, or be applied later
  (etcd-notes 10). Only what etcd says before it proposes anything is definite.
* An answer that is none (`answers`) is no answer: so is whatever goes wrong here in reading it.
* Any failure moves on to the next member, once for all calls that were under way on the old one.
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
from typing import Any, Final, NamedTuple, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dlmfs.errors import (
    Bug,
    DlmfsError,
    LockLost,
    NotPermitted,
    OutcomeUnknown,
    StoreRestored,
)
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.answers import Nonsense, check, check_jump
from dlmfs.store.etcd.codec import only_reads

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
NO_TOKEN: Final = ""
"""The cluster has users, and does not ask for them yet."""
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
    """See the rules at the head of the file. `lost(error)` is called when the store went back."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        access: Access,
        lost: Callable[[DlmfsError], None],
    ) -> None:
        self.loop = loop
        self.access = access
        self.lost = lost
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
        self._channel: grpc.aio.Channel | None = None
        self._token: str | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        return self.access.endpoints[self.generation % len(self.access.endpoints)]

    # -- connections --------------------------------------------------------------------------

    def _connected(self) -> grpc.aio.Channel:
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
        if self.trouble is None:
            log.warning("etcd at %s: %s", self.endpoint, why)
        self.trouble = why
        self._disconnect()
        self.generation += 1
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
        answer = await self._call(method, request, timeout_s)
        self.believe(generation, lambda: self._check(request, answer, floor))
        if self.trouble is not None:
            log.info("etcd at %s answers", self.endpoint)
            self.trouble = None
        if method is TXN or method is RANGE:
            self._look_back(answer.header, floor)
        return answer

    def believe(self, generation: int, look: Callable[[], None]) -> None:
        """Have an answer looked through. Raises OutcomeUnknown if it is none."""
        try:
            look()
        except Nonsense as error:
            endpoint = self.endpoint
            self.failed(generation, str(error))
            raise OutcomeUnknown(f"etcd at {endpoint}: {error}") from None

    @staticmethod
    def _check(request: Any, answer: Any, floor: int) -> None:
        check(request, answer)
        check_jump(floor, answer.header.revision)

    async def _call(self, method: Method, request: Any, timeout_s: float) -> Any:
        for attempt in range(2):
            generation = self.generation
            try:
                return await self._send(method, request, timeout_s)
            except grpc.aio.AioRpcError as error:
                if attempt == 0 and self._token_is_old(error):
                    self._token = None
                    continue
                self._raise(error, generation)
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

    async def _send(self, method: Method, request: Any, timeout_s: float) -> Any:
        metadata = await self._metadata(timeout_s)
        stub = self._connected().unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.read,
        )
        return await stub(request, timeout=timeout_s, metadata=metadata)

    async def stream(self, method: Method, timeout_s: float | None = None) -> Stream:
        """A two-way call on the present connection. The caller reports its failure."""
        metadata = (*(await self._metadata(timeout_s or 5.0)), NEEDS_LEADER)
        stub = self._connected().stream_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.read,
        )
        return stub(metadata=metadata, timeout=timeout_s)

    async def _metadata(self, timeout_s: float) -> tuple[tuple[str, str], ...]:
        if self.access.user is None:
            return ()
        if self._token is None:
            stub = self._connected().unary_unary(
                AUTHENTICATE.path,
                request_serializer=AUTHENTICATE.request.SerializeToString,
                response_deserializer=AUTHENTICATE.read,
            )
            request = pb.AuthenticateRequest(name=self.access.user, password=self.access.password)
            generation = self.generation
            try:
                answer = await stub(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if "authentication is not enabled" not in (error.details() or ""):
                    raise
                self._token = NO_TOKEN
            else:
                self.believe(generation, lambda: check(request, answer))
                self._token = answer.token
        return (("token", self._token),) if self._token else ()

    # -- answers ------------------------------------------------------------------------------

    def _token_is_old(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether a new token may mend it; the first one of all, where users were not needed before."""
        details = error.details() or ""
        first = self._token == NO_TOKEN and "user name is empty" in details
        return error.code() is grpc.StatusCode.UNAUTHENTICATED or (
            error.code() is grpc.StatusCode.INVALID_ARGUMENT
            and (first or "revision of auth store is old" in details)
        )

    def _raise(self, error: grpc.aio.AioRpcError, generation: int) -> None:
        code, details = error.code(), error.details() or "no details"
        endpoint = self.endpoint
        if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
            raise LockLost("the lease has ended") from None
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            self.trouble = details
            raise NotPermitted(
                f"etcd at {self.endpoint} refuses this user ({details}): see -o credentials=FILE"
            ) from None
        if code is grpc.StatusCode.INVALID_ARGUMENT and "user name is empty" in details:
            raise NotPermitted(
                f"etcd at {endpoint} wants a user and a password: give -o credentials=FILE"
            ) from None
        if code is grpc.StatusCode.INVALID_ARGUMENT and "authentication failed" in details:
            raise NotPermitted(
                f"etcd at {self.endpoint} does not know this user and password: see "
                "-o credentials=FILE"
            ) from None
        if code is grpc.StatusCode.INVALID_ARGUMENT and "revision of auth store" not in details:
            raise Bug(f"etcd refused a request: {details}") from None
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space" in details:
            self.trouble = details  # said after applying, too (protocol-traps 14)
        else:
            self.failed(generation, f"{code.name.lower()}: {details}")
        raise OutcomeUnknown(f"etcd at {endpoint} did not answer ({details})") from None

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
