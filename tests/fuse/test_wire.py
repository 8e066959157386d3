"""The codec: sizes against the kernel's ABI, what comes out of each request, and any bytes."""

from __future__ import annotations

import contextlib
import errno
import stat
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.fuse import opcodes as op
from dlmfs.fuse import requests, wire
from tests.fuse import messages

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NAME = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
ENTRY = NAME.filter(lambda name: b"/" not in name)


def body(message: bytes) -> tuple[Any, ...]:
    return wire.parse_body(wire.parse_header(message).opcode, message)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("IN_HEADER", 40), ("INIT_IN", 16), ("SETATTR_IN", 88), ("GETATTR_IN", 16)),
        *(("OPEN_IN", 8), ("READ_IN", 40), ("WRITE_IN", 40), ("RELEASE_IN", 24)),
        *(("FSYNC_IN", 16), ("MKNOD_IN", 16), ("MKDIR_IN", 8), ("RENAME_IN", 8)),
        *(("RENAME2_IN", 16), ("LINK_IN", 8), ("SETXATTR_IN", 8), ("GETXATTR_IN", 8)),
        *(("POLL_IN", 24), ("INTERRUPT_IN", 8), ("FORGET_IN", 8), ("BATCH_FORGET_IN", 8)),
        ("FORGET_ONE", 16),
    ],
)
def test_request_structures_have_the_kernels_sizes(name: str, size: int) -> None:
    assert getattr(requests, name).size == size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("OUT_HEADER", 16), ("INIT_OUT", 64), ("ATTR", 88), ("ATTR_OUT", 16)),
        *(("ENTRY_OUT", 40), ("OPEN_OUT", 16), ("STATFS_OUT", 80), ("DIRENT", 24)),
        *(("NOTIFY_POLL_OUT", 8), ("NOTIFY_INODE_OUT", 24), ("NOTIFY_ENTRY_OUT", 16)),
        ("NOTIFY_DELETE_OUT", 24),
    ],
)
def test_reply_structures_have_the_kernels_sizes(name: str, size: int) -> None:
    assert getattr(wire, name).size == size


def test_whole_payloads_have_the_kernels_sizes() -> None:
    attr = wire.Attr(ino=1, mode=0o40755)
    assert len(wire.entry(1, 0, attr, 1, 1)) == 128
    assert len(wire.attr_out(attr, 1)) == 104
    assert len(wire.init_out(45, 0, 0, 4096)) == 64
    assert len(wire.written(1)) == len(wire.polled(1)) == len(wire.xattr_size(1)) == 8


# -- requests -----------------------------------------------------------------------------------


@given(U32, U64, U64, U32, U32)
def test_header(opcode: int, unique: int, node: int, uid: int, pid: int) -> None:
    message = messages.request(opcode, unique, b"xyz", node=node, uid=uid, pid=pid)
    assert wire.parse_header(message) == (43, opcode, unique, node, uid, 0, pid)


@given(ENTRY)
def test_names(name: bytes) -> None:
    for opcode in (op.LOOKUP, op.UNLINK, op.RMDIR, op.REMOVEXATTR):
        assert body(messages.request(opcode, 2, name + b"\0")) == (name,)


@given(U32, U32, U32, ENTRY)
def test_mknod_and_mkdir(mode: int, rdev: int, umask: int, name: bytes) -> None:
    packed = struct.pack("=IIII", mode, rdev, umask, 0) + name + b"\0"
    assert body(messages.request(op.MKNOD, 2, packed)) == (name, mode, umask, rdev)
    packed = struct.pack("=II", mode, umask) + name + b"\0"
    assert body(messages.request(op.MKDIR, 2, packed)) == (name, mode, umask)


@given(ENTRY, ENTRY, U64, U32)
def test_two_names(old: bytes, new: bytes, node: int, flags: int) -> None:
    names = old + b"\0" + new + b"\0"
    message = messages.request(op.RENAME, 2, struct.pack("=Q", node) + names)
    assert body(message) == (old, node, new, 0)
    message = messages.request(op.RENAME2, 2, struct.pack("=QII", node, flags, 0) + names)
    assert body(message) == (old, node, new, flags)
    assert body(messages.request(op.SYMLINK, 2, names)) == (old, new)
    message = messages.request(op.LINK, 2, struct.pack("=Q", node) + old + b"\0")
    assert body(message) == (node, old)


@given(U64, U64, U32, st.binary(max_size=4096))
def test_open_files(fh: int, offset: int, size: int, data: bytes) -> None:
    assert body(messages.open_(2, flags=size)) == (size,)
    assert body(messages.release(2, fh)) == (fh,)
    assert body(messages.read(2, fh, offset, size)) == (fh, offset, size)
    assert body(messages.write(2, fh, offset, data)) == (fh, offset, data)
    packed = struct.pack("=QII", fh, 1, 0)
    assert body(messages.request(op.FSYNC, 2, packed)) == (fh, 1)
    packed = struct.pack("=QQII", fh, offset, 1, size)
    assert body(messages.request(op.POLL, 2, packed)) == (fh, offset, 1, size)


@given(NAME, st.binary(max_size=300), U32)
def test_extended_attributes(name: bytes, value: bytes, number: int) -> None:
    packed = struct.pack("=II", len(value), number) + name + b"\0" + value
    assert body(messages.request(op.SETXATTR, 2, packed)) == (name, value, number)
    packed = struct.pack("=II", number, 0) + name + b"\0"
    assert body(messages.request(op.GETXATTR, 2, packed)) == (name, number)
    assert body(messages.request(op.LISTXATTR, 2, struct.pack("=II", number, 0))) == (number,)


def test_getattr_has_a_handle_only_if_it_says_so() -> None:
    assert body(messages.request(op.GETATTR, 2, struct.pack("=IIQ", 0, 0, 9))) == (None,)
    assert body(messages.request(op.GETATTR, 2, struct.pack("=IIQ", 1, 0, 9))) == (9,)


def test_setattr_leaves_out_what_is_not_valid() -> None:
    everything = {"fh": 5, "size": 6, "atime": 7, "mtime": 8, "mode": 9, "uid": 10, "gid": 11}
    (change,) = body(messages.setattr_(2, 0, **everything))
    assert change == (0, None, None, None, None, None, None, None, False, False)
    valid = op.FATTR_MODE | op.FATTR_UID | op.FATTR_GID | op.FATTR_SIZE | op.FATTR_FH
    (change,) = body(messages.setattr_(2, valid, **everything))
    assert change == (valid, 5, 6, None, None, 9, 10, 11, False, False)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 999_999_999))
def test_setattr_times(seconds: int, ns: int) -> None:
    message = messages.setattr_(2, op.FATTR_ATIME, atime=seconds, atimensec=ns)
    (change,) = body(message)
    assert change.atime_ns == seconds * 10**9 + ns
    assert (change.mtime_ns, change.atime_now) == (None, False)
    both = op.FATTR_MTIME | op.FATTR_MTIME_NOW
    (change,) = body(messages.setattr_(2, both, mtime=seconds, mtimensec=ns))
    assert (change.mtime_ns, change.mtime_now) == (seconds * 10**9 + ns, True)


@given(st.lists(st.tuples(U64, U64), max_size=200))
def test_forgetting(ones: list[tuple[int, int]]) -> None:
    packed = struct.pack("=II", len(ones), 0) + b"".join(struct.pack("=QQ", *one) for one in ones)
    assert body(messages.request(op.BATCH_FORGET, 2, packed)) == (ones,)


def test_init_with_and_without_the_second_word_of_flags() -> None:
    assert body(messages.init_old(minor=32)) == ((7, 32, 131072, 0x3FFFFFFF),)
    packed = struct.pack("=IIIII44x", 7, 45, 0, op.INIT_EXT, 0b11)
    assert body(messages.request(op.INIT, 2, packed)) == ((7, 45, 0, op.INIT_EXT | 0b11 << 32),)


@pytest.mark.parametrize("packed", [b"", b"\0", b"name", b"a\0b\0", b"a\0\0", b"\0a\0"])
def test_names_that_are_none(packed: bytes) -> None:
    with pytest.raises(wire.WireError):
        body(messages.request(op.LOOKUP, 2, packed))


@pytest.mark.parametrize("name", [b"/", b"a/b", b"/a", b"a/"])
def test_entries_with_a_slash(name: bytes) -> None:
    """In the store such a lock's keys are another's: `d/<domain>/w/a/b` is the wish of a node b for a."""
    packed = {
        **dict.fromkeys((op.LOOKUP, op.UNLINK, op.RMDIR), b""),
        op.MKNOD: bytes(16),
        **dict.fromkeys((op.MKDIR, op.LINK), bytes(8)),
        op.RENAME: bytes(8) + b"old\0",
        op.RENAME2: bytes(16) + b"old\0",
    }
    for opcode, before in packed.items():
        with pytest.raises(wire.WireError):
            body(messages.request(opcode, 2, before + name + b"\0"))
    assert body(messages.request(op.SYMLINK, 2, b"link\0" + name + b"\0")) == (b"link", name)
    assert body(messages.request(op.REMOVEXATTR, 2, name + b"\0")) == (name,)


def test_write_that_has_not_the_bytes_it_claims() -> None:
    message = messages.write(2, 1, 0, b"abc")
    for other in (message[:-1], message + b"d"):
        with pytest.raises(wire.WireError):
            wire.parse_body(op.WRITE, other)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_wire_error(message: bytes) -> None:
    try:
        header = wire.parse_header(message)
    except wire.WireError:
        return
    assert header.length == len(message)


@given(st.sampled_from(sorted(requests.PARSERS)), st.binary(max_size=200))
def test_any_bytes_are_a_body_or_a_wire_error(opcode: int, packed: bytes) -> None:
    try:
        arguments = wire.parse_body(opcode, messages.request(opcode, 2, packed))
    except wire.WireError:
        return
    assert isinstance(arguments, tuple)


@given(st.sampled_from(sorted(requests.PARSERS)), st.integers(0, 87))
def test_a_cut_body_never_yields_more_than_it_has(opcode: int, size: int) -> None:
    """A huge count or size in a body must not be believed."""
    message = messages.request(opcode, 2, b"\xff" * size)
    with contextlib.suppress(wire.WireError):
        wire.parse_body(opcode, message)


# -- replies ------------------------------------------------------------------------------------


@given(U64, st.binary(max_size=300))
def test_reply(unique: int, payload: bytes) -> None:
    data = wire.reply(unique, payload)
    assert struct.unpack_from("=IiQ", data) == (len(data), 0, unique)
    assert data[16:] == payload


def test_error() -> None:
    assert struct.unpack("=IiQ", wire.error(5, errno.ETXTBSY)) == (16, -errno.ETXTBSY, 5)


@given(st.integers(-(2**62), 2**62))
def test_attr(time_ns: int) -> None:
    attr = wire.Attr(ino=3, mode=0o100644, size=64, atime_ns=time_ns, uid=1, gid=2, rdev=3)
    fields = struct.unpack("=QQQqqqIIIIIIIIII", attr.pack())
    assert fields[3] * 10**9 + fields[6] == time_ns
    assert (*fields[:3], *fields[9:]) == (3, 64, 0, 0o100644, 1, 1, 2, 3, 4096, 0)


def test_entry_times_out_as_asked() -> None:
    payload = wire.entry(7, 8, wire.Attr(ino=7, mode=0o100644), 3600, 0.25)
    assert struct.unpack_from("=QQQQII", payload) == (7, 8, 3600, 0, 0, 250_000_000)
    payload = wire.attr_out(wire.Attr(ino=7, mode=0o100644), 1.5)
    assert struct.unpack_from("=QI", payload) == (1, 500_000_000)


@given(U64, U32)
def test_opened(fh: int, flags: int) -> None:
    payload = wire.opened(fh, flags)
    assert struct.unpack("=QII", payload) == (fh, flags, 0)
    assert wire.opened_fh(payload) == fh


def test_init_out_splits_the_flags() -> None:
    fields = struct.unpack("=IIIIHHIIHHI28x", wire.init_out(40, 131072, 1 << 33 | 5, 4096))
    assert fields == (7, 40, 131072, 5, 65535, 65535, 4096, 1, 0, 0, 2)


@given(st.lists(NAME, max_size=30), st.integers(0, 4096))
def test_dirents_stop_before_the_size(names: list[bytes], size: int) -> None:
    out = wire.Dirents(size)
    added = []
    for number, name in enumerate(names):
        if not out.add(number, number + 1, stat.S_IFREG | 0o644, name):
            break
        added.append(name)
    payload = out.payload()
    assert len(payload) <= size
    seen, at = [], 0
    while at < len(payload):
        ino, offset, length, kind = struct.unpack_from("=QQII", payload, at)
        assert (offset, kind) == (ino + 1, 8)
        seen.append(payload[at + 24 : at + 24 + length])
        at += (24 + length + 7) // 8 * 8
    assert at == len(payload)
    assert seen == added


def test_notifications() -> None:
    assert wire.notify_poll(9) == struct.pack("=IiQQ", 24, 1, 0, 9)
    assert wire.notify_inval_inode(2, -1, 0) == struct.pack("=IiQQqq", 40, 2, 0, 2, -1, 0)
    assert wire.notify_inval_entry(1, b"ab") == struct.pack("=IiQQII3s", 35, 3, 0, 1, 2, 0, b"ab")
    data = wire.notify_delete(1, 2, b"ab")
    assert data == struct.pack("=IiQQQII3s", 43, 6, 0, 1, 2, 2, 0, b"ab")
