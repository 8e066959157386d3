"""How a session gets a node's name: the record n/<name>, on its lease, which says who the node is.

Rules of this file
------------------
* The first name that is free is taken; one whose node lives is nobody's to take.
* One that ends just now is waited for by who takes its place.
* None is taken in a quarantine (`restored`): the session waits for its end.
* A former self is ended by us only if it surely is over: it is our own fenced session, or its
  process provably does not exist any more. Then its holders have the grace first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.engine.eviction import mark_key
from dlmfs.engine.fields import FORMAT
from dlmfs.engine.records import NODES, decode_node
from dlmfs.engine.timeline import NO_QUARANTINE, QUARANTINE, Records, read_records, told
from dlmfs.errors import BadState, DlmfsError, NodeNameInUse, OutcomeUnknown, Unavailable
from dlmfs.store.base import (
    TIMELINE,
    Delete,
    Get,
    KeyValue,
    Op,
    Put,
    Range,
    Session,
    Txn,
    TxnResult,
    created_at,
    unchanged,
)

if TYPE_CHECKING:
    from dlmfs.engine.membership import Membership

log = logging.getLogger("dlmfs.node")

RETRY_S: Final = 0.5


def record_of(member: Membership, *, ending: bool = False) -> bytes:
    """What the record n/<name> says. `ending`: it will be gone soon."""
    facts = {**member.config.facts, "v": FORMAT, "ttl": member.timing.ttl_s}
    return json.dumps(facts | {"ending": True} if ending else facts).encode()


def is_ours(member: Membership, kv: KeyValue) -> bool:
    """Whether this life of the node has put this record n/<name>."""
    said = (record_of(member), record_of(member, ending=True))
    return member.session is not None and kv.lease == member.session.lease and kv.value in said


def _facts(record: KeyValue) -> dict[str, object]:
    """Empty for what is no record of ours."""
    try:
        return decode_node(record)
    except BadState:
        return {}


class Named(NamedTuple):
    """A name that was taken, and the create revision of its record. `timeline` is what stood there in
    the commit `revision`, by which the session begins."""

    name: str
    record: int
    timeline: Records
    revision: int


class Naming:
    """The way of one session to a name. `former`: the leases of sessions that are over; `going_on`:
    whether this one is still wanted."""

    def __init__(
        self,
        member: Membership,
        session: Session,
        names: Sequence[str],
        *,
        former: set[int],
        going_on: Callable[[], bool],
        done: Callable[[Named | DlmfsError], None],
    ) -> None:
        self._member = member
        self._session = session
        self._names = names
        self._former = former
        self._going_on = going_on
        self._done = done
        self._told = False
        self._awaited = 0
        """The lease of a dead former self whose holders have their time."""

    def take(self, number: int = 0) -> None:
        """Register under the first free name from `number` on. `done` gets NodeNameInUse if there is
        none, and the session is closed then; or what the store says."""
        if number == len(self._names):
            self._give_up()
            return
        member, lease, name = self._member, self._session.lease, self._names[number]
        key = NODES + name.encode()
        put = Put(key, record_of(member), lease)

        def again(_ended: DlmfsError | None = None) -> None:
            self.take(number)

        def begin(created: int, ops: tuple[Op, ...]) -> None:
            compares = (created_at(key, created), NO_QUARANTINE)
            txn = Txn(compares, (Range(TIMELINE), *ops), (Get(key), Get(QUARANTINE)))
            member.store.txn(txn, partial(member.enter, answered, created))

        def answered(created: int, result: TxnResult | DlmfsError) -> None:
            if isinstance(result, OutcomeUnknown) and self._going_on():
                member.loop.call_later(RETRY_S, member.enter, again)
            elif isinstance(result, DlmfsError):
                self._done(result)
            elif result.succeeded:
                found = result.responses[0]
                assert isinstance(found, tuple)
                records = read_records((kv for kv in found if isinstance(kv, KeyValue)), member.bad)
                self._done(Named(name, created or result.revision, records, result.revision))
            else:
                record, quarantine = result.responses
                if isinstance(quarantine, KeyValue):
                    self._wait(quarantine, again)
                elif not isinstance(record, KeyValue):
                    again()  # the quarantine, or the record, is gone by now
                elif record.lease == lease:  # an earlier attempt, after all
                    begin(record.create_revision, ())
                else:
                    self._meet(record, name, again, partial(self.take, number + 1))

        # A mark against a former self is done with when the name is taken anew.
        begin(0, (put, Delete(mark_key(name))))

    def _meet(
        self, record: KeyValue, name: str, again: Callable[..., None], further: Callable[[], None]
    ) -> None:
        """The name has an owner, or seems to."""
        member = self._member

        def later(_deleted: TxnResult | DlmfsError) -> None:
            member.loop.call_later(RETRY_S, member.enter, again)

        if record.lease == 0:
            log.warning("the record of the name %s is on no lease: it is nobody's", name)
            delete = Txn((unchanged(record.key, record.mod_revision),), (Delete(record.key),))
            member.store.txn(delete, later)
        elif record.lease not in self._former and self._is_over(record) and self._is_early(record):
            member.loop.call_later(member.config.grace_s, member.enter, again)
        elif record.lease in self._former or self._is_over(record):
            log.info("the former node %s is over: its session ends", name)
            member.store.end_session(record.lease, partial(member.enter, again))
        elif self._will_be_free(record) and self._going_on():
            member.loop.call_later(RETRY_S, member.enter, again)
        else:
            further()

    def _wait(self, quarantine: KeyValue, again: Callable[[], None]) -> None:
        """Nobody may take a lock yet."""
        if not self._going_on():
            self._done(Unavailable(told(quarantine)))
            return
        if not self._told:
            self._told = True
            why = "%s; this node waits until nobody of before can serve any more"
            log.warning(why, told(quarantine))
        self._member.loop.call_later(RETRY_S, self._member.enter, again)

    def _is_early(self, record: KeyValue) -> bool:
        """Whether it is seen for the first time. Who held its locks hears of its death just now and may
        be at work still: to end its lease at once would take the time from them that a lease leaves."""
        first = record.lease != self._awaited and self._session.renewed_at is not None
        self._awaited = record.lease
        return first

    def _is_over(self, record: KeyValue) -> bool:
        return self._member.config.is_over(_facts(record))

    def _will_be_free(self, record: KeyValue) -> bool:
        """Whether its node ends just now and we take its place: under the only name that we would have,
        or at its mount point."""
        facts, own = _facts(record), self._member.config.facts
        here = "mount" in own and facts.get("mount") == own["mount"]
        return facts.get("ending") is True and (here or len(self._names) == 1)

    def _give_up(self) -> None:
        error = NodeNameInUse(
            f"a node named {self._names[0]} is alive: choose another with -o node=NAME (one that "
            f"crashed elsewhere is forgotten {self._member.timing.ttl_s:g} s later)"
        )
        self._session.close(lambda _error: self._done(error))
