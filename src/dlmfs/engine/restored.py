"""The way back after a restore: everybody is told, nobody takes a lock for a lease time, tokens go on.

Rules of this file
------------------
* Who finds the store restored raises the offset of tokens above all that it knows to have been given,
  and puts the quarantine in the same commit. Every session sees that with its next renewal, and ends.
* The quarantine stands on a lease of its own that is never renewed: twice the largest lease time of all
  nodes known, because that counts from its grant, and the commit may apply up to a lease time later. By
  its end every session that began before the commit has looked, or its time is over.
* No session begins while it stands (`naming` compares), and each reads the offset by the commit that
  begins it: all that are under way at once have the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from dlmfs.core.tokens import BASE_MAX, Tokens, covers, raised
from dlmfs.engine.fields import FORMAT
from dlmfs.engine.records import NODES, decode_node, node_of
from dlmfs.engine.timeline import (
    NO_QUARANTINE,
    OFFSET,
    QUARANTINE,
    WHY_MAX,
    encode_offset,
    read_records,
    told,
)
from dlmfs.errors import BadState, DlmfsError
from dlmfs.store.base import (
    TIMELINE,
    KeyValue,
    Put,
    Range,
    Session,
    Txn,
    TxnDone,
    TxnResult,
    created_at,
    unchanged,
)

if TYPE_CHECKING:
    from dlmfs.engine.membership import Membership

log = logging.getLogger("dlmfs.node")

RETRY_S: Final = 0.5
QUARANTINE_TTLS: Final = 2.0
"""How long the quarantine's lease is, in lease times."""


class Recovery:
    """One node's way back. `why`: what it found; `known` the offset that its last session served under,
    `seen` the largest revision that it has heard of. `done` is called when another session may begin."""

    def __init__(
        self, member: Membership, why: str, known: Tokens, seen: int, done: Callable[[], None]
    ) -> None:
        self._member = member
        self._why = why
        self._known = known.offset
        self._seen = seen
        self._done = done

    def start(self) -> None:
        """Look at what is done already, and do what is missing."""
        if not self._member.closed:
            self._ask(Txn((), (Range(TIMELINE),)), self._looked)

    def _ask(self, txn: Txn, done: TxnDone) -> None:
        self._member.store.txn(txn, partial(self._member.enter, done))

    def _again(self, why: str | None = None) -> None:
        if why is not None:
            self._member.waits(why)
        self._member.loop.call_later(RETRY_S, self._member.enter, self.start)

    def _looked(self, result: TxnResult | DlmfsError) -> None:
        if isinstance(result, DlmfsError):
            self._again()
            return
        (found,) = result.responses
        assert isinstance(found, tuple)
        records = read_records((kv for kv in found if isinstance(kv, KeyValue)), self._member.bad)
        offset = records.offset
        if offset is None:
            self._again(
                f"the record {OFFSET!r} in the store is no offset of dlmfs: see docs/reference.md, "
                "`A restored store`"
            )
        elif not covers(offset.offset, self._known, self._seen, result.revision):
            new = raised(offset.offset, self._known, self._seen, result.revision)
            if result.revision + new >= BASE_MAX:
                self._again(
                    f"with the offset {new} tokens would not fit 63 bits: see docs/reference.md, "
                    "`A restored store`"
                )
                return
            put = Put(OFFSET, encode_offset(new, offset))
            if records.quarantine is not None:
                same = created_at(QUARANTINE, records.quarantine.create_revision)
                self._commit(Txn((unchanged(OFFSET, records.offset_at), same), (put,)), None)
            else:
                self._announce(put, records.offset_at)
        elif records.quarantine is not None:
            self._again(told(records.quarantine))
        else:
            self._done()

    # -- telling everybody --------------------------------------------------------------------------

    def _announce(self, put: Put, offset_at: int) -> None:
        """Raise the offset and put the quarantine, on a lease that covers everybody's."""

        def read(result: TxnResult | DlmfsError) -> None:
            if isinstance(result, DlmfsError):
                self._again()
                return
            (nodes,) = result.responses
            assert isinstance(nodes, tuple)
            ttl_s = max(self._member.config.ttl_s, self._member.timing.ttl_s, *_lease_times(nodes))
            begun = partial(self._member.enter, opened)
            lease_s = QUARANTINE_TTLS * ttl_s
            self._member.store.open_session(self._member.name, lease_s, _nothing, begun)

        def opened(session: Session | DlmfsError) -> None:
            if isinstance(session, DlmfsError):
                self._again()
                return
            session.abandon()
            facts = {"v": FORMAT, "by": self._member.name, "why": self._why[:WHY_MAX]}
            quarantine = Put(QUARANTINE, json.dumps(facts).encode(), session.lease)
            compares = (unchanged(OFFSET, offset_at), NO_QUARANTINE)
            self._commit(Txn(compares, (put, quarantine)), session)

        self._ask(Txn((), (Range(NODES),)), read)

    def _commit(self, txn: Txn, lease: Session | None) -> None:
        def answered(result: TxnResult | DlmfsError) -> None:
            if isinstance(result, TxnResult) and result.succeeded:
                log.warning(
                    "node %s tells all others that the store was restored", self._member.name
                )
            elif isinstance(result, TxnResult) and lease is not None:
                lease.close(lambda _error: None)  # another node was first
            self.start()  # of an unknown outcome the next look tells

        self._ask(txn, answered)


def _lease_times(nodes: tuple[Any, ...]) -> list[float]:
    """Of all nodes that the store knows; 0 if it knows none."""
    times = [0.0]
    for kv in nodes:
        if node_of(kv.key) is not None:
            with contextlib.suppress(BadState):
                times.append(float(decode_node(kv)["ttl"]))  # type: ignore[arg-type]
    return times


def _nothing(_error: DlmfsError) -> None:
    return
