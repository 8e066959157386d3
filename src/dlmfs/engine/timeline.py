"""Whether the store is still the one that this node knows, and which tokens its grants get.

    t/stamp       a count, and the names of the last stampings (`core.timeline`)
    t/offset      what is added to revisions in tokens, and since which revision (`core.tokens`)
    t/quarantine  the store was found restored: nobody may take a lock while this stands (`restored`)

Rules of this file
------------------
* A session looks at these with each renewal, and once more after each connection that it lost, before
  anything is served of what it has cached.
* A node that has made or learned something since the last stamp stamps at its next renewal, unless
  somebody else has in the meantime: one commit for all nodes in a renewal's time, none while nothing
  happens. So all nodes know a name that is at most two renewals older than the newest grant.
* What is younger than the last stamp that a node knows, it proves one by one: the heads that it is in,
  and that what it took away has not come back. What the watch told of others is read anew.
* An offset that grew is another node's word that the store was restored.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from dlmfs.core.timeline import KEPT, Stamp, follows
from dlmfs.core.tokens import BASE_MAX, PLAIN, Raise, Tokens
from dlmfs.engine.badrecords import BadRecords
from dlmfs.engine.fields import FORMAT, Fields
from dlmfs.engine.records import NODES, decode_head
from dlmfs.errors import BadState, DlmfsError, LockLost, OutcomeUnknown, StoreRestored
from dlmfs.model import Mode
from dlmfs.store.base import (
    TIMELINE,
    Compare,
    KeyValue,
    Look,
    Put,
    Txn,
    TxnResult,
    created_at,
    unchanged,
)

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.engine.lockspace import Lockspace
    from dlmfs.engine.membership import Membership

log = logging.getLogger("dlmfs.node")

STAMP: Final = TIMELINE + b"stamp"
OFFSET: Final = TIMELINE + b"offset"
QUARANTINE: Final = TIMELINE + b"quarantine"

WHY_MAX: Final = 400

NO_QUARANTINE: Final = created_at(QUARANTINE, 0)

NEVER: Final = -1
WENT_BACK: Final = "the store went back to an earlier state (restored from a copy?)"


# -- records ----------------------------------------------------------------------------------------


class Records(NamedTuple):
    """What stands below TIMELINE; `offset` is None for a record that is none of ours."""

    stamp: Stamp | None = None
    stamped: int = 0
    """The stamp's modification revision; 0: there is none."""
    offset: Tokens | None = PLAIN
    offset_at: int = 0
    """The offset's modification revision."""
    quarantine: KeyValue | None = None


def decode_stamp(kv: KeyValue) -> Stamp:
    """Raises BadState."""
    fields = Fields.of(kv)
    names = fields.record.get("names")
    if type(names) is not list or not 0 < len(names) <= KEPT:
        fields.wrong("names")
    if not all(type(name) is str for name in names):
        fields.wrong("names")
    return Stamp(fields.whole("n"), tuple(names))


def encode_stamp(stamp: Stamp) -> bytes:
    record = {"v": FORMAT, "n": stamp.number, "names": stamp.names}
    return json.dumps(record, separators=(",", ":")).encode()


def decode_offset(kv: KeyValue) -> Tokens:
    """Raises BadState."""
    fields = Fields.of(kv)
    before = fields.record.get("before", [])
    if type(before) is not list or not all(type(r) is list and len(r) == 2 for r in before):
        fields.wrong("before")
    raises = [
        Raise(fields.as_whole("before", revision), fields.as_whole("before", offset, 0, BASE_MAX))
        for revision, offset in before
    ]
    raises.append(Raise(kv.mod_revision, fields.whole("offset", 0, BASE_MAX)))
    for a, b in itertools.pairwise(raises):
        if a.revision >= b.revision or a.offset > b.offset:
            fields.wrong("before")
    return Tokens(tuple(raises))


def encode_offset(offset: int, before: Tokens) -> bytes:
    record = {"v": FORMAT, "offset": offset, "before": before.raises}
    return json.dumps(record, separators=(",", ":")).encode()


def read_records(found: Iterable[KeyValue], bad: BadRecords) -> Records:
    """What cannot be read is noted in `bad`, and told apart by each field."""
    records = Records()
    missing = {STAMP, OFFSET, QUARANTINE}
    for kv in found:
        missing.discard(kv.key)
        try:
            if kv.key == STAMP:
                records = records._replace(stamped=kv.mod_revision)
                records = records._replace(stamp=decode_stamp(kv))
            elif kv.key == OFFSET:
                records = records._replace(offset=None, offset_at=kv.mod_revision)
                records = records._replace(offset=decode_offset(kv))
            elif kv.key == QUARANTINE:
                records = records._replace(quarantine=kv)
        except BadState as error:
            bad.note(kv.key, error)
        else:
            bad.good(kv.key)
    for key in missing:
        bad.good(key)
    return records


def decode_quarantine(kv: KeyValue) -> str:
    """What it says of itself, for people. Raises BadState."""
    fields = Fields.of(kv)
    why = fields.text("why", WHY_MAX)
    return f"the store was found restored by node {fields.as_node('by', fields.record.get('by'))}: {why}"


def told(quarantine: KeyValue) -> str:
    """The same, of any record: while it stands nobody may take a lock, whatever it says."""
    try:
        return decode_quarantine(quarantine)
    except BadState as error:
        return str(error)


# -- what a node knows --------------------------------------------------------------------------------


class Timeline:
    """One session's knowledge of its store: the `Witness` of `store.base`. See the rules above."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self.doubted = False
        self._doubts = 0
        """How many connections were lost."""
        self._looked_in = 0
        """How many had been lost when the look that is under way began."""
        self.tokens = PLAIN
        self._begun = False
        self._stamp: Stamp | None = None
        self._stamped = 0
        self._seen_before = 0
        """The stamp's revision at the look before the last: a stamp that stands since is an old one."""
        self._proved = 0
        """All that is not younger than this revision is surely in the store's history."""
        self._number = 0
        self.left_keys: dict[bytes, int] = {}
        """As those of `Lockspace`, of domains that were left."""
        self._asked: list[ClusterLock] = []
        self._asked_gone: dict[bytes, int] = {}
        self._name_asked = False

    def begin(self, records: Records, revision: int, former: Timeline | None) -> None:
        """The session has its name, by the commit `revision` that read `records` and found no
        quarantine. `former` is what the node's last session knew. Raises BadState if no token can be
        given, StoreRestored if the store went back while there was no session."""
        session = self._member.session
        assert session is not None
        if records.offset is None:
            raise BadState(
                f"the record {OFFSET!r} in the store is no offset of dlmfs, so no token can be given "
                "that is surely new: see docs/reference.md, `A restored store`"
            )
        if revision + records.offset.offset >= BASE_MAX:
            raise BadState(
                f"the store's revision {revision} and its offset {records.offset.offset} make tokens "
                "that do not fit 63 bits: see docs/reference.md, `A restored store`"
            )
        self.tokens = records.offset
        if former is not None:
            self._stamp = former.known
            if self._stamp is not None and not records.stamped:
                raise StoreRestored(f"{WENT_BACK}: its stamp is gone")
            if self._follows(records) is False:
                raise StoreRestored(f"{WENT_BACK}: its stamp is not the one that this node knows")
            if revision + self.tokens.offset < session.seen + former.tokens.offset:
                raise StoreRestored(
                    f"{WENT_BACK}: its revision was {session.seen} and is {revision}"
                )
        self._adopt(records)
        self._proved = max(session.born, self._stamped)
        self._begun = True

    @property
    def stamped(self) -> int:
        """The revision of the last stamp that was seen; 0: none was."""
        return self._stamped

    @property
    def known(self) -> Stamp | None:
        """The last stamp that was seen."""
        return self._stamp

    def forget(self) -> None:
        """The store went back, and everybody knows: the stamp of before is nothing to go by. What tokens
        were given counts on."""
        self._stamp = None

    def _adopt(self, records: Records) -> None:
        if records.stamp is not None:
            self._stamp, self._stamped = records.stamp, records.stamped

    # -- Witness ----------------------------------------------------------------------------------

    def doubt(self) -> None:
        self._doubts += 1
        if not self.doubted:
            self.doubted = True
            self._member.doubted()

    def trust(self) -> None:
        if self.doubted:
            self.doubted = False
            self._member.trusted()

    def keys(self) -> Sequence[bytes]:
        """After a lost connection: our name's record and the heads that we are in, if they are younger
        than what is proved by the stamp."""
        self._asked = []
        # What is asked for before there is anything to prove proves nothing afterwards.
        self._looked_in = self._doubts if self._begun else NEVER
        if not self.doubted or not self._begun:
            return ()
        for space in self._spaces():
            self._asked += [
                lock
                for lock in space.locks.values()
                if lock.view.head_revision > self._proved and lock.view.mine() is not None
            ]
        self._name_asked = self._member.record > self._proved
        mine = [self._own] if self._name_asked else []
        heads = [lock.space.keys.head(lock.name) for lock in self._asked]
        self._asked_gone = self._gone()
        return [*mine, *self._asked_gone, *heads]

    def _gone(self) -> dict[bytes, int]:
        """What we took away since what is proved; what we took before that is forgotten."""
        gone: dict[bytes, int] = {}
        for keys in (self.left_keys, *(space.left_keys for space in self._spaces())):
            for key, revision in list(keys.items()):
                if revision <= self._proved:
                    del keys[key]
                else:
                    gone[key] = max(gone.get(key, 0), revision)
        return gone

    @property
    def _own(self) -> bytes:
        return NODES + self._member.name.encode()

    def _spaces(self) -> list[Lockspace]:
        return [space for space in self._member.spaces.values() if space.live]

    def judge(self, look: Look) -> DlmfsError | None:
        if not self._begun:
            return None if look.mine else LockLost("the lease has ended in the store")
        if self._looked_in != self._doubts:
            # Read through two connections, perhaps from two stores: what was asked for of the one is no
            # proof for the other, whose stamp would stand for it from now on.
            return OutcomeUnknown("the connection was lost in the middle of a look")
        if look.revision < self._stamped:
            # Read before we stamped, and answered after. (If it is the store that is behind, the store's
            # own revision tells.)
            return OutcomeUnknown("what was read is older than what is known")
        records = read_records(look.timeline, self._member.bad)
        follows_ours = self._follows(records)
        why = self._is_back(records, follows_ours) or self._is_restored(records)
        if why is None and self.doubted:
            why = self._is_missing(look)
        if why is not None:
            return StoreRestored(why)
        if not look.mine:
            return LockLost("the lease has ended in the store")
        if self.doubted:
            if self._name_asked and not self._has_our_name(look):
                return LockLost("the node's record was removed from the store")
            if follows_ours is None and self._proved > 0:
                # It proves nothing: then all that we are in has to be proved by itself.
                self._proved = 0
                return OutcomeUnknown("the stamp does not tell: all that it stood for is looked at")
        self._go_on(records)
        return None

    def _follows(self, records: Records) -> bool | None:
        """Whether the stamp is one that came after ours, or that very one. None: it does not tell."""
        if self._stamp is None:
            return True
        return None if records.stamp is None else follows(self._stamp, records.stamp)

    def _is_back(self, records: Records, follows_ours: bool | None) -> str | None:
        """Whether the stamp shows that the store does not have what it had."""
        if follows_ours is False:
            return f"{WENT_BACK}: its stamp is not the one that this node knows"
        if self._stamp is not None and not records.stamped and self.doubted:
            # Without a lost connection it was removed by hand, and is put again.
            return f"{WENT_BACK}: its stamp is gone"
        return None

    def _has_our_name(self, look: Look) -> bool:
        record = look.found[0]
        return record is not None and record.create_revision == self._member.record

    def _is_restored(self, records: Records) -> str | None:
        """Whether another node has found out."""
        if records.offset is None:  # put by hand; what we know goes on to hold for this session
            return None
        if records.offset.offset < self.tokens.offset:
            return f"{WENT_BACK}: its offset of tokens is smaller than it was"
        if records.offset.offset > self.tokens.offset:
            return "the store went back to an earlier state, as another node found out"
        return None

    def _is_missing(self, look: Look) -> str | None:
        """Whether a head that we are in, younger than the stamp, is not what we know of it."""
        begin = int(self._name_asked)
        middle = begin + len(self._asked_gone)
        gone = zip(self._asked_gone.items(), look.found[begin:middle], strict=True)
        for (key, revision), kv in gone:
            if kv is not None and kv.mod_revision < revision:
                return f"{WENT_BACK}: {key!r} is there again"
        found = look.found[middle:]
        for lock, kv in zip(self._asked, found, strict=True):
            if not lock.space.live or lock.view.head_revision <= self._proved:
                continue
            if not _stands(lock, kv, mine=look.mine):
                name = b"/".join((lock.space.domain, lock.name)).decode(errors="replace")
                return f"{WENT_BACK}: what it knows of the lock {name} is older than what this node knows"
        return None

    def _go_on(self, records: Records) -> None:
        """All is well: remember the stamp, and stamp anew if there is something to stand for."""
        self._adopt(records)
        if self.doubted:
            for space in self._spaces():
                if space.revision > self._proved:
                    space.relist()
        self._proved = max(self._proved, self._stamped)
        self._gone()
        if not self.doubted:
            if self._stamped == self._seen_before and self._newest() > self._stamped:
                self._put_stamp(records)
            self._seen_before = self._stamped

    def _newest(self) -> int:
        """The revision of the last thing that we made or learned."""
        return max((space.newest for space in self._spaces()), default=0)

    # -- stamping -----------------------------------------------------------------------------------

    def _put_stamp(self, records: Records) -> None:
        session = self._member.session
        assert session is not None
        self._number += 1
        # Each name is used once: a session's number is its own, for ever.
        name = f"{session.lease:x}.{self._number}"
        stamp = (self._stamp or Stamp(0, ())).next(name)
        compares: tuple[Compare, ...] = (unchanged(STAMP, records.stamped),)
        put = Put(STAMP, encode_stamp(stamp))

        def answered(result: TxnResult | DlmfsError) -> None:
            # Of any other outcome the next look tells.
            if isinstance(result, TxnResult) and result.succeeded and not self.doubted:
                if self._stamped < result.revision:
                    self._stamp, self._stamped = stamp, result.revision
                    self._proved = max(self._proved, result.revision)
                    self._seen_before = result.revision

        self._member.store.txn(Txn(compares, (put,)), partial(self._member.enter, answered))


def _stands(lock: ClusterLock, kv: KeyValue | None, *, mine: bool) -> bool:
    """Whether the store's head of a lock can have come from the one that we know. While our session
    lives (`mine`), nobody else takes us out of it, or changes the value of what we hold."""
    view, level = lock.view, lock.res.level
    unsure = lock.busy or lock.unresolved
    if kv is None:
        # It may have been our own doing, whose answer the connection took along.
        left = bool(lock.forgets) or view.leaving
        return not mine or (unsure and left and level is Mode.NL)
    if kv.mod_revision == view.head_revision:
        return True
    if kv.mod_revision < view.head_revision:
        return False
    known = view.mine()
    if not mine or known is None or known.level is Mode.NL:
        return True
    try:
        head = decode_head(kv)
    except BadState:
        return True  # not the store's doing; whoever reads it says so
    now = head.members.get(lock.space.node)
    if unsure:
        # What is under way may have been applied; but it takes nothing away that we believe in (rule 5).
        return level is Mode.NL or (
            now is not None
            and now.incarnation == known.incarnation
            and now.level >= level
            and now.revision >= known.revision
        )
    # Of a grant in mail without the head the view knows no more than that it must look.
    waits = view.wish is not None or view.must_look
    converted = waits and now is not None and now.level > known.level
    converted = converted and now is not None and now.revision > view.head_revision
    return (now == known or converted) and head.lvb == view.head.lvb
