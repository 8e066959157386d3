"""What a node knows of one lock in the store: the head, the queue, its own wish.

Rules of this file
------------------
* Everything here was true at a known revision; older answers never replace newer knowledge
  (engine rule 4, protocol-traps 8). `head_at` and `wishes_at` say how new it is.
* Nothing here decides or sends: `lock` does. What must be looked at anew is only noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from dlmfs.engine.hearing import read_head, read_wish
from dlmfs.engine.queue import Pass, bury, grant_pass, ordered, place
from dlmfs.engine.records import Head, Mail, Member, Wish, settled
from dlmfs.model import Mode, compatible
from dlmfs.store.base import KeyValue, TxnResult

if TYPE_CHECKING:
    from dlmfs.engine.lockspace import Lockspace

NO_HEAD: Final = Head({})

Wanted = tuple[tuple[Mode, Mode, Mode], list[int]]
NOTHING: Final[Wanted] = ((Mode.NL, Mode.NL, Mode.NL), [])
"""Nobody else wishes for anything."""


class View:
    """See the rules at the head of the file.

    `wish` is our own one that stands in the queue, `vanished` one that was removed without a
    grant that we know of; `given_up` the revision of a grant that we are handing back; `had_ex` that of
    the last one under which a program here had the lock exclusively; `leaving` whether a commit that
    takes us out of the head, unasked, may have been applied; `mailed` whether our mail slot has to be
    emptied; `must_look` whether only a reading can tell more.
    """

    __slots__ = (
        "given_up",
        "had_ex",
        "head",
        "head_at",
        "head_revision",
        "leaving",
        "mailed",
        "must_look",
        "name",
        "space",
        "vanished",
        "wish",
        "wishes",
        "wishes_at",
    )

    def __init__(self, space: Lockspace, name: bytes) -> None:
        self.space = space
        self.name = name
        self.wishes: dict[str, Wish] = space.wishes.setdefault(name, {})
        self.wishes_at = space.revision
        self.head = NO_HEAD
        self.head_revision = 0  # 0: none, or not known: the first take guesses "none"
        self.head_at = -1
        self.given_up = 0
        self.had_ex = 0
        self.wish: Wish | None = None
        self.vanished: Wish | None = None
        self.leaving = False
        self.mailed = False
        self.must_look = False

    # -- learning -----------------------------------------------------------------------------

    def wish_put(self, wish: Wish, revision: int, *, asking: bool) -> None:
        """A put below w/<lock>/. Ones from before our last reading of the queue are known."""
        if revision <= self.wishes_at:
            return
        self.wishes[wish.node] = wish
        if wish.node == self.space.node and asking and self.wish is None:
            self.wish = wish

    def wish_gone(self, node: str, revision: int, *, busy: bool) -> None:
        """A deletion below w/<lock>/. `busy`: a transaction of ours is under way."""
        wish = self.wishes.get(node)
        if wish is None or wish.revision >= revision:
            return
        was_front = self.is_front()
        del self.wishes[node]
        if self.wish is None:
            return
        if node == self.space.node and self.wish.revision == wish.revision:
            if busy:
                # Our own commit may have granted or withdrawn it, with its answer still to come.
                self.must_look = True
            else:
                self.vanished, self.wish = self.wish, None
        elif not was_front and self.is_front():
            # The wish ahead of ours vanished. If it was withdrawn, no head changed and nobody
            # else will act (protocol-traps 2).
            self.must_look = True

    def mail(self, mail: Mail, revision: int, *, expecting: bool) -> None:
        """Somebody's commit granted our wish. A mismatch is from an older wish (trap 10)."""
        self.mailed = True
        if self.wish is None or mail.wish_revision != self.wish.revision:
            # Either old mail, or the answer that tells us of our wish is later than this notice.
            self.must_look |= expecting
        elif mail.head is None:
            # The wish has not vanished, and what we have been granted stands in the head alone.
            self.wish = None
            self.must_look = True
        elif revision > self.head_at:
            self.set_head(mail.head, revision, revision)

    def set_head(self, head: Head, mod_revision: int, at: int) -> None:
        self.head, self.head_revision, self.head_at = head, mod_revision, at

    def adopt(self, result: TxnResult, *, asking: bool) -> None:
        """Take over the reading of head and queue that stands at the end of an answer."""
        head, queue = result.responses[-2:]
        assert isinstance(queue, tuple)
        at = result.revision
        self.leaving = False
        if at >= self.head_at:
            if head is None:
                self.space.bad.good(self.space.keys.head(self.name))
                self.set_head(NO_HEAD, 0, at)
            else:
                assert isinstance(head, KeyValue)
                self.set_head(read_head(self.space, head), head.mod_revision, at)
        fresh = at >= max(self.wishes_at, self.space.revision)
        if fresh:
            self.wishes.clear()
            for kv in queue:
                assert isinstance(kv, KeyValue)
                wish = read_wish(self.space, kv)
                if wish is not None:
                    self.wishes[wish.node] = wish
            self.wishes_at = at
        mine = self.wishes.get(self.space.node)
        if mine is not None and asking:
            # Also if only the list after a gap tells of it: else we would file a second one.
            self.wish = mine
        elif self.wish is not None and (fresh or self._is_over(self.wish, queue, at)):
            self.vanished, self.wish = self.wish, None

    def _is_over(self, wish: Wish, queue: tuple[object, ...], at: int) -> bool:
        """Whether our wish is absent from a reading that is too old for the rest of the queue. Nobody
        else files it. The watch may have told us of its end, and of something else since."""
        key = self.space.keys.wish(self.name, wish.node)
        return wish.revision <= at and all(
            isinstance(kv, KeyValue) and kv.key != key for kv in queue
        )

    def committed(self, head: Head, granted: list[Wish], revision: int) -> None:
        """Our head change was applied at `revision`; its compares say what else was true then."""
        self.leaving = False
        if revision > self.head_at:
            self.set_head(settled(head, revision), revision, revision)
            self.mailed = False
        for wish in granted:
            known = self.wishes.get(wish.node)
            if known is not None and known.revision == wish.revision:
                del self.wishes[wish.node]
            if wish.node == self.space.node:
                self.wish = None
        self.wishes_at = max(self.wishes_at, revision)

    def withdrawn(self, wish: Wish) -> None:
        """Our wish is out of the queue by our own hand."""
        self.wish = None
        if self.wishes.get(wish.node) == wish:
            del self.wishes[wish.node]

    # -- questions ----------------------------------------------------------------------------

    def is_dead(self, node: str, incarnation: int) -> bool:
        """As the domain says; and an incarnation is over when a later one of its node wishes here,
        which the watch may tell before it tells of the membership."""
        wish = self.wishes.get(node)
        later = wish is not None and wish.incarnation > incarnation
        return self.space.is_dead(node, incarnation, surely=later)

    def mine(self) -> Member | None:
        """Our place in the head. An older incarnation of ours is a dead stranger (rule 14)."""
        return self._own(self.head)

    def _own(self, head: Head) -> Member | None:
        member = head.members.get(self.space.node)
        if member is None or member.incarnation != self.space.incarnation:
            return None
        return member

    def at_level(self, level: Mode) -> Head:
        """The head without the dead, and with this node brought down to `level`."""
        head = bury(self.head, self.is_dead)
        mine = self._own(head)
        if mine is None or mine.level <= level:
            return head
        head = self.marked(head)
        members = dict(head.members)
        members[self.space.node] = mine._replace(level=level)
        return head._replace(members=members)

    def marked(self, head: Head) -> Head:
        """The head, whose mark of a death is seen if a program here has had the lock exclusively since.
        The dead one's grant excludes ours: if ours is later, it came after the death was known."""
        mark, mine = head.abandoned, self._own(head)
        if mark is None or mine is None or mine.level is not Mode.EX or self.had_ex < mark.revision:
            return head
        return head._replace(abandoned=mark._replace(seen=True))

    def others(self) -> list[Wish]:
        """The other nodes' wishes, in their order."""
        return [w for w in ordered(self.wishes.values()) if w.node != self.space.node]

    def wanted(self) -> Wanted:
        """What the others wish for: the first, the strongest, the strongest trylock; and which wishes:
        each trylock needs an answer of its own, and each other has its place in the order."""
        others = self.others()
        waiting = [w.mode for w in others if not w.trying]
        trying = [w for w in others if w.trying]
        modes = (
            waiting[0] if waiting else Mode.NL,
            max(waiting, default=Mode.NL),
            max((w.mode for w in trying), default=Mode.NL),
        )
        return modes, [w.revision for w in others]

    def ahead(self) -> Iterator[Wish]:
        """The others' wishes before ours, in no order; all of them while we have none."""
        # Not sorted: hundreds may wait, and this is asked whenever one of them goes.
        mine = None if self.wish is None else self.wishes.get(self.space.node)
        for wish in self.wishes.values():
            if wish.node != self.space.node and (mine is None or place(wish) < place(mine)):
                yield wish

    def conflict_ahead(self, mode: Mode) -> bool:
        """Whether a trylock of `mode` would have to wait behind somebody (rule 10)."""
        return any(not w.trying and not compatible(w.mode, mode) for w in self.ahead())

    def later_conversion(self) -> bool:
        """Whether our wish is a conversion and another's came before it (rule 9)."""
        wish = self.wish
        if wish is None or not wish.convert:
            return False
        return any(w.convert and not w.trying and w.revision < wish.revision for w in self.ahead())

    def is_front(self) -> bool:
        """Whether our wish is the first that could act: nobody ahead of it but trylocks."""
        return self.wish is not None and not any(not w.trying for w in self.ahead())

    def front_of_dead(self) -> bool:
        """Whether the first waiter, we, sees a dead member in the head. It is buried even if others are
        in our way: they may not have heard of the death, hand over to nobody for the dead one's
        sake, and never look again, as we have heard of it before we came."""
        return self.is_front() and bury(self.head, self.is_dead) is not self.head

    def grant_pass(self, head: Head, wishes: Iterable[Wish] | None = None) -> Pass:
        """What one commit that starts from `head` would grant of all wishes, or of these."""
        wishes = self.wishes.values() if wishes is None else wishes
        return grant_pass(head, wishes, self.space.grants_max)

    def grantable(self, level: Mode) -> bool:
        """Whether a grant pass now, with us at `level`, would serve our own wish."""
        granted = self.grant_pass(self.at_level(level)).granted
        return any(w.node == self.space.node for w in granted)

    def surplus_wanted(self, level: Mode) -> bool:
        """Whether the head has us above `level` and somebody wishes for it."""
        mine = self.mine() if self.wishes else None
        return (
            mine is not None
            and mine.level > level
            and any(
                w.node != self.space.node and not compatible(w.mode, mine.level)
                for w in self.wishes.values()
            )
        )
