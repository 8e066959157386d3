"""libo2dlm's calls, with its error names, for programs that know that library.

As there: a context is a domain; a lock is named in it once; locks belong to the context, which is
for one thread at a time. Where it differs: `initialize` finds the mount by itself if it is given no
path (libo2dlm then means another lock manager), what is opened is not inherited by programs that
are started, and a waiting `lock` can be interrupted.

Errors are `O2dlmError`, whose `code` is the C library's number and name.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Any, Final

from dlmfs.client.place import AnyPath, find_mount
from dlmfs.errors import DlmfsError
from dlmfs.fuse import mountinfo

LOCK_ID_MAX_LEN: Final = 32
DOMAIN_MAX_LEN: Final = 255
"""Both with the zero byte at the end, which is C's."""
TRYLOCK: Final = 0x01
PATH_MAX: Final = 4096


class Level(enum.IntEnum):
    PRMODE = 0
    EXMODE = 1


PRMODE: Final = Level.PRMODE
EXMODE: Final = Level.EXMODE


class Code(enum.IntEnum):
    """The error table "o2dl", in the order of its header."""

    NO_MEMORY = -1485330944
    SERVICE_UNAVAILABLE = -1485330943
    INVALID_LOCK_NAME = -1485330942
    INVALID_LOCK_LEVEL = -1485330941
    INTERNAL_FAILURE = -1485330940
    NAME_TOO_LONG = -1485330939
    STATFS = -1485330938
    NO_FS_DIR = -1485330937
    NO_FS = -1485330936
    OPEN_DLM_DIR = -1485330935
    NO_DOMAIN_DIR = -1485330934
    BAD_DOMAIN_DIR = -1485330933
    BUSY_DOMAIN_DIR = -1485330932
    DOMAIN_DIR = -1485330931
    DOMAIN_DESTROY = -1485330930
    DOMAIN_CREATE = -1485330929
    RANDOM = -1485330928
    BUSY_LOCK = -1485330927
    OUTPUT_ERROR = -1485330926
    UNLINK = -1485330925
    UNKNOWN_LOCK = -1485330924
    RECURSIVE_LOCK = -1485330923
    LOCKING = -1485330922
    FAILED_UNLOCKS = -1485330921
    INVALID_ARGS = -1485330920
    TRYLOCK_FAILED = -1485330919
    LVB_READ = -1485330918
    LVB_WRITE = -1485330917
    SEEK = -1485330916
    DOMAIN_BUSY = -1485330915
    BAST_UNSUPPORTED = -1485330914
    LVB_INVALID = -1485330913


class O2dlmError(DlmfsError):
    """`code` says which; the cause, where a system call failed, is the exception's `__cause__`."""

    def __init__(self, code: Code, why: str = "") -> None:
        super().__init__(f"O2DLM_ET_{code.name}" + (f": {why}" if why else ""))
        self.code = code


class Context:
    """An open domain; made by `initialize`. Its fields are for this module."""

    def __init__(self, mount: str, domain: str, dev: str) -> None:
        self.mount = mount
        self.dev = dev
        self.path = f"{mount}/{domain}"
        self.locks: dict[str, int] = {}
        self.basts: dict[int, tuple[Callable[[Any], object], Any]] = {}
        self.is_with_bast: bool | None = None

    def __repr__(self) -> str:
        return f"<o2dlm context of {self.path}, {len(self.locks)} locks>"


@contextlib.contextmanager
def _named(code: Code, **other: Code) -> Iterator[None]:
    """A failed system call by the name that libo2dlm gives it; `other`: by errno's name."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        raise O2dlmError(other.get(name, code), os.strerror(error.errno or 0)) from error


def initialize(dlmfs_path: AnyPath | None, domain_name: str) -> Context:
    """Join the domain, whose folder is made if need be, and hold a hidden lock in it, so that nobody
    on this node leaves it. Without a path the mount is found (see `dlmfs.client.find_mount`).

    Raises O2dlmError (NAME_TOO_LONG, OPEN_DLM_DIR, NO_FS_DIR, NO_FS, BAD_DOMAIN_DIR, DOMAIN_CREATE,
    LOCKING); UsageError or Unavailable if there is not one mount to be found."""
    path = find_mount().mountpoint if dlmfs_path is None else os.fsdecode(dlmfs_path)
    if len(os.fsencode(path)) > PATH_MAX or len(os.fsencode(domain_name)) >= DOMAIN_MAX_LEN:
        raise O2dlmError(Code.NAME_TOO_LONG, path)
    with _named(Code.OPEN_DLM_DIR):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise O2dlmError(Code.NO_FS_DIR, path)
    finally:
        os.close(fd)
    entry = mountinfo.find(path)
    if entry is None:
        raise O2dlmError(Code.NO_FS, f"{path} is not on a dlmfs mount")
    context = Context(path.rstrip("/"), domain_name, entry.dev)
    _make_domain(context)
    hidden = f".{secrets.token_hex(8)}"
    with _named(Code.LOCKING):
        context.locks[hidden] = _open(context, hidden, os.O_RDONLY)
    return context


def _make_domain(context: Context) -> None:
    try:
        mode = os.stat(context.path).st_mode
    except FileNotFoundError:
        # As there, EEXIST is an error too: two initialize the domain at once.
        with _named(Code.DOMAIN_CREATE):
            os.mkdir(context.path, 0o755)
        return
    except OSError as error:
        # A name that no domain can have is noticed where it would be made.
        code = Code.DOMAIN_CREATE if error.errno == errno.ENAMETOOLONG else Code.BAD_DOMAIN_DIR
        raise O2dlmError(code, os.strerror(error.errno or 0)) from error
    if not stat.S_ISDIR(mode):
        raise O2dlmError(Code.BAD_DOMAIN_DIR, context.path)


def _open(context: Context, lock_id: str, flags: int) -> int:
    fd = os.open(f"{context.path}/{lock_id}", flags | os.O_CREAT | os.O_CLOEXEC, 0o664)
    dev = os.fstat(fd).st_dev
    if f"{os.major(dev)}:{os.minor(dev)}" != context.dev:
        # Below a mount that is gone there may be a folder of that name: its files lock nothing.
        os.close(fd)
        raise O2dlmError(Code.LOCKING, f"{context.mount} was unmounted or mounted anew: initialize")
    return fd


def lock(context: Context, lock_id: str, lock_flags: int, level: Level) -> None:
    """Take a lock; with TRYLOCK at once or not at all. Raises O2dlmError: INVALID_LOCK_NAME,
    INVALID_LOCK_LEVEL, RECURSIVE_LOCK (this context has it), TRYLOCK_FAILED, LOCKING."""
    if lock_id.startswith(".") or len(os.fsencode(lock_id)) >= LOCK_ID_MAX_LEN:
        raise O2dlmError(Code.INVALID_LOCK_NAME, repr(lock_id))
    if level not in (PRMODE, EXMODE):
        raise O2dlmError(Code.INVALID_LOCK_LEVEL, repr(level))
    if lock_id in context.locks:
        raise O2dlmError(Code.RECURSIVE_LOCK, lock_id)
    flags = os.O_RDONLY if level == PRMODE else os.O_RDWR
    busy = {}
    if lock_flags & TRYLOCK:
        flags |= os.O_NONBLOCK
        busy["ETXTBSY"] = Code.TRYLOCK_FAILED
    with _named(Code.LOCKING, **busy):
        context.locks[lock_id] = _open(context, lock_id, flags)


def lock_with_bast(  # noqa: PLR0917 - as in C
    context: Context,
    lock_id: str,
    lock_flags: int,
    level: Level,
    bast_func: Callable[[Any], object],
    bast_arg: Any = None,
) -> int:
    """As `lock`; gives the descriptor that poll(2) says POLLIN of when somebody else waits for the
    lock: then call `process_bast`. Raises as `lock`, and BAST_UNSUPPORTED."""
    if not supports_bast(context):
        raise O2dlmError(Code.BAST_UNSUPPORTED, context.mount)
    lock(context, lock_id, lock_flags, level)
    fd = context.locks[lock_id]
    context.basts[fd] = (bast_func, bast_arg)
    return fd


def process_bast(context: Context, poll_fd: int) -> None:
    """Call the lock's function, in this thread. Drops nothing itself."""
    func, arg = context.basts.get(poll_fd, (None, None))
    if func is not None:
        func(arg)


def unlock(context: Context, lock_id: str) -> None:
    """Drop a lock. Raises O2dlmError: UNKNOWN_LOCK."""
    fd = context.locks.pop(lock_id, None)
    if fd is None:
        raise O2dlmError(Code.UNKNOWN_LOCK, lock_id)
    context.basts.pop(fd, None)
    with contextlib.suppress(OSError):  # the lock is dropped in any case
        os.close(fd)


def drop_lock(context: Context, lock_id: str) -> None:
    """Forget a lock on this node. Raises O2dlmError: BUSY_LOCK (held, here or by another program of
    the node), UNLINK."""
    if lock_id in context.locks:
        raise O2dlmError(Code.BUSY_LOCK, lock_id)
    with _named(Code.UNLINK, EBUSY=Code.BUSY_LOCK):
        os.unlink(f"{context.path}/{lock_id}")


def read_lvb(context: Context, lock_id: str, length: int) -> bytes:
    """The first bytes of the lock's value. Raises O2dlmError: UNKNOWN_LOCK, LVB_READ, LVB_INVALID."""
    fd = _held(context, lock_id)
    with _named(Code.LVB_READ):
        value = os.pread(fd, length, 0)
    if not value:
        raise O2dlmError(Code.LVB_INVALID, lock_id)
    return value


def write_lvb(context: Context, lock_id: str, lvb: bytes) -> int:
    """Put bytes at the start of the lock's value; how many there was room for. Raises O2dlmError:
    UNKNOWN_LOCK, LVB_WRITE (held shared, or lost)."""
    fd = _held(context, lock_id)
    with _named(Code.LVB_WRITE):
        return os.pwrite(fd, lvb, 0)


def _held(context: Context, lock_id: str) -> int:
    fd = context.locks.get(lock_id)
    if fd is None:
        raise O2dlmError(Code.UNKNOWN_LOCK, lock_id)
    return fd


def destroy(context: Context) -> None:
    """Drop all locks, forget every lock of the domain that no program of this node has open, and
    leave the domain if that was all. Raises O2dlmError: DOMAIN_DIR, UNLINK, DOMAIN_DESTROY."""
    for lock_id in list(context.locks):
        unlock(context, lock_id)
    with _named(Code.DOMAIN_DIR):
        names = os.listdir(context.path)
    for name in names:
        try:
            os.unlink(f"{context.path}/{name}")
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise O2dlmError(Code.UNLINK, os.strerror(error.errno or 0)) from error
    try:
        os.rmdir(context.path)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise O2dlmError(Code.DOMAIN_DESTROY, os.strerror(error.errno or 0)) from error


def supports_bast(context: Context) -> bool:
    """Whether the mount tells of blocked requests. Asked once for each context."""
    if context.is_with_bast is None:
        with _named(Code.SERVICE_UNAVAILABLE):
            told = os.getxattr(context.mount, "user.dlmfs.capabilities")
        context.is_with_bast = b"bast" in told.split()
    return context.is_with_bast
