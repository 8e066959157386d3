"""What stands in the store: keys and values of one domain (design, section 3, "engine/").

    m/<node>         membership; create revision = incarnation, modification revision = epoch
    h/<lock>         head: members with their levels, the LVB, the abandonment mark
    w/<lock>/<node>  wish: a request that could not be granted at once
    g/<node>/<lock>  mail: "your wish was granted", with the head as it then stood

Values are JSON with a format version, so that an operator can read them and a later version can
refuse them by name.
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

from dlmfs.errors import BadState
from dlmfs.model import EMPTY_LVB, Mode
from dlmfs.store.base import KeyValue

FORMAT: Final = 1

DOMAINS: Final = b"d/"
NODES: Final = b"n/"


class Keys:
    """The keys of one domain: all that nodes watch in one range, and the heads, which they do not,
    in another, so that a store with one range per watch wakes nobody for a head (engine rule 1)."""

    __slots__ = ("base", "heads", "mails", "members", "mine", "node", "wishes")

    def __init__(self, domain: bytes, node: str) -> None:
        base = DOMAINS + domain + b"/"
        self.base = base
        self.node = node.encode()
        self.members = base + b"m/"
        self.heads = b"h/" + domain + b"/"
        self.wishes = base + b"w/"
        self.mails = base + b"g/" + self.node + b"/"
        self.mine = self.members + self.node

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

    def split_wish(self, key: bytes) -> tuple[bytes, str]:
        lock, node = key[len(self.wishes) :].split(b"/")
        return lock, node.decode()


def member_of(key: bytes) -> tuple[bytes, str] | None:
    """The domain and the node of a membership record's key; None for another key."""
    parts = key.split(b"/")
    if len(parts) == 4 and parts[2] == b"m":
        return parts[1], parts[3].decode()
    return None


class Member(NamedTuple):
    """A node's place in a head. `revision` is the commit that granted `level`, the base of its
    tokens; 0 stands for "the revision of this very record"."""

    incarnation: int
    level: Mode
    revision: int


class Abandoned(NamedTuple):
    """The node that died having the lock exclusively, and the revision of its grant."""

    node: str
    revision: int


class Head(NamedTuple):
    members: dict[str, Member]
    lvb: bytes = EMPTY_LVB
    abandoned: Abandoned | None = None

    def encode(self) -> bytes:
        return json.dumps(
            {
                "v": FORMAT,
                "m": self.members,
                "lvb": self.lvb.hex() if self.lvb != EMPTY_LVB else "",
                "ab": self.abandoned,
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


def _load(kv: KeyValue) -> dict[str, object]:
    try:
        record = json.loads(kv.value)
        version = record["v"]
    except (ValueError, TypeError, KeyError):
        raise BadState(f"the record {kv.key!r} in the store is not of dlmfs") from None
    if version != FORMAT:
        raise BadState(
            f"the record {kv.key!r} in the store has format {version}, this program reads "
            f"format {FORMAT}: run the same version of dlmfs on every node"
        )
    assert isinstance(record, dict)
    return record


def _head_of(record: dict[str, object], revision: int) -> Head:
    members = {
        node: Member(incarnation, Mode(level), granted or revision)
        for node, (incarnation, level, granted) in record["m"].items()  # type: ignore[attr-defined]
    }
    lvb, abandoned = record["lvb"], record["ab"]
    assert isinstance(lvb, str)
    return Head(
        members,
        bytes.fromhex(lvb) if lvb else EMPTY_LVB,
        Abandoned(*abandoned) if isinstance(abandoned, list) else None,
    )


def decode_head(kv: KeyValue) -> Head:
    """Raises BadState for a record that is not ours or has another format."""
    return _head_of(_load(kv), kv.mod_revision)


def settled(head: Head, revision: int) -> Head:
    """The head just committed at `revision`, as a reader would decode it."""
    members = {
        node: m if m.revision else m._replace(revision=revision) for node, m in head.members.items()
    }
    return head._replace(members=members)


def decode_wish(kv: KeyValue, node: str) -> Wish:
    """Raises BadState for a record that is not ours or has another format."""
    record = _load(kv)
    flags, incarnation, mode = record["flags"], record["inc"], record["mode"]
    assert isinstance(flags, list)
    assert isinstance(incarnation, int)
    return Wish(
        node,
        incarnation,
        Mode(mode),  # type: ignore[arg-type]
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
    record = _load(kv)
    wish, head = record["wish"], record["head"]
    assert isinstance(wish, int)
    assert head is None or isinstance(head, dict)
    return Mail(wish, None if head is None else _head_of(head, kv.mod_revision))
