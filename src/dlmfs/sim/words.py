"""Commits in words, for the history of a run."""

from __future__ import annotations

from dlmfs.engine.inspection import inspect
from dlmfs.engine.records import DOMAINS, decode_head, decode_wish
from dlmfs.errors import BadState
from dlmfs.model import EMPTY_LVB
from dlmfs.store.base import Event


def commit(events: tuple[Event, ...]) -> str:
    """What a commit changed."""
    return "; ".join(_change(event) for event in events)


def _change(event: Event) -> str:
    key, put = event.kv.key, event.kind == "put"
    if put:
        try:
            inspect(event.kv)
        except BadState:
            return f"{key!r} is garbage"
    if key.startswith(b"h/"):
        name = key[2:].decode(errors="replace")
        return f"{name} = {_head(event)}" if put else f"{name} is no more"
    if not key.startswith(DOMAINS) or key.count(b"/") != (3 if key.split(b"/")[2] == b"m" else 4):
        return f"{key.decode(errors='replace')}{'' if put else ' is gone'}"
    domain, kind, rest = key[len(DOMAINS) :].decode(errors="replace").split("/", 2)
    if kind == "m":
        if not put:
            return f"{rest} is out of {domain}"
        joined = event.kv.create_revision == event.kv.mod_revision
        return f"{rest} joins {domain}" if joined else f"{rest} has a new epoch in {domain}"
    if kind == "w":
        name, node = rest.split("/")
        if not put:
            return f"no wish of {node} for {domain}/{name} any more"
        wish = decode_wish(event.kv, node)
        flags = (" try" if wish.trying else "") + (" convert" if wish.convert else "")
        return f"{node} wishes {wish.mode.name}{flags} of {domain}/{name}"
    if kind in ("f", "v"):
        tells = "has files without places in" if kind == "f" else "tells of first values in"
        return f"{rest} {tells} {domain}" if put else f"{rest} tells nothing in {domain}"
    node, name = rest.split("/")
    return f"mail to {node} about {domain}/{name}" if put else f"{node} took its mail"


def _head(event: Event) -> str:
    head = decode_head(event.kv)
    members = " ".join(
        f"{node}:{member.level.name}" + (f"@{member.revision}" if member.level else "")
        for node, member in head.members.items()
    )
    value = "" if head.lvb == EMPTY_LVB else f" value {head.lvb.rstrip(bytes(1))!r}"
    mark = f" abandoned by {head.abandoned.node}" if head.abandoned is not None else ""
    return f"[{members}]{value}{mark}"
