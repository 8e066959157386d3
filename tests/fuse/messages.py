"""Requests as the kernel would send them, for tests."""

from __future__ import annotations

import struct

from dlmfs.fuse import opcodes as op


def request(
    opcode: int, unique: int, body: bytes = b"", *, node: int = 1, pid: int = 7, uid: int = 0
) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, uid, 0, pid, 0, 0) + body


def init(unique: int = 2, major: int = 7, minor: int = 45, flags: int = 0xFFFFFFFF) -> bytes:
    return request(op.INIT, unique, struct.pack("=IIIII44x", major, minor, 131072, flags, 0))


def init_old(unique: int = 2, major: int = 7, minor: int = 32) -> bytes:
    """As before 7.36: no second word of flags."""
    return request(op.INIT, unique, struct.pack("=IIII", major, minor, 131072, 0x3FFFFFFF))


def lookup(unique: int, name: bytes) -> bytes:
    return request(op.LOOKUP, unique, name + b"\0")


def open_(unique: int, node: int = 2, flags: int = 2) -> bytes:
    return request(op.OPEN, unique, struct.pack("=II", flags, 0), node=node)


def release(unique: int, fh: int) -> bytes:
    return request(op.RELEASE, unique, struct.pack("=QIIQ", fh, 2, 0, 0), node=2, pid=0)


def read(unique: int, fh: int, offset: int, size: int) -> bytes:
    return request(op.READ, unique, struct.pack("=QQIIQII", fh, offset, size, 0, 0, 2, 0), node=2)


def write(unique: int, fh: int, offset: int, data: bytes) -> bytes:
    head = struct.pack("=QQIIQII", fh, offset, len(data), 0, 0, 2, 0)
    return request(op.WRITE, unique, head + data, node=2)


def interrupt(unique: int) -> bytes:
    return request(op.INTERRUPT, unique | 1, struct.pack("=Q", unique))


def setattr_(unique: int, valid: int, **members: int) -> bytes:
    order = "fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode _ uid gid _"
    values = [members.get(name, 0) for name in order.split()]
    return request(op.SETATTR, unique, struct.pack("=IIQQQqqqIIIIIIII", valid, 0, *values))
