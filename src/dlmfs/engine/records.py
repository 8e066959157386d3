"""What stands in the store: keys and values of one domain (design, section 3, "engine/").

    m/<node>         membership; create revision = incarnation, modification revision = epoch
    h/<lock>         head: members with their levels, the LVB, the abandonment mark
    w/<lock>/<node>  wish: a request that could not be granted at once
    g/<node>/<lock>  mail: "your wish was granted", with the head as it then stood
    f/<node>, v/<node>  files that are only made, and first values: see `keeping`

Values are JSON with a format version, so that an operator can read them and a later version can
refuse them by name. Each kind has one decoder, which checks every field and raises BadState naming
the key, whatever is wrong (`fields`); a key of no shape of these is nobody's, and None here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Final, NamedTuple

from dlmfs.engine.fields import FORMAT, Fields, node_name
from dlmfs.model import EMPTY_LVB, LVB_SIZE, Mode
from dlmfs.names import LOCK_NAME_MAX, is_domain, is_lock
from dlmfs.store.base import KeyValue

DOMAINS: Final = b"d/"
HEADS: Final = b"h/"
NODES: Final = b"n/"

NODE_SIZE_MAX: Final = 16 * 1024
TTL_MAX_S: Final = 24 * 3600.0
"""More than a store grants."""
_TEXTS: Final = {"host": 256, "machine": 256, "boot": 64, "mount": 4096}


class Keys:
    """The keys of one domain: all that nodes watch in one range, and the heads, which they do not,
    in another, so that a store with one range per watch wakes nobody for a head (engine rule 1)."""

    __slots__ = (
        "base",
        "files",
        "heads",
        "mails",
        "members",
        "mine",
        "my_files",
        "my_news",
        "news",
        "node",
        "wishes",
    )

    def __init__(self, domain: bytes, node: str) -> None:
        base = DOMAINS + domain + b"/"
        self.base = base
        self.node = node.encode()
        self.members = base + b"m/"
        self.heads = HEADS + domain + b"/"
        self.wishes = base + b"w/"
        self.mails = base + b"g/" + self.node + b"/"
        self.mine = self.members + self.node
        self.files = base + b"f/"
        self.my_files = self.files + self.node
        self.news = base + b"v/"
        self.my_news = self.news + self.node

    def head(self, lock: bytes) -> bytes:
        return self.heads + lock

    def queue(self, lock: bytes) -> bytes:
        return self.wishes + lock + b"/"

    def wish(self, lock: bytes, node: str) -> bytes:
        return self.wishes + lock + b"/" + node.encode()

    def mail(self, node: str, lock: bytes) -> bytes:
        return self.mails[: -len(self.node) - 1] + node.encode() + b"/" + lock

    def member(self, node: str) -> bytes:
        return self.members + node.encode()

    def split_wish(self, key: bytes) -> tuple[bytes, str] | None:
        """The lock and the node of a wish's key; None for another key."""
        if not key.startswith(self.wishes):
            return None
        lock, _, node = key[len(self.wishes) :].partition(b"/")
        name = node_name(node)
        return (lock, name) if name is not None and is_lock(lock) else None

    def split_mail(self, key: bytes) -> bytes | None:
        """The lock of a key in our mail."""
        lock = key[len(self.mails) :]
        return lock if is_lock(lock) else None

    def split_member(self, key: bytes) -> str | None:
        """The node of a membership record's key."""
        return node_name(key[len(self.members) :])


def member_of(key: bytes) -> tuple[bytes, str] | None:
    """The domain and the node of a membership record's key; None for another key."""
    parts = key.split(b"/", 4)
    if len(parts) != 4 or parts[2] != b"m" or not is_domain(parts[1]):
        return None
    node = node_name(parts[3])
    return None if node is None else (parts[1], node)


def lock_of(key: bytes) -> tuple[bytes, bytes] | None:
    """The domain and the lock of a head's key; None for another key."""
    domain, _, lock = key[len(HEADS) :].partition(b"/")
    if not (key.startswith(HEADS) and is_domain(domain) and is_lock(lock)):
        return None
    return domain, lock


def node_of(key: bytes) -> str | None:
    """The node of the key n/<node>; None for another key, those below it included."""
    return node_name(key[len(NODES) :]) if key.startswith(NODES) else None


class Member(NamedTuple):
    """A node's place in a head. `revision` is the commit that granted `level`, the base of its
    tokens; 0 stands for "the revision of this very record"."""

    incarnation: int
    level: Mode
    revision: int


class Abandoned(NamedTuple):
    """The node that died having the lock exclusively, and the revision of its grant. `seen`: a later
    exclusive holder has had the lock, so the head need not outlive its members for the mark's sake."""

    node: str
    revision: int
    seen: bool = False


class Head(NamedTuple):
    members: dict[str, Member]
    lvb: bytes = EMPTY_LVB
    abandoned: Abandoned | None = None

    def forgettable(self) -> bool:
        """Whether nothing need be left of it when nobody has the lock's file any more: a head that tells
        of a dead exclusive holder stays for whoever comes next (promise 4)."""
        marked = self.abandoned is not None and not self.abandoned.seen
        return not marked and all(m.level is not Mode.EX for m in self.members.values())

    def encode(self) -> bytes:
        return json.dumps(
            {
                "v": FORMAT,
                "m": self.members,
                "lvb": self.lvb.hex() if self.lvb != EMPTY_LVB else "",
                "ab": self.abandoned and self.abandoned[: 3 if self.abandoned.seen else 2],
            },
            separators=(",", ":"),
        ).encode()


class Wish(NamedTuple):
    """A request in the queue. `revision` (of its creation) is its place and its name.

    It lives on its node's lease, so while it stands, `incarnation` is alive.
    """

    node: str
    incarnation: int
    mode: Mode
    trying: bool
    convert: bool
    revision: int
    lease: int

    def encode(self) -> bytes:
        flags = [*(["try"] if self.trying else []), *(["convert"] if self.convert else [])]
        record = {"v": FORMAT, "inc": self.incarnation, "mode": int(self.mode), "flags": flags}
        return json.dumps(record, separators=(",", ":")).encode()


class Mail(NamedTuple):
    """`head` is None where it would have been too long: it is to be read."""

    wish_revision: int
    head: Head | None


def _head(fields: Fields, revision: int) -> Head:
    """The head in a record that was put at `revision`."""
    members: dict[str, Member] = {}
    for node, member in fields.part("m").record.items():
        if type(member) is not list or len(member) != 3:
            fields.wrong("m")
        incarnation, level, granted = member
        members[fields.as_node("m", node)] = Member(
            fields.as_whole("m", incarnation, 1, revision),
            Mode(fields.as_whole("m", level, Mode.NL, Mode.EX)),
            fields.as_whole("m", granted, 0, revision) or revision,
        )
    abandoned = fields.record.get("ab")
    if abandoned is not None:
        if type(abandoned) is not list or abandoned[2:] not in ([], [True]):
            fields.wrong("ab")
        node, granted = (*abandoned, None, None)[:2]
        abandoned = Abandoned(
            fields.as_node("ab", node),
            fields.as_whole("ab", granted, 0, revision),
            seen=abandoned[2:] == [True],
        )
    return Head(members, _lvb(fields), abandoned)


def _lvb(fields: Fields) -> bytes:
    text = fields.text("lvb", 2 * LVB_SIZE)
    if not text:
        return EMPTY_LVB
    try:
        lvb = bytes.fromhex(text)
    except ValueError:
        lvb = b""
    if len(lvb) != LVB_SIZE:
        fields.wrong("lvb")
    return lvb


def decode_head(kv: KeyValue) -> Head:
    """Raises BadState for a record that is not ours or has another format."""
    return _head(Fields.of(kv), kv.mod_revision)


def settled(head: Head, revision: int) -> Head:
    """The head just committed at `revision`, as a reader would decode it."""
    members = {
        node: m if m.revision else m._replace(revision=revision) for node, m in head.members.items()
    }
    return head._replace(members=members)


def decode_wish(kv: KeyValue, node: str) -> Wish:
    """Raises BadState for a record that is not ours or has another format."""
    fields = Fields.of(kv)
    if not kv.lease:
        fields.wrong("lease: it would stand for ever")
    flags = fields.record.get("flags")
    if type(flags) is not list or any(flag not in ("try", "convert") for flag in flags):
        fields.wrong("flags")
    return Wish(
        node,
        # Its node was a member before it wished; perhaps where something stood that was put by hand.
        fields.whole("inc", 1, kv.mod_revision),
        Mode(fields.whole("mode", Mode.PR, Mode.EX)),
        "try" in flags,
        "convert" in flags,
        kv.create_revision,
        kv.lease,
    )


def encode_mail(wish: Wish, head: bytes | None) -> bytes:
    head = b"null" if head is None else head
    return b'{"v":%d,"wish":%d,"head":%s}' % (FORMAT, wish.revision, head)


def decode_mail(kv: KeyValue) -> Mail:
    """Raises BadState for a record that is not ours or has another format."""
    fields = Fields.of(kv)
    head = None
    if fields.record.get("head") is not None:
        head = _head(fields.part("head").of_this_format(), kv.mod_revision)
    return Mail(fields.whole("wish", 1, kv.mod_revision), head)


def encode_member(lease: int) -> bytes:
    return json.dumps({"v": FORMAT, "lease": lease}).encode()


def check_member(kv: KeyValue) -> None:
    """Raises BadState for a record that its node has not put. Whoever it is stays a member all the same:
    its incarnation is the record's create revision, and it may well hold locks."""
    if kv.value != encode_member(kv.lease) or not kv.lease:
        Fields.of(kv).wrong("lease")


def decode_node(kv: KeyValue) -> dict[str, object]:
    """The facts in the record n/<node>: what a daemon says of itself. Raises BadState."""
    fields = Fields.of(kv, NODE_SIZE_MAX)
    for name, most in _TEXTS.items():
        if name in fields.record:
            fields.text(name, most)
    for name in ("pid", "pidns", "start"):
        if name in fields.record:
            fields.whole(name)
    fields.seconds("ttl", TTL_MAX_S)
    return fields.record


def encode_news(locks: Iterable[bytes]) -> bytes:
    """The locks whose first values a commit writes."""
    names = [os.fsdecode(lock) for lock in locks]
    return json.dumps({"v": FORMAT, "locks": names}, separators=(",", ":")).encode()


def decode_news(kv: KeyValue) -> list[bytes]:
    """Raises BadState for a record that is not ours or has another format."""
    fields = Fields.of(kv)
    names = fields.record.get("locks")
    if type(names) is not list:
        fields.wrong("locks")
    locks = [os.fsencode(fields.as_text("locks", name, LOCK_NAME_MAX)) for name in names]
    if not all(map(is_lock, locks)):
        fields.wrong("locks")
    return locks
