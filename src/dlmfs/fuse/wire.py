"""The codec of the FUSE protocol: bytes to requests, replies to bytes. Pure; no I/O, no state.

A message from the kernel is a `Header` and a body. `parse_header` and `parse_body` turn them into
the arguments of the handler for that request (`device.Operations`) and raise `WireError`, and
nothing else, for any bytes that are no request. What travels back is a payload built by one of
the functions below, wrapped by `reply`, or an errno, wrapped by `error`.

Structures are those of Linux `include/uapi/linux/fuse.h`, in the byte order of the host. Times
are nanoseconds since the epoch, time-outs seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from struct import Struct
from typing import Any, Final, NamedTuple

from dlmfs.fuse import opcodes as op
from dlmfs.fuse.opcodes import FOPEN_CACHE_DIR as FOPEN_CACHE_DIR
from dlmfs.fuse.opcodes import FOPEN_DIRECT_IO as FOPEN_DIRECT_IO
from dlmfs.fuse.opcodes import FOPEN_KEEP_CACHE as FOPEN_KEEP_CACHE
from dlmfs.fuse.opcodes import FOPEN_NOFLUSH as FOPEN_NOFLUSH
from dlmfs.fuse.opcodes import FOPEN_NONSEEKABLE as FOPEN_NONSEEKABLE
from dlmfs.fuse.opcodes import OPEN as OPEN
from dlmfs.fuse.opcodes import POLL_SCHEDULE_NOTIFY as POLL_SCHEDULE_NOTIFY

NS: Final = 1_000_000_000

IN_HEADER: Final = Struct("=IIQQIII4x")
OUT_HEADER: Final = Struct("=IiQ")
IN_HEADER_SIZE: Final = IN_HEADER.size
OUT_HEADER_SIZE: Final = OUT_HEADER.size

INIT_IN: Final = Struct("=IIII")
INIT_IN_FLAGS2: Final = Struct("=I")
INIT_OUT: Final = Struct("=IIIIHHIIHHI28x")
ATTR: Final = Struct("=QQQqqqIIIIIIIIII")
ATTR_OUT: Final = Struct("=QI4x")
ENTRY_OUT: Final = Struct("=QQQQII")
OPEN_OUT: Final = Struct("=QI4x")
STATFS_OUT: Final = Struct("=QQQQQIII28x")
U32_PADDED: Final = Struct("=I4x")
DIRENT: Final = Struct("=QQII")
NOTIFY_POLL_OUT: Final = Struct("=Q")
NOTIFY_INODE_OUT: Final = Struct("=Qqq")
NOTIFY_ENTRY_OUT: Final = Struct("=QII")
NOTIFY_DELETE_OUT: Final = Struct("=QQI4x")

SETATTR_IN: Final = Struct("=I4xQQ8xqq8xIII I4xII4x")
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


class Attr:
    """Attributes of an inode, as stat(2) shows them. `blocks` are of 512 bytes."""

    __slots__ = (
        "atime_ns",
        "blksize",
        "blocks",
        "ctime_ns",
        "gid",
        "ino",
        "mode",
        "mtime_ns",
        "nlink",
        "rdev",
        "size",
        "uid",
    )

    def __init__(
        self,
        *,
        ino: int,
        mode: int,
        nlink: int = 1,
        size: int = 0,
        blocks: int = 0,
        atime_ns: int = 0,
        mtime_ns: int = 0,
        ctime_ns: int = 0,
        uid: int = 0,
        gid: int = 0,
        rdev: int = 0,
        blksize: int = 4096,
    ) -> None:
        self.ino = ino
        self.mode = mode
        self.nlink = nlink
        self.size = size
        self.blocks = blocks
        self.atime_ns = atime_ns
        self.mtime_ns = mtime_ns
        self.ctime_ns = ctime_ns
        self.uid = uid
        self.gid = gid
        self.rdev = rdev
        self.blksize = blksize

    def pack(self) -> bytes:
        atime, atime_ns = divmod(self.atime_ns, NS)
        mtime, mtime_ns = divmod(self.mtime_ns, NS)
        ctime, ctime_ns = divmod(self.ctime_ns, NS)
        return ATTR.pack(
            *(self.ino, self.size, self.blocks, atime, mtime, ctime),
            *(atime_ns, mtime_ns, ctime_ns, self.mode, self.nlink),
            *(self.uid, self.gid, self.rdev, self.blksize, 0),
        )


# -- requests ---------------------------------------------------------------------------------

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
        raise WireError(f"opcode {opcode} with a body of {len(message) - IN_HEADER_SIZE}") from error


def _names(message: bytes, offset: int, count: int) -> list[bytes]:
    """`count` names, each ended by a zero byte, to the end of the message."""
    names = message[offset:].split(b"\0")
    if len(names) != count + 1 or names.pop() or not all(names):
        raise WireError("not the names that the request should have")
    return names


def _nothing(message: bytes, offset: int) -> tuple[()]:
    return ()


def _name(message: bytes, offset: int) -> tuple[bytes]:
    (name,) = _names(message, offset, 1)
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
        atime_ns=atime * NS + atime_ns if valid & op.FATTR_ATIME else None,
        mtime_ns=mtime * NS + mtime_ns if valid & op.FATTR_MTIME else None,
        mode=mode if valid & op.FATTR_MODE else None,
        uid=uid if valid & op.FATTR_UID else None,
        gid=gid if valid & op.FATTR_GID else None,
        atime_now=bool(valid & op.FATTR_ATIME_NOW),
        mtime_now=bool(valid & op.FATTR_MTIME_NOW),
    )
    return (change,)


def _mknod(message: bytes, offset: int) -> tuple[bytes, int, int, int]:
    mode, rdev, umask = MKNOD_IN.unpack_from(message, offset)
    (name,) = _names(message, offset + MKNOD_IN.size, 1)
    return name, mode, umask, rdev


def _mkdir(message: bytes, offset: int) -> tuple[bytes, int, int]:
    mode, umask = MKDIR_IN.unpack_from(message, offset)
    (name,) = _names(message, offset + MKDIR_IN.size, 1)
    return name, mode, umask


def _symlink(message: bytes, offset: int) -> tuple[bytes, bytes]:
    name, target = _names(message, offset, 2)
    return name, target


def _link(message: bytes, offset: int) -> tuple[int, bytes]:
    (node,) = LINK_IN.unpack_from(message, offset)
    (name,) = _names(message, offset + LINK_IN.size, 1)
    return node, name


def _rename(message: bytes, offset: int) -> tuple[bytes, int, bytes, int]:
    (parent,) = RENAME_IN.unpack_from(message, offset)
    old, new = _names(message, offset + RENAME_IN.size, 2)
    return old, parent, new, 0


def _rename2(message: bytes, offset: int) -> tuple[bytes, int, bytes, int]:
    parent, flags = RENAME2_IN.unpack_from(message, offset)
    old, new = _names(message, offset + RENAME2_IN.size, 2)
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
    op.LOOKUP: _name,
    op.FORGET: FORGET_IN.unpack_from,
    op.GETATTR: _getattr,
    op.SETATTR: _setattr,
    op.SYMLINK: _symlink,
    op.MKNOD: _mknod,
    op.MKDIR: _mkdir,
    op.UNLINK: _name,
    op.RMDIR: _name,
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


# -- replies ----------------------------------------------------------------------------------


def reply(unique: int, payload: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(payload), 0, unique) + payload


def error(unique: int, errno: int) -> bytes:
    """A refusal with a positive errno, at most `opcodes.ERRNO_MAX`."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -errno, unique)


def init_out(minor: int, max_readahead: int, flags: int, max_write: int) -> bytes:
    """The daemon's side of the bargain. `flags` as in `Init`.

    The number of background requests is the largest there is: RELEASE is one, and with the usual
    12 a trylock overtakes the closes before it (fuse-notes, Critical 3).
    """
    return INIT_OUT.pack(
        *(op.MAJOR, minor, max_readahead, flags & 0xFFFFFFFF),
        *(0xFFFF, 0xFFFF, max_write, 1, 0, 0, flags >> 32),
    )


def init_out_major() -> bytes:
    """To a kernel with a newer major version: ours. It will send INIT again."""
    return INIT_OUT.pack(op.MAJOR, op.MINOR, *(0,) * 9)


def _seconds(timeout_s: float) -> tuple[int, int]:
    return divmod(int(timeout_s * NS), NS)


def entry(
    node: int, generation: int, attr: Attr, entry_timeout_s: float, attr_timeout_s: float
) -> bytes:
    """What a name leads to: the answer to LOOKUP, MKNOD, MKDIR, SYMLINK, LINK."""
    names_s, names_ns = _seconds(entry_timeout_s)
    attrs_s, attrs_ns = _seconds(attr_timeout_s)
    head = ENTRY_OUT.pack(node, generation, names_s, attrs_s, names_ns, attrs_ns)
    return head + attr.pack()


def attr_out(attr: Attr, timeout_s: float) -> bytes:
    return ATTR_OUT.pack(*_seconds(timeout_s)) + attr.pack()


def opened(fh: int, open_flags: int) -> bytes:
    return OPEN_OUT.pack(fh, open_flags)


def opened_fh(payload: bytes) -> int:
    """The file handle in a payload that `opened` made."""
    fh: int = OPEN_OUT.unpack(payload)[0]
    return fh


def written(count: int) -> bytes:
    return U32_PADDED.pack(count)


def polled(revents: int) -> bytes:
    return U32_PADDED.pack(revents)


def xattr_size(size: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR that ask with size 0."""
    return U32_PADDED.pack(size)


def statfs(
    *,
    bsize: int,
    namelen: int,
    blocks: int = 0,
    bfree: int = 0,
    bavail: int = 0,
    files: int = 0,
    ffree: int = 0,
) -> bytes:
    return STATFS_OUT.pack(blocks, bfree, bavail, files, ffree, bsize, namelen, bsize)


class Dirents:
    """A directory's names, up to the number of bytes that READDIR asked for."""

    __slots__ = ("_room", "_parts")

    def __init__(self, size: int) -> None:
        self._room = size
        self._parts: list[bytes] = []

    def add(self, ino: int, next_offset: int, mode: int, name: bytes) -> bool:
        """Append one; False if it does not fit, and then nothing was appended.

        `next_offset` is where a READDIR that comes after this name goes on, `mode` a st_mode.
        """
        size = -(-(DIRENT.size + len(name)) // 8) * 8
        if size > self._room:
            return False
        self._room -= size
        head = DIRENT.pack(ino, next_offset, len(name), (mode >> 12) & 0o17)
        self._parts.append((head + name).ljust(size, b"\0"))
        return True

    def payload(self) -> bytes:
        return b"".join(self._parts)


# -- notifications ----------------------------------------------------------------------------


def _notification(code: int, payload: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(payload), code, 0) + payload


def notify_poll(kh: int) -> bytes:
    """Wake whoever polls the open file that POLL named by the kernel handle `kh`."""
    return _notification(op.NOTIFY_POLL, NOTIFY_POLL_OUT.pack(kh))


def notify_inval_inode(node: int, offset: int, length: int) -> bytes:
    """Forget cached attributes; with an offset that is not negative, cached data too."""
    return _notification(op.NOTIFY_INVAL_INODE, NOTIFY_INODE_OUT.pack(node, offset, length))


def notify_inval_entry(parent: int, name: bytes) -> bytes:
    """Forget what `name` in the directory `parent` leads to."""
    head = NOTIFY_ENTRY_OUT.pack(parent, len(name), 0)
    return _notification(op.NOTIFY_INVAL_ENTRY, head + name + b"\0")


def notify_delete(parent: int, child: int, name: bytes) -> bytes:
    """As `notify_inval_entry`, and tell watchers (inotify) that it was deleted."""
    head = NOTIFY_DELETE_OUT.pack(parent, child, len(name))
    return _notification(op.NOTIFY_DELETE, head + name + b"\0")
