"""What a server may answer: each message is looked through before anything of it is believed.

An answer that is not what was asked for (no message at all, no header, another number or kind of
responses, keys that were not asked for, numbers that cannot be) says nothing of what became of the
request: `Nonsense`, of which `rpc` makes an unknown outcome, and goes on to the next member.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from dlmfs.model import REVISION_MAX
from dlmfs.store.etcd import etcd_pb2 as pb

JUMP_MAX: Final = 1 << 40
"""How far a revision may grow between two answers: some 30 years of commits at a thousand a second.
`etcdutl snapshot restore --bump-revision` is told to use 10^9, which is a thousandth of it."""
TTL_MAX_S: Final = 24 * 3600
"""A server rounds the lease time that is asked for up, to some election timeouts."""
MEMBERS_MAX: Final = 100
URLS_MAX: Final = 16
_VERSION: Final = re.compile(r"[0-9A-Za-z.+-]{1,64}")
_TOKEN: Final = re.compile(r"[!-~]{1,8192}")


class Nonsense(Exception):
    """An answer that is none."""


def check(request: Any, answer: object) -> None:
    """Raises Nonsense if `answer` is no answer to `request`."""
    expected, look = _KINDS[type(request)]
    if not isinstance(answer, expected):
        raise Nonsense("what it sent is no message")
    _header(answer)
    look(request, answer)


def check_jump(known: int, revision: int) -> None:
    """Raises Nonsense if a store that was at `known` (0: never seen) cannot be at `revision` now."""
    if known and revision > known + JUMP_MAX:
        raise Nonsense(f"its revision jumped from {known} to {revision}")


def _header(answer: Any) -> None:
    header = answer.header
    if not answer.HasField("header") or not header.cluster_id:
        raise Nonsense("its answer has no header")
    if not 0 <= header.revision <= REVISION_MAX:
        raise Nonsense(f"its revision is {header.revision}")


# -- keys and values -------------------------------------------------------------------------------


def _range(request: pb.RangeRequest, answer: pb.RangeResponse) -> None:
    _found(request, answer.kvs, answer.header.revision)


def _found(request: pb.RangeRequest, kvs: Sequence[pb.KeyValue], revision: int) -> None:
    """The keys that were found, in order; all as they stood at `revision` at the latest."""
    most = request.limit or (len(kvs) if request.range_end else 1)
    if len(kvs) > most:
        raise Nonsense(f"it found {len(kvs)} keys where {most} were asked for")
    before = b""
    for kv in kvs:
        inside = (
            request.key <= kv.key < request.range_end
            if request.range_end
            else kv.key == request.key
        )
        if not inside or kv.key <= before:
            raise Nonsense("it found a key that was not asked for")
        if not 0 < kv.create_revision <= kv.mod_revision <= revision:
            raise Nonsense("it found a key of a revision that cannot be")
        before = kv.key


def _txn(request: pb.TxnRequest, answer: pb.TxnResponse) -> None:
    _branch(request, answer, answer.header.revision)


_ANSWERED: Final = {
    "request_range": "response_range",
    "request_put": "response_put",
    "request_delete_range": "response_delete_range",
    "request_txn": "response_txn",
}


def _branch(request: pb.TxnRequest, answer: pb.TxnResponse, revision: int) -> None:
    ops = request.success if answer.succeeded else request.failure
    if len(ops) != len(answer.responses):
        raise Nonsense(f"it answered {len(answer.responses)} of {len(ops)} operations")
    for op, response in zip(ops, answer.responses, strict=True):
        asked = op.WhichOneof("request")
        if response.WhichOneof("response") != _ANSWERED[asked]:
            raise Nonsense("it answered another operation than was asked for")
        if asked == "request_range":
            _found(op.request_range, response.response_range.kvs, revision)
        elif asked == "request_txn":
            _branch(op.request_txn, response.response_txn, revision)


# -- leases ----------------------------------------------------------------------------------------


def _granted(request: pb.LeaseGrantRequest, answer: pb.LeaseGrantResponse) -> None:
    if answer.error or not answer.id or request.id not in (0, answer.id):
        raise Nonsense("it granted another lease than was asked for")
    if not 0 < answer.ttl <= max(TTL_MAX_S, request.ttl):
        raise Nonsense(f"it granted a lease of {answer.ttl} s")


def _same_lease(request: Any, answer: Any) -> None:
    if answer.id != request.id:
        raise Nonsense("it speaks of another lease than was asked for")
    if answer.ttl > TTL_MAX_S:
        raise Nonsense(f"it renewed a lease for {answer.ttl} s")


# -- the rest --------------------------------------------------------------------------------------


def _nothing(_request: Any, _answer: Any) -> None:
    """There is nothing in it but the header."""


def _status(_request: pb.StatusRequest, answer: pb.StatusResponse) -> None:
    if not _VERSION.fullmatch(answer.version) or answer.db_size < 0:
        raise Nonsense("its status has no version or no size")


def _members(_request: pb.MemberListRequest, answer: pb.MemberListResponse) -> None:
    if not 0 < len(answer.members) <= MEMBERS_MAX:
        raise Nonsense(f"it speaks of {len(answer.members)} members")
    if any(len(member.client_urls) > URLS_MAX for member in answer.members):
        raise Nonsense("it speaks of a member with more addresses than there can be")


def _token(_request: pb.AuthenticateRequest, answer: pb.AuthenticateResponse) -> None:
    if not _TOKEN.fullmatch(answer.token):
        raise Nonsense("its token is none")


def check_events(request: pb.WatchCreateRequest, told: pb.WatchResponse) -> None:
    """Raises Nonsense if a watch's stream says what was not asked for."""
    _header(told)
    revision = 0
    for event in told.events:
        kv = event.kv
        if not request.key <= kv.key < request.range_end:
            raise Nonsense("it told of a key that was not asked for")
        if not max(revision, 1) <= kv.mod_revision <= REVISION_MAX:
            raise Nonsense("it told of a revision that cannot be")
        if event.type == pb.Event.PUT and not 0 < kv.create_revision <= kv.mod_revision:
            raise Nonsense("it told of a key of a revision that cannot be")
        revision = kv.mod_revision


_KINDS: Final[dict[type[Any], tuple[type[Any], Callable[[Any, Any], None]]]] = {
    pb.RangeRequest: (pb.RangeResponse, _range),
    pb.TxnRequest: (pb.TxnResponse, _txn),
    pb.LeaseGrantRequest: (pb.LeaseGrantResponse, _granted),
    pb.LeaseRevokeRequest: (pb.LeaseRevokeResponse, _nothing),
    pb.LeaseKeepAliveRequest: (pb.LeaseKeepAliveResponse, _same_lease),
    pb.LeaseTimeToLiveRequest: (pb.LeaseTimeToLiveResponse, _same_lease),
    pb.StatusRequest: (pb.StatusResponse, _status),
    pb.AuthenticateRequest: (pb.AuthenticateResponse, _token),
    pb.MemberListRequest: (pb.MemberListResponse, _members),
}
