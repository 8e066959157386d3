"""Who is next: the order of wishes and the grant pass (design, engine rules 6, 9, 10). Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from dlmfs.engine.records import Abandoned, Head, Member, Wish
from dlmfs.model import Mode, compatible


def place(wish: Wish) -> tuple[bool, int]:
    """Its place in the queue: conversions first (protocol-traps 4), then by arrival."""
    return not wish.convert, wish.revision


def ordered(wishes: Iterable[Wish]) -> list[Wish]:
    """As they are served."""
    return sorted(wishes, key=place)


def bury(head: Head, dead: Callable[[str, int], bool]) -> Head:
    """The head without its dead members; one that died at EX is named as abandoner (promise 4)."""
    gone = [node for node, m in head.members.items() if dead(node, m.incarnation)]
    if not gone:
        return head
    abandoned = head.abandoned
    for node in gone:
        if head.members[node].level is Mode.EX:
            abandoned = Abandoned(node, head.members[node].revision)
    members = {node: m for node, m in head.members.items() if node not in gone}
    return Head(members, head.lvb, abandoned)


def fits(members: dict[str, Member], node: str, incarnation: int, mode: Mode) -> bool:
    """Whether that incarnation of `node` may have `mode` beside what the other members have. A former
    self that was not buried yet is in the way with whatever it has: a node has one place in a head,
    and to take it over would lose what the other's death has to tell (promise 4)."""
    own = members.get(node)
    if own is not None and own.incarnation != incarnation and own.level is not Mode.NL:
        return False
    return all(compatible(m.level, mode) for other, m in members.items() if other != node)


class Pass(NamedTuple):
    """`cut`: more could be granted than one commit may grant."""

    head: Head
    granted: list[Wish]
    cut: bool


def grant_pass(head: Head, wishes: Iterable[Wish], most: int) -> Pass:
    """Grant all leading compatible wishes, at most so many; stop at the first that must wait.

    A trylock that does not fit is stepped over: it never makes anybody wait.
    """
    members = dict(head.members)
    granted: list[Wish] = []
    cut = False
    for wish in ordered(wishes):
        if fits(members, wish.node, wish.incarnation, wish.mode):
            if len(granted) == most:
                cut = True
                break
            members[wish.node] = Member(wish.incarnation, wish.mode, 0)
            granted.append(wish)
        elif not wish.trying:
            break
    return Pass(head._replace(members=members), granted, cut)
