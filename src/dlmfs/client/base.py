"""What a lock of the library is, waiting left out: the same for threads and for asyncio."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import NamedTuple, Self

from dlmfs.client import logic
from dlmfs.client.keeper import Event, Keeper
from dlmfs.client.place import AnyPath, Place, place
from dlmfs.errors import DlmfsError, LockLost, NotGranted, TimedOut, Unavailable, UsageError

ENDS_WITHIN_S = 1.0
"""How long the end of a wait that was given up is awaited. Only a stopped daemon leaves one longer:
nothing will be held, and the thread ends when the daemon goes on."""

_beginning = threading.RLock()
"""Of two that acquire one object at once, one must be refused."""


def _forked() -> None:
    global _beginning  # noqa: PLW0603 - another thread of the parent may have it
    _beginning = threading.RLock()


os.register_at_fork(after_in_child=_forked)


class Doors(NamedTuple):
    """The ways from a lock to its mount, for those who put something else in its place
    (`dlmfs.testing`): `place.place`, `Keeper`, and getxattr(2) of a path and a name."""

    place: Callable[[AnyPath, AnyPath | None], Place]
    keeper: Callable[[logic.Request, Callable[[], object], Event], Keeper]
    attribute: Callable[[str, str], bytes]


doors = Doors(place, Keeper, os.getxattr)


class BaseLock:
    """One lock resource, held or not. Each object holds it once: threads and tasks that are to
    exclude each other have one each."""

    def __init__(
        self,
        path: AnyPath,
        *,
        shared: bool = False,
        timeout: float | None = None,
        create: bool = True,
        mount: AnyPath | None = None,
        on_notice: Callable[[], object] | None = None,
    ) -> None:
        """Nothing is opened yet.

        `path`: DOMAIN/LOCK below the mount, which is found by itself, or an absolute path.
        `shared`: with others who hold it shared; else alone, which a write of the value needs.
        `timeout`: seconds that `acquire` waits unless told otherwise; 0: not at all; None or -1: without
        end.
        `create`: make domain and lock where they are missing on this node.
        `mount`: where there are several (else $DLMFS_MOUNT, else the only one).
        `on_notice`: called when somebody else waits for the lock that is held.

        Raises UsageError for what is no lock's path. Where no dlmfs is mounted, that is said by
        `acquire`: a lock may be made, or decorate a function, before there is a mount.
        """
        self._given = (path, mount)
        self._place: Place | None = None
        self.is_shared = shared
        self.timeout = seconds(timeout)
        self.create = create
        self.on_notice = on_notice
        self._keeper: Keeper | None = None
        self._is_held = False
        with contextlib.suppress(Unavailable):
            self._place = doors.place(path, mount)
        self._prepare()

    def another(self, *, shared: bool | None = None) -> Self:
        """An object of the same kind for the same lock, with the same settings but for `shared`."""
        path, mount = self._given
        return type(self)(
            path,
            shared=self.is_shared if shared is None else shared,
            timeout=self.timeout,
            create=self.create,
            mount=mount,
            on_notice=self.on_notice,
        )

    def _prepare(self) -> None:
        """What only the one kind has."""

    def __repr__(self) -> str:
        mode = "shared" if self.is_shared else "exclusive"
        state = "held" if self.held else "lost" if self._is_held else "not held"
        where = self._place.path if self._place is not None else os.fsdecode(self._given[0])
        return f"<{type(self).__name__} {where} {mode}, {state}>"

    def __del__(self) -> None:
        keeper = getattr(self, "_keeper", None)
        if keeper is not None:
            keeper.give_up()
            keeper.release()

    @property
    def path(self) -> str:
        """The lock's file. Raises Unavailable where no dlmfs is mounted."""
        return self.place.path

    @property
    def place(self) -> Place:
        """Where it lies; as `path`."""
        if self._place is None:
            self._place = doors.place(*self._given)
        return self._place

    @property
    def held(self) -> bool:
        """Whether this object has the lock: acquired, and neither released nor lost."""
        keeper = self._keeper
        if keeper is None or not self._is_held:
            return False
        return keeper.has_it and keeper.process == os.getpid()

    @property
    def token(self) -> int:
        """The fencing token: larger than that of every earlier conflicting grant of this lock.

        Under holder=node the node is the holder, and programs on it that have the lock one after the
        other may be given the same token. Raises UsageError if the lock was not acquired."""
        return self._kept().token

    def check(self) -> None:
        """Raises LockLost if the lock was lost, UsageError if it was not acquired. It asks nobody:
        what is known here came from the node by notice."""
        self._lost_by(self._kept())

    def fileno(self) -> int:
        """The open file, as for poll(2), or to be inherited. It stays the library's to close."""
        with self._kept().using() as fd:
            return fd

    def release(self) -> None:
        """Drop the lock. Raises UsageError if it was not acquired; nothing if it was lost."""
        self._end(self._kept())

    def _holders(self) -> list[logic.Holder]:
        path = self.path
        try:
            return logic.holders(doors.attribute(path, logic.HOLDERS))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return []
            raise logic.refusal(error, path) from None

    def cancel(self) -> None:
        """End another thread's or task's `acquire`, which raises Cancelled; no effect without one."""
        keeper = self._keeper
        if keeper is not None and not self._is_held:
            keeper.give_up()

    # -- for the two kinds ---------------------------------------------------------------------

    def _kept(self) -> Keeper:
        if self._keeper is None or not self._is_held:
            raise UsageError(f"{self.path} was not acquired")
        return self._keeper

    def _lost_by(self, keeper: Keeper) -> None:
        if keeper.process != os.getpid():
            raise LockLost(f"{self.path} is held by the process that this one was forked from")
        if keeper.is_lost:
            raise LockLost(f"{self.path} was lost: stop what it protects")

    def _new(self, trying: bool, told: Callable[[], object], event: Event) -> Keeper:
        """A keeper that is nobody's yet. Whoever makes one also ends it, and no other's: an object
        that is acquired twice by mistake must not lose what it has."""
        where = doors.place(*self._given)  # anew: it may have been mounted again
        return doors.keeper(logic.Request(where, self.is_shared, trying, self.create), told, event)

    def _begin(self, keeper: Keeper) -> None:
        """From here on it is this object's. Raises UsageError if there is another."""
        with _beginning:
            other = self._keeper
            if other is not None and other.process == os.getpid() and not other.is_over:
                what = "held" if self._is_held else "waited for"
                raise UsageError(f"{self.path} is {what} by this object: make one for each holder")
            self._place = keeper.request.place
            self._is_held = False
            self._keeper = keeper

    def _end(self, keeper: Keeper) -> None:
        """Drop what this keeper holds or awaits."""
        keeper.give_up()
        keeper.release()
        keeper.leave()
        if self._keeper is keeper:
            self._keeper = None
            self._is_held = False

    def _limit(self, blocking: bool, timeout: float | None) -> float | None:
        """How many seconds `acquire` waits at most; None: without end. Raises UsageError."""
        return limit(blocking, timeout, self.timeout)

    def _late(self, keeper: Keeper, limit: float) -> DlmfsError:
        """What it means that the wait was not over in time."""
        if trouble := keeper.trouble:
            return Unavailable(f"{trouble}, and was not back within {limit:g} s")
        return TimedOut(f"{self.path} could not be had within {limit:g} s")

    def _not_had(self, keeper: Keeper, error: NotGranted, *, raises: bool) -> bool:
        """What it means that it could not be had at once: False, if that is not to be raised."""
        if trouble := keeper.trouble:  # who came before waits for the node, not for a holder
            raise Unavailable(f"{trouble}, and was not to be waited for") from None
        if raises:
            raise TimedOut(f"{error}, and was not to be waited for") from None
        return False


def limit(blocking: bool, timeout: float | None, otherwise: float | None) -> float | None:
    """How many seconds `acquire(blocking, timeout)` waits at most, `otherwise` if it does not say; None:
    without end. Raises UsageError."""
    if not isinstance(blocking, bool):
        raise UsageError(f"acquire({blocking!r}): name it, acquire(timeout={blocking!r})")
    if blocking:
        return otherwise if timeout is None else seconds(timeout)
    if timeout is not None and timeout != -1:
        raise UsageError("blocking=False does not wait: it goes with no timeout")
    return 0


def seconds(timeout: float | None) -> float | None:
    """A time-out as threading has them: -1 and None are none. Raises UsageError."""
    if timeout is None or timeout == -1:
        return None
    if not timeout >= 0:
        raise UsageError(
            f"a timeout is seconds, 0 for none at all, -1 or None for no end; not {timeout}"
        )
    return timeout


def settled(keeper: Keeper) -> None:
    """Raises what the wait came to, if not to a grant."""
    if keeper.error is not None:
        raise keeper.error
