"""What the store tells a domain of its members, wishes and mail: read, and noted where it belongs.

A record that cannot be read costs itself (`badrecords`). As if it were not there: a wish, by which
nobody holds anything, and mail, in whose place the head is looked at. A membership record that cannot
be read is one all the same: its node may be alive and hold locks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dlmfs.engine.records import (
    Head,
    Wish,
    check_member,
    decode_head,
    decode_mail,
    decode_wish,
    encode_member,
)
from dlmfs.errors import BadState
from dlmfs.store.base import Event, KeyValue, WatchBatch

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.engine.lockspace import Lockspace


def begin(
    space: Lockspace, members: Iterable[KeyValue], wishes: Iterable[KeyValue], revision: int
) -> None:
    """Take everything over as it stood at `revision`; what is told from then on comes after it."""
    space.revision = revision
    space.bad.forget(space.keys.base)
    space.deaths.listed()
    before, space.members = space.members, {}
    for kv in members:
        _member_put(space, kv)
    for node, incarnation in before.items():
        if space.members.get(node) != incarnation:
            space.deaths.note(node, incarnation)
    for queue in space.wishes.values():
        queue.clear()
    for kv in wishes:
        split, wish = space.keys.split_wish(kv.key), read_wish(space, kv)
        if split is not None and wish is not None:
            space.wishes.setdefault(split[0], {})[wish.node] = wish


def read_wish(space: Lockspace, kv: KeyValue) -> Wish | None:
    """The wish in a record; None for one that cannot be read."""
    split = space.keys.split_wish(kv.key)
    if split is None:
        space.bad.unknown(kv.key)
        return None
    try:
        wish = decode_wish(kv, split[1])
    except BadState as error:
        space.bad.note(kv.key, error)
        return None
    space.bad.good(kv.key)
    return wish


def read_head(space: Lockspace, kv: KeyValue) -> Head:
    """The head in a record. Raises BadState for one that cannot be read: nobody knows who has the lock
    then, and it costs the lock (`wreck`)."""
    try:
        head = decode_head(kv)
    except BadState as error:
        space.bad.note(kv.key, error)
        raise
    space.bad.good(kv.key)
    return head


def note(space: Lockspace, batch: WatchBatch) -> None:
    """Take over what one commit changed, then have the locks act on it."""
    revision = batch.revision
    keys = space.keys
    space.revision = revision
    touched: list[ClusterLock | None] = []
    # Mail before wishes: the deletion of a granted wish comes in the same batch as its mail,
    # and alone would mean "refused".
    for event in batch.events:
        if event.kind == "delete":
            space.bad.good(event.kv.key)
        elif event.kv.key.startswith(keys.mails):
            touched.append(_mail_event(space, event.kv, revision))
    gone = False
    for event in batch.events:
        if event.kv.key.startswith(keys.wishes):
            touched.append(_wish_event(space, event, revision))
        elif event.kv.key.startswith(keys.members):
            gone |= _member_event(space, event)
        elif event.kv.key.startswith(keys.news) and event.kind == "put":
            space.files.told(event.kv)
    for lock in dict.fromkeys(touched):  # a grant of many is one piece of news for each lock
        if lock is not None and space.live:
            lock.learned()
    if gone and space.live:
        for lock in list(space.locks.values()):
            lock.member_gone()


def _mail_event(space: Lockspace, kv: KeyValue, revision: int) -> ClusterLock | None:
    """Note a mail; the lock it is about, if this node knows it."""
    name = space.keys.split_mail(kv.key)
    if name is None:
        space.bad.unknown(kv.key)
        return None
    lock = space.locks.get(name)
    if lock is not None:
        try:
            mail = decode_mail(kv)
        except BadState as error:
            space.bad.note(kv.key, error)
            lock.mail_unread()
        else:
            space.bad.good(kv.key)
            lock.mail(mail, revision)
            space.newest = max(space.newest, revision)
    return lock


def _wish_event(space: Lockspace, event: Event, revision: int) -> ClusterLock | None:
    """Note a change of the queue; the lock it is about, if this node knows it."""
    split = space.keys.split_wish(event.kv.key)
    if split is None:
        if event.kind == "put":
            space.bad.unknown(event.kv.key)
        return None
    name, node = split
    lock = space.locks.get(name)
    wish = read_wish(space, event.kv) if event.kind == "put" else None
    if wish is not None:
        if lock is not None:
            lock.wish_put(wish, revision)
        else:
            space.wishes.setdefault(name, {})[node] = wish
    elif lock is not None:
        lock.wish_gone(node, revision)
    elif name in space.wishes:
        space.wishes[name].pop(node, None)
        if not space.wishes[name]:
            del space.wishes[name]
    return lock


def _member_event(space: Lockspace, event: Event) -> bool:
    """Follow a membership record; True if somebody is gone."""
    if event.kind == "put":
        if event.kv.key == space.keys.mine and not _is_ours(space, event.kv):
            # Off our lease it would outlive us, and our locks with it.
            space.lose("the membership record was overwritten in the store")
            return False
        return _member_put(space, event.kv)
    node = space.keys.split_member(event.kv.key)
    if node is None:
        return False
    if node == space.node and event.kv.mod_revision > space.incarnation:
        if not space.leaving:  # else it may be our own doing
            space.lose("the membership record was removed from the store")
        return False
    known = space.members.pop(node, None)
    if known is None:
        return False
    space.deaths.note(node, known)
    return True


def _is_ours(space: Lockspace, kv: KeyValue) -> bool:
    """Whether a membership record is as we put it."""
    return kv.lease == space.lease and kv.value == encode_member(space.lease)


def _member_put(space: Lockspace, kv: KeyValue) -> bool:
    """Take a membership record in; True if it took the place of another incarnation's. What it says
    matters to nobody: a node whose record cannot be read may be alive, and hold locks."""
    node = space.keys.split_member(kv.key)
    if node is None:
        space.bad.unknown(kv.key)
        return False
    try:
        check_member(kv)
    except BadState as error:
        space.bad.note(kv.key, error)
    else:
        space.bad.good(kv.key)
    known = space.members.get(node)
    space.members[node] = kv.create_revision
    if known is None or known == kv.create_revision:
        return False
    space.deaths.note(node, known)
    return True
