"""How a lock is taken and what the mount's answers mean: no system call, no thread, no clock.

`taking` says one step at a time what is to be done; whoever drives it (a keeper's thread, the
command `dlmfs lock`, a test) does it and tells the result, or throws what went wrong.

Rules of this file
------------------
* The open comes first, then flock(2) on the open file. The open is in the cluster's queue; an open
  that comes after another node's wish waits behind it, so a row of local users, which flock(2)
  puts in order, cannot keep other nodes out.
* A file that was opened is closed on every way out but the last.
* Who waits goes on trying while the node cannot serve and is coming back (fenced, rejoining); who
  would not wait is refused. Nothing is held then, so nothing can be lost.
* A file that is missing is made apart from the open, never by O_CREAT: that is refused for another user's
  file in a folder with the sticky bit (sysctl fs.protected_regular), which is there to be shared.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import stat
from collections.abc import Callable, Generator
from typing import Any, Final, NamedTuple

from dlmfs.client.place import Place
from dlmfs.errors import (
    Deadlock,
    DlmfsError,
    LockLost,
    NotGranted,
    NotPermitted,
    StoreFull,
    Unavailable,
    UsageError,
)

RETRIES: Final = 8
"""Opens that raced with an unlink, or met a lost file's old inode, in a row."""

PAUSES_S: Final = (0.1, 0.2, 0.4, 0.8, 1.0)
"""How long to leave a node alone that cannot serve; later, as long as the last. A look costs it about
as much as a stat(2), so that a thousand who wait are no burden."""
REFUSALS: Final = 20
"""In a row, by a node that says that it serves: then it is this lock's own trouble, and is told. A domain
that is joined again takes its holders' grace, and a new member's first join 5 s."""

MODE: Final = stat.S_IFREG | stat.S_ISVTX | 0o666
"""Of a lock's file that is made to be opened: a transient one, which goes when nobody uses it, and is as
open as its domain, whatever this process's umask."""

TOKEN: Final = "user.dlmfs.token"  # noqa: S105 - an attribute's name
ABANDONED: Final = "user.dlmfs.abandoned"
WAITERS: Final = "user.dlmfs.waiters"
HOLDERS: Final = "user.dlmfs.holders"
STATE: Final = "user.dlmfs.state"
AWAY: Final = ("FENCED", "REJOINING")
"""States in which every open is refused."""
FINAL: Final = "FENCED for good"
"""... and of a node that does not come back: evicted, or its state is gone."""
PASSES: Final = frozenset({errno.ENOLCK, errno.EIO})
"""What a call answers that fell into a fence, or a domain's loss. Of EIO nothing was granted, either."""

GONE: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.ENXIO})
"""What calls on a mount answer when its daemon has ended."""


class Request(NamedTuple):
    """What is asked for. `trying`: at once or not at all. `create`: make domain and lock's file."""

    place: Place
    shared: bool = False
    trying: bool = False
    create: bool = True

    @property
    def flags(self) -> int:
        """Of open(2). A program that is executed must not inherit the lock by accident."""
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.shared else os.O_RDWR)
        return flags | (os.O_NONBLOCK if self.trying else 0)


class Open(NamedTuple):
    """open(2); tell the descriptor."""

    path: str
    flags: int


class MakeLock(NamedTuple):
    """mknod(2) with the mode MODE; tell anything. EEXIST is no error."""

    path: str


class MakeDomain(NamedTuple):
    """mkdir(2); tell anything. EEXIST is no error."""

    path: str


class Device(NamedTuple):
    """fstat(2); tell st_dev."""

    fd: int


class Exclude(NamedTuple):
    """flock(2); tell anything."""

    fd: int
    operation: int


class Token(NamedTuple):
    """Read the token of what was granted, and keep it; tell anything. EIO: it is lost already."""

    fd: int


class Close(NamedTuple):
    """close(2); tell anything."""

    fd: int


class Pause(NamedTuple):
    """Wait about so many seconds, not all who wait for the same time; tell anything. `why`: what is
    waited for; empty: no more, now it is asked again."""

    seconds: float
    why: str


class State(NamedTuple):
    """Tell the node's state, in the words of the mount's attribute."""

    mountpoint: str


class Waiters(NamedTuple):
    """Tell how many wait for the lock, as far as this node knows; 0 if it is not told."""

    path: str


Step = Open | MakeLock | MakeDomain | Device | Exclude | Token | Close | Pause | State | Waiters
Steps = Generator[Step, Any, int]


class _Passing(Exception):
    """The node cannot serve now, and may soon."""

    def __init__(self, refusal: DlmfsError) -> None:
        self.refusal = refusal


def taking(request: Request) -> Steps:
    """Take the lock; gives the open file. Raises what `refusal` says."""
    refused = 0
    while True:
        try:
            return (yield from _once(request))
        except _Passing as passing:
            if request.trying or refused == REFUSALS:
                raise passing.refusal from None
            refused = yield from _coming_back(request.place, str(passing.refusal), refused)


def _coming_back(place: Place, why: str, refused: int) -> Generator[Step, Any, int]:
    """Wait until the node may serve; gives how often in a row it has refused though it does."""
    serves = True
    for number in itertools.count(refused):
        pause_s = PAUSES_S[min(number, len(PAUSES_S) - 1)]
        state = yield from _looking(place)
        if state.startswith(FINAL):
            raise Unavailable(f"{place.path} cannot be had: the node is {state}: mount it again")
        if not state.startswith(AWAY):
            break
        serves = False
        yield Pause(pause_s, f"{place.path}: the node is {state}")
    if serves:
        yield Pause(pause_s, why)
    yield Pause(0, "")
    return refused + 1 if serves else 0


def _looking(place: Place) -> Generator[Step, Any, str]:
    """The node's state; empty if we may not know: the folder of the mount may only be gone through."""
    try:
        state: str = yield State(place.mountpoint)
    except OSError as error:
        if error.errno == errno.EACCES:
            return ""
        if error.errno in GONE:
            raise refusal(error, place.path) from None
        raise _unmounted(place) from None
    return state


def _once(request: Request) -> Steps:
    place = request.place
    fd = yield from _opening(request)
    try:
        try:
            dev = yield Device(fd)
        except OSError as error:
            raise _refused(error, place.path) from None
        if f"{os.major(dev)}:{os.minor(dev)}" != place.dev:
            raise _unmounted(place)
        operation = fcntl.LOCK_SH if request.shared else fcntl.LOCK_EX
        try:
            yield Exclude(fd, operation | (fcntl.LOCK_NB if request.trying else 0))
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise NotGranted(f"{place.path} is in use on this node") from None
            raise _refused(error, place.path) from None
        try:
            yield Token(fd)
        except OSError as error:
            raise _refused(error, place.path) from None
    except BaseException:
        yield Close(fd)
        raise
    return fd


def _unmounted(place: Place) -> Unavailable:
    return Unavailable(f"{place.mountpoint} was unmounted just now: mount it again")


def _opening(request: Request) -> Steps:
    path = request.place.path
    for attempt in range(RETRIES + 1):
        try:
            fd: int = yield Open(path, request.flags)
            return fd
        except OSError as error:
            if error.errno == errno.ENOENT and request.create and attempt < RETRIES:
                yield from _making(path)
            elif error.errno == errno.EDQUOT and (waiting := (yield Waiters(path))):
                raise Unavailable(
                    f"{path} cannot be had: {waiting} wait for it here, and this user may have no more "
                    f"(max_lock_waiters): `dlmfs why {path}` says for whom; end that, or some of them"
                ) from None
            elif error.errno not in (errno.EAGAIN, errno.ESTALE) or attempt == RETRIES:
                raise _refused(error, path) from None
    raise AssertionError("the last attempt returns or raises")


def _making(path: str) -> Generator[Step, Any, None]:
    """Make the lock's file, and its domain before if need be; another one may do the same."""
    try:
        yield MakeLock(path)
    except OSError as error:
        if error.errno == errno.ENOENT:
            yield from _joining(os.path.dirname(path))
        elif error.errno != errno.EEXIST:
            raise _refused(error, path) from None


def _joining(folder: str) -> Generator[Step, Any, None]:
    try:
        yield MakeDomain(folder)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise _refused(error, folder) from None


def _refused(error: OSError, path: str) -> DlmfsError | _Passing:
    reason = refusal(error, path)
    return _Passing(reason) if error.errno in PASSES else reason


def drive(steps: Steps, do: Callable[[Step], object]) -> int:
    """Do step after step until the lock's file is open; gives its descriptor."""
    try:
        step = next(steps)
        while True:
            try:
                told = do(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(told)
    except StopIteration as end:
        fd = end.value
        assert isinstance(fd, int)
        return fd


NOT_HIS: Final = "may not be used by this user: see its mode and owner, and docs/users.md"
_REFUSALS: Final[dict[int, tuple[type[DlmfsError], str]]] = {
    errno.ETXTBSY: (NotGranted, "is in use"),
    errno.EDEADLK: (
        Deadlock,
        "is held shared here, and another node's process that holds it shared asked before",
    ),
    errno.EINVAL: (
        UsageError,
        "cannot be opened so: no such name or flag is possible",
    ),
    errno.ENAMETOOLONG: (UsageError, "is too long: a name has up to 255 bytes, a domain's 63"),
    errno.ENOENT: (UsageError, "does not exist"),
    errno.EISDIR: (UsageError, "is not a lock but a domain"),
    errno.ENOTDIR: (UsageError, "is not in a domain"),
    errno.ENOTEMPTY: (NotGranted, "has lock files in it"),
    errno.EBUSY: (NotGranted, "is in use on this node"),
    errno.EACCES: (NotPermitted, NOT_HIS),
    errno.EPERM: (NotPermitted, NOT_HIS),
    errno.EROFS: (NotPermitted, "is mounted read-only"),
    errno.ENOLCK: (
        Unavailable,
        "cannot be had: the node is fenced, or the store does not answer (`dlmfs status` says why)",
    ),
    errno.EIO: (
        Unavailable,
        "cannot be had: it was lost in the same instant, or by a fault (`dlmfs status` says why)",
    ),
    errno.EAGAIN: (Unavailable, "cannot be had: a limit of the mount is reached (`dlmfs status`)"),
    errno.EDQUOT: (Unavailable, "cannot be had: this user's share of a limit is used up"),
    errno.ENOSPC: (StoreFull, "cannot be made: the state is full (`dlmfs status`)"),
    errno.EMFILE: (Unavailable, "cannot be opened: this process has too many open files"),
}


def refusal(error: OSError, path: str) -> DlmfsError:
    """The exception for a call that failed, about what is not held (docs/reference.md, "Errors")."""
    code = error.errno or errno.EIO
    if code in _REFUSALS:
        kind, words = _REFUSALS[code]
        return kind(f"{path} {words}")
    if code in GONE:
        return Unavailable(f"{path}: its mount's daemon is gone: `dlmfs mount` it again")
    return Unavailable(f"{path}: {os.strerror(code)}")


def failure(error: OSError, path: str) -> DlmfsError:
    """The exception for a call that failed on the open file of a lock that was held."""
    code = error.errno or errno.EIO
    if code in GONE or code == errno.EIO:
        return LockLost(f"{path} was lost: stop what it protects (`dlmfs status` says why)")
    if code == errno.EBADF:
        return UsageError(f"{path} is held shared: its value can only be read")
    return refusal(error, path)


def is_lost(events: int) -> bool:
    """Whether poll(2) or epoll(7) said that the lock is gone for good."""
    return bool(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL))


def is_wanted(events: int) -> bool:
    """Whether it said that somebody else waits for the lock."""
    return bool(events & select.POLLIN)


def padded(value: bytes) -> bytes:
    """A whole value. Raises UsageError if it is too long."""
    from dlmfs.model import LVB_SIZE

    if not isinstance(value, bytes | bytearray | memoryview):
        raise UsageError(f"a value is bytes, not {type(value).__name__} (text: TEXT.encode())")
    if len(value) > LVB_SIZE:
        raise UsageError(f"a value has {LVB_SIZE} bytes, not {len(value)}")
    return bytes(value).ljust(LVB_SIZE, b"\0")


def stripped(value: bytes) -> bytes:
    """The value without its padding; `padded` restores it."""
    return value.rstrip(b"\0")


class Abandoned(NamedTuple):
    """Who died while it had the lock exclusively, and with which token."""

    node: str
    token: int


def abandonment(text: bytes) -> Abandoned | None:
    """The mark as user.dlmfs.abandoned tells it."""
    if not text:
        return None
    import json

    mark = json.loads(text)
    return Abandoned(str(mark["node"]), int(mark["token"]))


class Holder(NamedTuple):
    """A program of this node that has the lock. `mode` is EX or PR; `pid` the thread that opened it, 0 if
    this host keeps it from us; `command` its name."""

    node: str
    mode: str
    pid: int
    command: str


def holders(text: bytes) -> list[Holder]:
    """The holders as user.dlmfs.holders tells them."""
    import json

    rows = (row for row in json.loads(text) if "more" not in row)
    return [Holder(row["node"], row["mode"], row["pid"], row["command"]) for row in rows]
