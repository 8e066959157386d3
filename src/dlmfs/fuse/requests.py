"""The codec of FUSE requests: bytes from the kernel to the arguments of a handler. Pure.

`parse_header` and `parse_body` raise `WireError`, and nothing else, for any bytes that are no
request. Structures are those of Linux `include/uapi/linux/fuse.h`, in the byte order of the host.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from struct import Struct
from typing import Any, Final, NamedTuple

from dlmfs.fuse import opcodes as op

NS: Final = 1_000_000_000

IN_HEADER: Final = Struct("=IIQQIII4x")
IN_HEADER_SIZE: Final = IN_HEADER.size

INIT_IN: Final = Struct("=IIII")
INIT_IN_FLAGS2: Final = Struct("=I")
SETATTR_IN: Final = Struct("=I4xQQ8xqq8xIIII4xII4x")
GETATTR_IN: Final = Struct("=I4xQ")
OPEN_IN: Final = Struct("=I4x")
READ_IN: Final = Struct("=QQI20x")
WRITE_IN: Final = Struct("=QQI20x")
RELEASE_IN: Final = Struct("=Q16x")
FSYNC_IN: Final = Struct("=QI4x")
MKNOD_IN: Final = Struct("=III4x")
MKDIR_IN: Final = Struct("=II")
RENAME_IN: Final = Struct("=Q")
RENAME2_IN: Final = Struct("=QI4x")
LINK_IN: Final = Struct("=Q")
SETXATTR_IN: Final = Struct("=II")
GETXATTR_IN: Final = Struct("=I4x")
POLL_IN: Final = Struct("=QQII")
INTERRUPT_IN: Final = Struct("=Q")
FORGET_IN: Final = Struct("=Q")
BATCH_FORGET_IN: Final = Struct("=I4x")
FORGET_ONE: Final = Struct("=QQ")


class WireError(ValueError):
    """Bytes that are not a well-formed request."""


class Header(NamedTuple):
    """What every request begins with. `pid` is a thread id; 0 from another pid namespace, and in
    RELEASE. `node` is the inode number that an earlier reply gave."""

    length: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int


class SetAttr(NamedTuple):
    """A change of attributes; a member is None where it is not to be changed.

    With `atime_now` or `mtime_now` the caller asked for the present; the kernel has filled in
    its own idea of it, so the time beside the flag may be used as it is.
    """

    valid: int
    fh: int | None
    size: int | None
    atime_ns: int | None
    mtime_ns: int | None
    mode: int | None
    uid: int | None
    gid: int | None
    atime_now: bool
    mtime_now: bool


class Init(NamedTuple):
    """The kernel's offer. `flags` has the extended flags in its bits 32 to 63."""

    major: int
    minor: int
    max_readahead: int
    flags: int


_new_tuple: Final[Callable[..., Any]] = tuple.__new__


def parse_header(message: bytes) -> Header:
    """The header of a whole message. Raises WireError if it is cut short or lies about its size."""
    try:
        # Header(*...) costs three times as much, on the path of every request.
        header: Header = _new_tuple(Header, IN_HEADER.unpack_from(message))
    except struct.error as error:
        raise WireError(f"a request of {len(message)} bytes") from error
    if header.length != len(message):
        raise WireError(f"a request of {len(message)} bytes that claims {header.length}")
    return header


def parse_body(opcode: int, message: bytes) -> tuple[Any, ...]:
    """The handler's arguments after the header, for an opcode in `PARSERS`; raises WireError."""
    try:
        return PARSERS[opcode](message, IN_HEADER_SIZE)
    except struct.error as error:
        raise WireError(
            f"opcode {opcode} with a body of {len(message) - IN_HEADER_SIZE}"
        ) from error


def _names(message: bytes, offset: int, count: int) -> list[bytes]:
    """`count` names, each ended by a zero byte, to the end of the message."""
    names = message[offset:].split(b"\0")
    if len(names) != count + 1 or names.pop() or not all(names):
        raise WireError("not the names that the request should have")
    return names


def _nothing(_message: bytes, _offset: int) -> tuple[()]:
    return ()


def _entries(message: bytes, offset: int, count: int) -> list[bytes]:
    """The same, of a directory's entries. No kernel sends one with a slash: keys of the store would be
    taken for others'."""
    names = _names(message, offset, count)
    if b"/" in b"".join(names):
        raise WireError("a name with a slash in it")
    return names


def _name(message: bytes, offset: int) -> tuple[bytes]:
    (name,) = _names(message, offset, 1)
    return (name,)


def _entry(message: bytes, offset: int) -> tuple[bytes]:
    (name,) = _entries(message, offset, 1)
    return (name,)


def _getattr(message: bytes, offset: int) -> tuple[int | None]:
    flags, fh = GETATTR_IN.unpack_from(message, offset)
    return (fh if flags & op.GETATTR_FH else None,)


def _setattr(message: bytes, offset: int) -> tuple[SetAttr]:
    fields = SETATTR_IN.unpack_from(message, offset)
    valid, fh, size, atime, mtime, atime_ns, mtime_ns, _ctime_ns, mode, uid, gid = fields
    change = SetAttr(
        valid=valid,
        fh=fh if valid & op.FATTR_FH else None,
        size=size if valid & op.FATTR_SIZE else None,
        atime_ns=atime * NS + min(atime_ns, NS - 1) if valid & op.FATTR_ATIME else None,
        mtime_ns=mtime * NS + min(mtime_ns, NS - 1) if valid & op.FATTR_MTIME else None,
        mode=mode if valid & op.FATTR_MODE else None,
        uid=uid if valid & op.FATTR_UID else None,
        gid=gid if valid & op.FATTR_GID else None,
        atime_now=bool(valid & op.FATTR_ATIME_NOW),
        mtime_now=bool(valid & op.FATTR_MTIME_NOW),
    )
    return (change,)


def _mknod(message: bytes, offset: int) -> tuple[bytes, int, int, int]:
    mode, rdev, umask = MKNOD_IN.unpack_from(message, offset)
    (name,) = _entries(message, offset + MKNOD_IN.size, 1)
    return name, mode, umask, rdev


def _mkdir(message: bytes, offset: int) -> tuple[bytes, int, int]:
    mode, umask = MKDIR_IN.unpack_from(message, offset)
    (name,) = _entries(message, offset + MKDIR_IN.size, 1)
    return name, mode, umask


def _symlink(message: bytes, offset: int) -> tuple[bytes, bytes]:
    name, target = _names(message, offset, 2)
    return name, target


def _link(message: bytes, offset: int) -> tuple[int, bytes]:
    (node,) = LINK_IN.unpack_from(message, offset)
    (name,) = _entries(message, offset + LINK_IN.size, 1)
    return node, name


def _rename(message: bytes, offset: int) -> tuple[bytes, int, bytes, int]:
    (parent,) = RENAME_IN.unpack_from(message, offset)
    old, new = _entries(message, offset + RENAME_IN.size, 2)
    return old, parent, new, 0


def _rename2(message: bytes, offset: int) -> tuple[bytes, int, bytes, int]:
    parent, flags = RENAME2_IN.unpack_from(message, offset)
    old, new = _entries(message, offset + RENAME2_IN.size, 2)
    return old, parent, new, flags


def _write(message: bytes, offset: int) -> tuple[int, int, bytes]:
    fh, position, size = WRITE_IN.unpack_from(message, offset)
    data = message[offset + WRITE_IN.size :]
    if len(data) != size:
        raise WireError(f"a write of {size} bytes with {len(data)}")
    return fh, position, data


def _fsync(message: bytes, offset: int) -> tuple[int, int]:
    fh, flags = FSYNC_IN.unpack_from(message, offset)
    return fh, flags & op.FSYNC_DATASYNC


def _getxattr(message: bytes, offset: int) -> tuple[bytes, int]:
    (size,) = GETXATTR_IN.unpack_from(message, offset)
    (name,) = _names(message, offset + GETXATTR_IN.size, 1)
    return name, size


def _setxattr(message: bytes, offset: int) -> tuple[bytes, bytes, int]:
    size, flags = SETXATTR_IN.unpack_from(message, offset)
    name, zero, value = message[offset + SETXATTR_IN.size :].partition(b"\0")
    if not name or not zero or len(value) != size:
        raise WireError(f"a value of {size} bytes that is not there")
    return name, value, flags


def _batch_forget(message: bytes, offset: int) -> tuple[list[tuple[int, int]]]:
    (count,) = BATCH_FORGET_IN.unpack_from(message, offset)
    body = message[offset + BATCH_FORGET_IN.size :]
    if len(body) != count * FORGET_ONE.size:
        raise WireError(f"{count} inodes to forget in {len(body)} bytes")
    return (list(FORGET_ONE.iter_unpack(body)),)


def _init(message: bytes, offset: int) -> tuple[Init]:
    major, minor, readahead, flags = INIT_IN.unpack_from(message, offset)
    if flags & op.INIT_EXT:
        (high,) = INIT_IN_FLAGS2.unpack_from(message, offset + INIT_IN.size)
        flags |= high << 32
    return (Init(major, minor, readahead, flags),)


Parser = Callable[[bytes, int], tuple[Any, ...]]

# Struct.unpack_from is the whole parser where the structure is all there is and skips what the
# handler does not take: those of the hot path (OPEN, RELEASE, READ) run no Python code at all.
PARSERS: Final[dict[int, Parser]] = {
    op.LOOKUP: _entry,
    op.FORGET: FORGET_IN.unpack_from,
    op.GETATTR: _getattr,
    op.SETATTR: _setattr,
    op.SYMLINK: _symlink,
    op.MKNOD: _mknod,
    op.MKDIR: _mkdir,
    op.UNLINK: _entry,
    op.RMDIR: _entry,
    op.RENAME: _rename,
    op.LINK: _link,
    op.OPEN: OPEN_IN.unpack_from,
    op.READ: READ_IN.unpack_from,
    op.WRITE: _write,
    op.STATFS: _nothing,
    op.RELEASE: RELEASE_IN.unpack_from,
    op.FSYNC: _fsync,
    op.SETXATTR: _setxattr,
    op.GETXATTR: _getxattr,
    op.LISTXATTR: GETXATTR_IN.unpack_from,
    op.REMOVEXATTR: _name,
    op.INIT: _init,
    op.OPENDIR: OPEN_IN.unpack_from,
    op.READDIR: READ_IN.unpack_from,
    op.RELEASEDIR: RELEASE_IN.unpack_from,
    op.FSYNCDIR: _fsync,
    op.INTERRUPT: INTERRUPT_IN.unpack_from,
    op.DESTROY: _nothing,
    op.POLL: POLL_IN.unpack_from,
    op.BATCH_FORGET: _batch_forget,
    op.RENAME2: _rename2,
}
