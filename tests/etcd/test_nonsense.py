"""A server that answers what was not asked: the call is unknown, and the next member is asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import pytest

from dlmfs.errors import DlmfsError, LockLost, OutcomeUnknown
from dlmfs.model import REVISION_MAX
from dlmfs.store.base import Delete, Get, Look, Put, Range, Session, Txn, TxnResult, WatchBatch
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd import rpc
from dlmfs.store.etcd.answers import JUMP_MAX, MEMBERS_MAX, Nonsense
from dlmfs.store.etcd.rpc import MESSAGE_MAX, Access
from dlmfs.store.etcd.session import EtcdSession
from dlmfs.store.etcd.store import EtcdStore
from tests.etcd.mounts import EtcdNodes, put, take, until, value
from tests.etcd.relay import Relay
from tests.etcd.server import Etcd

TXN: Final = "/etcdserverpb.KV/Txn"
RANGE: Final = "/etcdserverpb.KV/Range"
GRANT: Final = "/etcdserverpb.Lease/LeaseGrant"
KEEP: Final = "/etcdserverpb.Lease/LeaseKeepAlive"
LEFT: Final = "/etcdserverpb.Lease/LeaseTimeToLive"
STATUS: Final = "/etcdserverpb.Maintenance/Status"
MEMBERS: Final = "/etcdserverpb.Cluster/MemberList"
WATCH: Final = "/etcdserverpb.Watch/Watch"
PATIENCE_S: Final = 30.0

pytestmark = pytest.mark.allow_warnings

MIXED: Final = Txn(
    (), (Put(b"k", b"v"), Delete(b"other"), Range(b"k"), Txn((), (Get(b"k"),)), Get(b"k"))
)
Lie = Callable[[Any], None]
"""Makes an honest answer another one."""


@pytest.fixture
def relay(shared_etcd: Etcd) -> Iterator[Relay]:
    made = Relay(shared_etcd.members[0].endpoint)
    with contextlib.closing(made):
        yield made


def changed(method: str, kind: type[Any], change: Lie) -> Callable[[str, bytes, bytes], bytes]:
    """A lie about one method's answers."""

    def lie(called: str, _request: bytes, answer: bytes) -> bytes:
        if called != method:
            return answer
        message = kind.FromString(answer)
        change(message)
        return bytes(message.SerializeToString())

    return lie


def said(method: str, what: Callable[[bytes], bytes]) -> Callable[[str, bytes, bytes], bytes]:
    return lambda called, _request, answer: what(answer) if called == method else answer


class Client:
    """A store handle that asks the relay first, and the honest server next."""

    def __init__(self, loop: asyncio.AbstractEventLoop, relay: Relay, etcd: Etcd) -> None:
        self.faults: list[object] = []
        loop.set_exception_handler(self._heard)
        access = Access((relay.endpoint, etcd.members[0].endpoint))
        self.loop = loop
        self.store = EtcdStore(access, f"lies{id(self)}", loop, loop.time, 10.0)
        self.store.about.version = "3.5.1"
        self.lost: list[DlmfsError] = []

    def _heard(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # grpc.aio has one poller for all loops of a process: it may have an event for an earlier test's.
        if "PollerCompletionQueue" not in str(context.get("handle")):
            self.faults.append(context)

    async def _answer(self, ask: Callable[[Callable[[Any], None]], None]) -> Any:
        answer: asyncio.Future[Any] = self.loop.create_future()
        ask(answer.set_result)
        async with asyncio.timeout(PATIENCE_S):
            return await answer

    async def txn(self, txn: Txn) -> TxnResult | DlmfsError:
        return await self._answer(lambda done: self.store.txn(txn, done))  # type: ignore[no-any-return]

    async def session(self, ttl_s: float = 5.0) -> Session | DlmfsError:
        lost = self.lost.append
        return await self._answer(  # type: ignore[no-any-return]
            lambda done: self.store.open_session("n", ttl_s, lost, done)
        )

    async def close(self) -> None:
        self.store.close()
        await self.store.disconnect()


async def until_so(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - any condition of the test's
            await asyncio.sleep(0.01)


def run(relay: Relay, etcd: Etcd, test: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        client = Client(asyncio.get_running_loop(), relay, etcd)
        try:
            await test(client)
        finally:
            await client.close()
        assert not client.faults

    asyncio.run(main())


def _later(message: Any) -> None:
    message.header.revision = 1 << 62


def _jumped(message: Any) -> None:
    message.header.revision += JUMP_MAX + 1


def _fewer(message: Any) -> None:
    del message.responses[-1]


def _more(message: Any) -> None:
    message.responses.add().response_put.SetInParent()


def _other(message: Any) -> None:
    message.responses[2].response_put.SetInParent()


def _none(message: Any) -> None:
    message.responses[3].Clear()


def _fewer_inside(message: Any) -> None:
    del message.responses[3].response_txn.responses[:]


def _other_key(message: Any) -> None:
    message.responses[2].response_range.kvs[0].key = b"elsewhere"


def _twice(message: Any) -> None:
    kvs = message.responses[4].response_range.kvs
    kvs.add().CopyFrom(kvs[0])


def _of_the_future(message: Any) -> None:
    message.responses[4].response_range.kvs[0].mod_revision = REVISION_MAX


def _of_never(message: Any) -> None:
    message.responses[4].response_range.kvs[0].create_revision = 0


TXN_LIES: Final[dict[str, Callable[[str, bytes, bytes], bytes]]] = {
    "no message": said(TXN, lambda _: b"\xff\xff\xff"),
    "nothing": said(TXN, lambda _: b""),
    "half of it": said(TXN, lambda answer: answer[: len(answer) // 2]),
    "without its end": said(TXN, lambda answer: answer[:-1]),
    "too long": said(
        TXN, lambda answer: answer + b"\x7a" + _varint(MESSAGE_MAX) + bytes(MESSAGE_MAX)
    ),
    "no header": changed(TXN, pb.TxnResponse, lambda m: m.ClearField("header")),
    "no cluster": changed(TXN, pb.TxnResponse, lambda m: m.header.ClearField("cluster_id")),
    "a revision of 2^62": changed(TXN, pb.TxnResponse, _later),
    "a revision that jumps": changed(TXN, pb.TxnResponse, _jumped),
    "fewer responses": changed(TXN, pb.TxnResponse, _fewer),
    "more responses": changed(TXN, pb.TxnResponse, _more),
    "another response": changed(TXN, pb.TxnResponse, _other),
    "a response of no kind": changed(TXN, pb.TxnResponse, _none),
    "fewer responses inside": changed(TXN, pb.TxnResponse, _fewer_inside),
    "another key": changed(TXN, pb.TxnResponse, _other_key),
    "a key twice": changed(TXN, pb.TxnResponse, _twice),
    "a key of the future": changed(TXN, pb.TxnResponse, _of_the_future),
    "a key of no revision": changed(TXN, pb.TxnResponse, _of_never),
}


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


@pytest.mark.parametrize("lie", TXN_LIES)
def test_a_transaction_is_unknown_and_the_next_member_is_asked(
    relay: Relay, shared_etcd: Etcd, lie: str
) -> None:
    async def test(client: Client) -> None:
        honest = await client.txn(MIXED)
        assert isinstance(honest, TxnResult)
        relay.lie = TXN_LIES[lie]
        result = await client.txn(MIXED)
        assert isinstance(result, OutcomeUnknown), result
        assert client.store.rpc.endpoint == shared_etcd.members[0].endpoint
        again = await client.txn(MIXED)
        assert isinstance(again, TxnResult)
        assert again.revision > honest.revision
        assert not client.lost

    run(relay, shared_etcd, test)


def test_an_ordinary_jump_of_the_revision_is_believed(relay: Relay, shared_etcd: Etcd) -> None:
    """As by `snapshot restore --bump-revision`; what is made of it is decided elsewhere."""

    def bumped(message: Any) -> None:
        message.header.revision += 1_000_000_000

    async def test(client: Client) -> None:
        honest = await client.txn(MIXED)
        assert isinstance(honest, TxnResult)
        relay.lie = changed(TXN, pb.TxnResponse, bumped)
        result = await client.txn(MIXED)
        assert isinstance(result, TxnResult)
        assert result.revision > honest.revision + 1_000_000_000

    run(relay, shared_etcd, test)


def _ttl(seconds: int) -> Lie:
    def change(message: Any) -> None:
        message.ttl = seconds

    return change


def _another(message: Any) -> None:
    message.id += 1


LEASE_LIES: Final[dict[str, tuple[str, Callable[[str, bytes, bytes], bytes]]]] = {
    "no message": (GRANT, said(GRANT, lambda _: b"\xff\xff\xff")),
    "nothing": (GRANT, said(GRANT, lambda _: b"")),
    "another lease": (GRANT, changed(GRANT, pb.LeaseGrantResponse, _another)),
    "no time": (GRANT, changed(GRANT, pb.LeaseGrantResponse, _ttl(0))),
    "less than no time": (GRANT, changed(GRANT, pb.LeaseGrantResponse, _ttl(-5))),
    "a lease for ever": (GRANT, changed(GRANT, pb.LeaseGrantResponse, _ttl(1 << 60))),
}


@pytest.mark.parametrize("lie", LEASE_LIES)
def test_a_session_is_begun_with_the_next_member(relay: Relay, shared_etcd: Etcd, lie: str) -> None:
    method, relay.lie = LEASE_LIES[lie]

    async def test(client: Client) -> None:
        session = await client.session()
        assert not isinstance(session, DlmfsError), session
        assert 5 <= session.ttl_s < 60
        assert method in relay.told
        assert not client.lost

    run(relay, shared_etcd, test)


def _nobody(message: Any) -> None:
    del message.members[:]


def _crowd(message: Any) -> None:
    for _ in range(MEMBERS_MAX):
        message.members.add(client_urls=["http://10.1.2.3:2379"])


TALK: Final[dict[str, tuple[str, Callable[[str, bytes, bytes], bytes]]]] = {
    "no status": (STATUS, said(STATUS, lambda _: b"\xff")),
    "a status of nothing": (STATUS, said(STATUS, lambda _: b"")),
    "no list": (MEMBERS, said(MEMBERS, lambda _: b"\xff")),
    "a list of nobody": (MEMBERS, changed(MEMBERS, pb.MemberListResponse, _nobody)),
    "a crowd": (MEMBERS, changed(MEMBERS, pb.MemberListResponse, _crowd)),
}


@pytest.mark.parametrize("lie", TALK)
def test_what_a_server_tells_of_itself_costs_no_connection(
    relay: Relay, shared_etcd: Etcd, lie: str
) -> None:
    method, relay.lie = TALK[lie]

    async def test(client: Client) -> None:
        session = await client.session()
        assert not isinstance(session, DlmfsError), session
        assert method in relay.told
        assert client.store.rpc.endpoint == relay.endpoint
        assert client.store.rpc.trouble is None
        assert client.store.rpc.members.found == ()

    run(relay, shared_etcd, test)


@pytest.mark.parametrize("method", [STATUS, MEMBERS])
def test_what_is_asked_in_vain_costs_no_connection(
    relay: Relay, shared_etcd: Etcd, method: str
) -> None:
    """A proxy may not know of it."""
    relay.unavailable = {method}

    async def test(client: Client) -> None:
        session = await client.session()
        assert not isinstance(session, DlmfsError), session
        assert method in relay.told
        assert client.store.rpc.generation == 0
        assert client.store.rpc.trouble is None

    run(relay, shared_etcd, test)


def test_who_is_not_known_is_told_that_nothing_is_known(relay: Relay, shared_etcd: Etcd) -> None:
    """As of silence: nothing was applied, and the next attempt may be another user's."""
    relay.nameless = {TXN}

    async def test(client: Client) -> None:
        result = await client.txn(MIXED)
        assert isinstance(result, OutcomeUnknown)
        assert "wants a user and a password" in str(result)
        assert "wants a user and a password" in str(client.store.describe()["trouble"])
        relay.nameless = set()
        assert isinstance(await client.txn(MIXED), TxnResult)
        assert client.store.describe()["trouble"] is None

    run(relay, shared_etcd, test)


RENEWAL_LIES: Final[dict[str, Callable[[str, bytes, bytes], bytes]]] = {
    "no message": said(KEEP, lambda _: b"\xff\xff\xff"),
    "nothing": said(KEEP, lambda _: b""),
    "another lease": changed(KEEP, pb.LeaseKeepAliveResponse, _another),
    "a lease for ever": changed(KEEP, pb.LeaseKeepAliveResponse, _ttl(1 << 60)),
}


@pytest.mark.parametrize("lie", RENEWAL_LIES)
def test_a_renewal_is_tried_with_the_next_member(relay: Relay, shared_etcd: Etcd, lie: str) -> None:
    async def test(client: Client) -> None:
        session = await client.session()
        assert not isinstance(session, DlmfsError), session
        relay.lie = RENEWAL_LIES[lie]
        await until_so(lambda: KEEP in relay.told)
        began = session.renewed_at
        await until_so(lambda: session.renewed_at != began)
        assert not client.lost

    run(relay, shared_etcd, test)


def test_a_renewal_counts_from_its_sending(relay: Relay, shared_etcd: Etcd) -> None:
    """The server counts from when it hears of it, which may be at once."""

    async def test(client: Client) -> None:
        session = await client.session()
        assert isinstance(session, EtcdSession)
        answered: list[float] = []
        counted: list[float | None] = []

        def late(method: str, _request: bytes, answer: bytes) -> bytes:
            if method == KEEP and not answered:
                answered.append(client.loop.time())
                session.clock = lambda: client.loop.time() + 1.0
            return answer

        def renewed(session: Session) -> None:
            if answered:
                counted.append(session.renewed_at)

        session.renewed = renewed
        relay.lie = late
        await until_so(lambda: bool(counted))
        assert counted[0] is not None
        assert counted[0] <= answered[0]

    run(relay, shared_etcd, test)


def test_a_lease_that_is_renewed_but_has_our_key_no_more_is_lost(
    relay: Relay, shared_etcd: Etcd
) -> None:
    """A server before 3.5.23 may renew a lease that it has revoked."""

    async def test(client: Client) -> None:
        session = await client.session()
        assert isinstance(session, EtcdSession)
        gone = pb.DeleteRangeRequest(key=session._key)
        txn = pb.TxnRequest(success=[pb.RequestOp(request_delete_range=gone)])
        await session.rpc.call(rpc.TXN, txn, PATIENCE_S)
        await until_so(lambda: bool(client.lost))
        assert isinstance(client.lost[0], LockLost)

    run(relay, shared_etcd, test)


def _events(change: Lie) -> Callable[[str, bytes, bytes], bytes]:
    def told(message: Any) -> None:
        if message.events:
            change(message)

    return changed(WATCH, pb.WatchResponse, told)


def _event_of_the_future(message: Any) -> None:
    message.events[0].kv.mod_revision += JUMP_MAX * 2


def _event_elsewhere(message: Any) -> None:
    message.events[0].kv.key = b"elsewhere"


WATCH_LIES: Final[dict[str, Callable[[str, bytes, bytes], bytes]]] = {
    "no message": said(WATCH, lambda _: b"\xff\xff\xff"),
    "nothing": said(WATCH, lambda _: b""),
    "another key": _events(_event_elsewhere),
    "an event of the future": _events(_event_of_the_future),
    "no key": _events(lambda message: message.events[0].ClearField("kv")),
}


@pytest.mark.parametrize("lie", WATCH_LIES)
def test_a_watch_goes_on_with_the_next_member(relay: Relay, shared_etcd: Etcd, lie: str) -> None:
    async def test(client: Client) -> None:
        first = await client.txn(Txn((), (Put(b"w/a", b"1"),)))
        assert isinstance(first, TxnResult)
        relay.lie = WATCH_LIES[lie]
        told: list[bytes] = []

        def sink(batch: object) -> None:
            assert isinstance(batch, WatchBatch)
            told.extend(event.kv.value for event in batch.events)

        client.store.watch((b"w/",), first.revision + 1, sink)
        for number in (b"2", b"3"):
            await client.txn(Txn((), (Put(b"w/a", number),)))
        await until_so(lambda: len(told) == 2)
        assert told == [b"2", b"3"]
        assert WATCH in relay.told

    run(relay, shared_etcd, test)


class Endless:
    """A stream that never comes to the end of one commit."""

    def __init__(self) -> None:
        self.reads = 0

    async def write(self, request: object) -> None:
        """Nobody listens."""

    async def read(self) -> pb.WatchResponse:
        self.reads += 1
        kv = pb.KeyValue(
            key=b"dlmfs/c/w/a", create_revision=5, mod_revision=5, value=bytes(8 << 20)
        )
        header = pb.ResponseHeader(cluster_id=1, revision=5)
        return pb.WatchResponse(header=header, fragment=True, events=[pb.Event(kv=kv)])

    def cancel(self) -> bool:
        return True


def test_a_commit_without_end_is_not_listened_to_for_ever() -> None:
    async def main() -> None:
        store = EtcdStore(Access(("127.0.0.1:1",)), "c", asyncio.get_running_loop(), float, 1.0)
        watch = store.watch((b"w/",), 5, lambda _: None)
        watch.cancel()
        stream = Endless()
        with pytest.raises(Nonsense, match="no end"):
            await watch._follow(stream, store.rpc.generation)
        assert stream.reads <= MESSAGE_MAX // (8 << 20) + 1

    asyncio.run(main())


def test_whom_a_watch_tells_may_fail(relay: Relay, shared_etcd: Etcd) -> None:
    """Its exception is named, and the watch goes on behind what it was told of."""
    faults: list[object] = []

    async def test(client: Client) -> None:
        first = await client.txn(Txn((), (Put(b"w/a", b"1"),)))
        assert isinstance(first, TxnResult)
        told: list[bytes] = []

        def sink(batch: object) -> None:
            assert isinstance(batch, WatchBatch)
            told.extend(event.kv.value for event in batch.events)
            if len(told) == 1:
                raise KeyError("a bug")

        client.store.watch((b"w/",), first.revision + 1, sink)
        for number in (b"2", b"3"):
            await client.txn(Txn((), (Put(b"w/a", number),)))
        await until_so(lambda: len(told) == 2)
        assert told == [b"2", b"3"]
        faults.extend(client.faults)
        client.faults.clear()

    run(relay, shared_etcd, test)
    assert len(faults) == 1


@pytest.mark.fuse
def test_a_node_outlives_a_server_that_lies_now_and_then(
    nodes: EtcdNodes, relay: Relay, shared_etcd: Etcd
) -> None:
    """Every kind of lie, on one answer after the other; each costs the call at most."""
    lies = [*TXN_LIES.values(), *RENEWAL_LIES.values(), *WATCH_LIES.values()]
    lies += [lie for _, lie in LEASE_LIES.values()]
    lies += [said(RANGE, lambda _: b""), said(RANGE, lambda _: b"\xff")]
    source = f"etcd://{relay.endpoint},{shared_etcd.members[0].endpoint}/{nodes.cluster}"
    a, b = nodes.mount("a", source=source), nodes.mount("b")
    for where in (a, b):
        (where / "dom").mkdir()
    fd = os.open(a / "dom/held", os.O_RDWR | os.O_CREAT)
    for number, lie in enumerate(lies):
        if lie is TXN_LIES["too long"]:
            continue
        tellings = len(relay.told)
        relay.lie = lambda *said, lie=lie, since=tellings: (
            lie(*said) if len(relay.told) == since else said[2]
        )
        with contextlib.suppress(OSError):
            put(a / "dom/x", b"%d" % number)
        take(b / "dom/x")
    relay.lie = None
    assert relay.told
    put(a / "dom/x", b"well")
    assert value(b / "dom/x") == b"well"
    until(lambda: nodes.is_healthy(a))
    assert nodes.fences(a) == 0, nodes.reason(a)
    assert os.pwrite(fd, b"still mine", 0) == 10
    os.close(fd)


class Nobody:
    """A witness who never looked."""

    def doubt(self) -> None:
        return

    def keys(self) -> tuple[bytes, ...]:
        return ()

    def judge(self, _look: Look) -> DlmfsError | None:
        raise AssertionError

    def trust(self) -> None:
        raise AssertionError


def test_trust_that_is_lost_again_at_once_lets_nobody_ask() -> None:
    """The connection that was proved is given up before those who waited for that are awake."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        store = EtcdStore(Access(("127.0.0.1:1",)), "c", loop, float, 1.0)
        session = EtcdSession(
            store.rpc, store.codec, float, lambda _: None, renewed=lambda _: None, witness=Nobody()
        )
        session.doubt()
        waits = loop.create_task(session.trusted())
        await asyncio.sleep(0)
        session._trusted.set()
        session.doubt()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waits.done()
        session.abandon()
        await waits

    asyncio.run(main())


def test_a_watch_hears_nothing_through_a_connection_that_was_not_proved() -> None:
    """The proved one was given up while the stream was being opened."""

    async def main() -> None:
        store = EtcdStore(Access(("127.0.0.1:1",)), "c", asyncio.get_running_loop(), float, 1.0)
        watch = store.watch((b"w/",), 5, lambda _: None)
        watch.cancel()
        stream, proved = Endless(), store.rpc.generation
        store.rpc.failed(proved, "a test")
        await watch._follow(stream, proved)
        assert stream.reads == 0

    asyncio.run(main())
