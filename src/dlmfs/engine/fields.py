"""A record's bytes to its fields, each asked for by name, type and range.

Whoever may write the store may write anything there: whatever is wrong with a record is BadState
that names its key, before more is done with it than to look at its size and depth.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Final, NoReturn

from dlmfs.errors import BadState
from dlmfs.model import NODE_NAME, REVISION_MAX
from dlmfs.store.base import KeyValue

FORMAT: Final = 1
FORMAT_MAX: Final = 1_000_000
"""What could be a version's number at all."""

SIZE_MAX: Final = 1 << 20
"""Bytes of a record; a head with 8,000 members has as many. etcd takes 1.5 MiB in one request."""
DEPTH_MAX: Final = 16
KEY_SHOWN: Final = 160

_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)
_ALL_BUT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


def shown(key: bytes) -> str:
    """A key as it may be told to people: printable, and not for ever."""
    return repr(key[:KEY_SHOWN]) + ("..." if len(key) > KEY_SHOWN else "")


def node_name(raw: bytes) -> str | None:
    """The node's name in a part of a key; None if no node can be called so."""
    if not raw.isascii() or not NODE_NAME.fullmatch(name := raw.decode()):
        return None
    return name


def too_deep(text: bytes) -> bool:
    """Whether the JSON in `text` nests deeper than any record of ours. A parser would recurse."""
    if text.count(b"[") + text.count(b"{") <= DEPTH_MAX:
        return False
    depth = 0
    for bracket in _STRINGS.sub(b"", text).translate(None, _ALL_BUT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH_MAX:
            return True
    return False


def parse(kv: KeyValue, size_max: int = SIZE_MAX) -> dict[str, Any]:
    """The JSON object in a record. Raises BadState."""
    if len(kv.value) > size_max:
        raise BadState(f"the record {shown(kv.key)} in the store has {len(kv.value)} bytes")
    if too_deep(kv.value):
        raise BadState(f"the record {shown(kv.key)} in the store nests too deeply")
    try:
        record = json.loads(kv.value.decode())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise BadState(f"the record {shown(kv.key)} in the store is not of dlmfs")
    return record


class Fields:
    """The fields of a record of this format. Every question raises BadState if the answer is not
    what it should be."""

    __slots__ = ("key", "record")

    def __init__(self, key: bytes, record: dict[str, Any]) -> None:
        self.key = key
        self.record = record

    @staticmethod
    def of(kv: KeyValue, size_max: int = SIZE_MAX) -> Fields:
        """Raises BadState for a record that is not ours, or of another version's format."""
        return Fields(kv.key, parse(kv, size_max)).of_this_format()

    def of_this_format(self) -> Fields:
        """Itself. Raises BadState for a record that is not ours, or of another version's format."""
        version = self.record.get("v")
        if type(version) is not int or not 0 < version <= FORMAT_MAX:
            raise BadState(f"the record {shown(self.key)} in the store is not of dlmfs")
        if version != FORMAT:
            raise BadState(
                f"the record {shown(self.key)} in the store has format {version}, this program "
                f"reads format {FORMAT}: run the same version of dlmfs on every node"
            )
        return self

    def wrong(self, what: str) -> NoReturn:
        raise BadState(f"the record {shown(self.key)} in the store has no good {what}")

    def whole(self, name: str, least: int = 0, most: int = REVISION_MAX) -> int:
        """A whole number in a range."""
        return self.as_whole(name, self.record.get(name), least, most)

    def as_whole(self, name: str, number: object, least: int = 0, most: int = REVISION_MAX) -> int:
        """As `whole`, for a number found somewhere in the field `name`."""
        if type(number) is not int or not least <= number <= most:  # True and False are no numbers
            self.wrong(name)
        return number

    def seconds(self, name: str, most: float) -> float:
        """A time span."""
        seconds = self.record.get(name)
        if not (type(seconds) is int or type(seconds) is float) or not 0 <= seconds <= most:
            self.wrong(name)
        return float(seconds)

    def text(self, name: str, most: int) -> str:
        """A text of at most so many characters, all of which can be encoded."""
        return self.as_text(name, self.record.get(name), most)

    def as_text(self, name: str, text: object, most: int) -> str:
        """As `text`, for one found somewhere in the field `name`."""
        if type(text) is not str or len(text) > most or not _can_be_encoded(text):
            self.wrong(name)
        return text

    def flag(self, name: str) -> bool:
        """True or false; false if there is no such field."""
        flag = self.record.get(name, False)
        if type(flag) is not bool:
            self.wrong(name)
        return flag

    def as_node(self, name: str, node: object) -> str:
        """The name of a node, found somewhere in the field `name`."""
        if type(node) is not str or not NODE_NAME.fullmatch(node):
            self.wrong(name)
        return node

    def part(self, name: str) -> Fields:
        """A record inside of this one."""
        part = self.record.get(name)
        if type(part) is not dict:
            self.wrong(name)
        return Fields(self.key, part)


def _can_be_encoded(text: str) -> bool:
    try:
        os.fsencode(text)  # file names among them may be of bytes that are no UTF-8
    except UnicodeEncodeError:  # half of a pair, by an escape
        return False
    return True
