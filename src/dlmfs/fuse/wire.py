"""The codec of FUSE replies and notifications: arguments to bytes for the kernel. Pure.

A payload is built by one of the functions below and wrapped by `reply`; a refusal is an errno,
wrapped by `error`. The requests are in `requests`; what a handler takes of them is named here too.

Structures are those of Linux `include/uapi/linux/fuse.h`, in the byte order of the host. Times
are nanoseconds since the epoch, time-outs seconds.
"""

from __future__ import annotations

import sys
from struct import Struct
from typing import Final

from dlmfs.fuse import opcodes as op
from dlmfs.fuse.opcodes import FOPEN_CACHE_DIR as FOPEN_CACHE_DIR
from dlmfs.fuse.opcodes import FOPEN_DIRECT_IO as FOPEN_DIRECT_IO
from dlmfs.fuse.opcodes import FOPEN_KEEP_CACHE as FOPEN_KEEP_CACHE
from dlmfs.fuse.opcodes import FOPEN_NOFLUSH as FOPEN_NOFLUSH
from dlmfs.fuse.opcodes import FOPEN_NONSEEKABLE as FOPEN_NONSEEKABLE
from dlmfs.fuse.opcodes import LOOKUP as LOOKUP
from dlmfs.fuse.opcodes import MKDIR as MKDIR
from dlmfs.fuse.opcodes import MKNOD as MKNOD
from dlmfs.fuse.opcodes import OPEN as OPEN
from dlmfs.fuse.opcodes import POLL_SCHEDULE_NOTIFY as POLL_SCHEDULE_NOTIFY
from dlmfs.fuse.requests import Header as Header
from dlmfs.fuse.requests import Init as Init
from dlmfs.fuse.requests import SetAttr as SetAttr
from dlmfs.fuse.requests import WireError as WireError
from dlmfs.fuse.requests import parse_body as parse_body
from dlmfs.fuse.requests import parse_header as parse_header

NS: Final = 1_000_000_000

OUT_HEADER: Final = Struct("=IiQ")
OUT_HEADER_SIZE: Final = OUT_HEADER.size

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


def entry_node(payload: bytes) -> int:
    """The inode number in a payload that `entry` made."""
    return int.from_bytes(payload[:8], sys.byteorder)


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

    __slots__ = ("_parts", "_room")

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
