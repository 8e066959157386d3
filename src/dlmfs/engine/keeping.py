"""A value lives as long as a node has the lock's file (engine rule 15): places for files only made.

    f/<node>   this node has files of locks in whose heads it has no place, and hears of first values
    v/<node>   the locks whose first value the node's last such commit wrote; put only if f/ has a key

Who opens a lock has a place in its head from then on. A file that is only made (touch, a refused
trylock) gets one at NL here, in the background, once the lock has a value.

Rules of this file
------------------
* Nobody waits for anything here, and where there is no value no key is made for a lock.
* f/<me> is put before, or with, the first look at any head. So whoever writes a first value after that
  look sees it, and says so: a value is either seen by the look or told by the watch.
* One look at a time, at many heads at once; places are joined through `sender`, many in a commit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from dlmfs.core.events import Phase
from dlmfs.engine import changes, granting
from dlmfs.engine.queue import bury, fits
from dlmfs.engine.records import decode_head, decode_news
from dlmfs.errors import BadState, DlmfsError, OutcomeUnknown, Unavailable
from dlmfs.model import EMPTY_LVB, Mode
from dlmfs.store.base import Get, KeyValue, Op, Put, Txn, TxnResult, created_at

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.engine.lockspace import Lockspace
    from dlmfs.timing import Timer

DELAY_S: Final = 0.25
"""From the making of a file until it is looked after: most are opened by then and need nothing."""
RETRY_S: Final = 0.25
PASSED_MAX: Final = 1000
"""Files that need nothing, passed over in one turn of the loop."""


class Files:
    """The files of one domain at this node; see the rules at the head of the file."""

    def __init__(self, space: Lockspace) -> None:
        self._space = space
        self._due: dict[bytes, None] = {}
        """To be looked after."""
        self._without: set[bytes] = set()
        """Looked after: their locks had no value."""
        self._timer: Timer | None = None
        self._looking = False
        self._announced = False
        """f/<me> stands."""

    def made(self, names: Iterable[bytes]) -> None:
        """The node has these locks' files, and perhaps nothing else of them."""
        if not self._space.live:
            return  # the next membership is told of all files (`rejoined`)
        self._due.update(dict.fromkeys(names))
        self._soon(DELAY_S)

    def is_without(self, name: bytes) -> bool:
        """Whether that file was looked after, and its lock had no value."""
        return name in self._without

    def gone(self, name: bytes) -> None:
        """The file was unlinked."""
        self._due.pop(name, None)
        self._without.discard(name)

    def told(self, kv: KeyValue) -> None:
        """Somebody wrote first values."""
        try:
            names = decode_news(kv)
        except BadState as error:  # as if it were about all of them
            self._space.bad.note(kv.key, error)
            self.look_again()
            return
        self._space.bad.good(kv.key)
        self._again(name for name in names if name in self._without)

    def look_again(self) -> None:
        """News may have been missed."""
        self._again(list(self._without))

    def stop(self) -> None:
        """The membership is over, or is being given back: if that comes to nothing, it goes on with what
        is made then."""
        self._due.clear()
        self._without.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self, names: Iterable[bytes]) -> None:
        for name in names:
            self._without.discard(name)
            self._due[name] = None
        self._soon(0.0)

    def _soon(self, delay: float) -> None:
        if self._due and self._timer is None and not self._looking:
            self._timer = self._space.loop.call_later(delay, self._space.enter, self._look)

    # -- looking ------------------------------------------------------------------------------

    def _look(self) -> None:
        self._timer = None
        space = self._space
        if not space.running:
            self._soon(RETRY_S)
            return
        names = self._next()
        if not names:
            self._soon(0.0)
            return
        keys = space.keys
        here = () if self._announced else (Put(keys.my_files, b"", space.lease),)
        looks: tuple[Op, ...] = tuple(Get(keys.head(name)) for name in names)
        self._looking = True
        mine = created_at(keys.mine, space.incarnation)
        space.commit(Txn((mine,), (*looks, *here)), lambda result: self._looked(names, result))

    def _next(self) -> list[bytes]:
        """Some of those that are due, and have no place yet."""
        space = self._space
        most = space.store.bounds.operations - changes.AROUND - 1
        names: list[bytes] = []
        for name in list(self._due)[:PASSED_MAX]:
            lock = space.locks.get(name)
            if lock is not None and lock.view.mine() is not None:
                del self._due[name]
            else:
                names.append(name)
                if len(names) == most:
                    break
        return names

    def _looked(self, names: list[bytes], result: TxnResult | DlmfsError) -> None:
        self._looking = False
        if isinstance(result, TxnResult) and result.succeeded:
            self._announced = True
            for name, kv in zip(names, result.responses, strict=False):
                assert kv is None or isinstance(kv, KeyValue)
                self._found(name, kv, result.revision)
            self._soon(0.0)
        elif isinstance(result, OutcomeUnknown | Unavailable):
            self._soon(RETRY_S)
        # Else the membership is over, and what is to be done about that is not decided here.

    def _found(self, name: bytes, kv: KeyValue | None, at: int) -> None:
        if name not in self._due:
            return  # unlinked meanwhile
        del self._due[name]
        self._without.add(name)
        if kv is None or not _has_value(kv):
            return
        lock = self._space.lock(name)
        lock.enter(_keep, lock, kv, at)


def _has_value(kv: KeyValue) -> bool:
    try:
        return decode_head(kv).lvb != EMPTY_LVB
    except BadState:
        return False  # told to whoever opens the lock


def _keep(lock: ClusterLock, kv: KeyValue, at: int) -> None:
    """A head with a value was found in which the node had no place."""
    view = lock.view
    lock.keeps = True
    if lock.idle and lock.res.phase is Phase.IDLE and at >= view.head_at:
        view.set_head(decode_head(kv), kv.mod_revision, at)
    else:
        # What is under way here rests on head and queue as they were together.
        view.must_look = True
    lock.resume()


def join(lock: ClusterLock) -> bool:
    """Take a place in the head at NL, if there is still a value to be kept. False: nothing was sent."""
    view, space = lock.view, lock.space
    if view.mine() is not None or lock.forgets or view.head.lvb == EMPTY_LVB:
        lock.keeps = False
        return False
    members = bury(view.head, view.is_dead).members
    if not fits(members, space.node, space.incarnation, Mode.NL):
        return False  # our former self, whose death is not over; the end of that brings us back
    granting.send(lock, changes.join(view))
    return True
