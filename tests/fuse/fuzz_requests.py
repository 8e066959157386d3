"""What the fuzzer sends: requests that a kernel might send, and what no kernel would.

Every function draws from a generator of its own and from what the played kernel knows, so that a
step keeps its meaning when the steps before it are taken away.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from random import Random
from typing import Final

from dlmfs.fuse import opcodes as op
from tests.fuse import messages
from tests.fuse.fuzz_kernel import HEADER_SIZE, INTERRUPTIBLE, Kernel

WILD: Final = (0, 1, 2, 3, 4095, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
DOMAINS: Final = (b"d", b"d", b"e")
LOCKS: Final = (b"a", b"a", b"b", b"l" * 255)
ODD: Final = (
    *(b"", b".", b"..", b"a/b", b"/", b"$x", b"$RECOVERY", b"\xff\xfe", b"a\nb", b"l" * 256),
    *(b"d" * 63, b"d" * 64, b"x" * 255, b"x" * 256, b"x" * 4000, b"a\0b", b"\0"),
)
NOBODY: Final = (1 << 22) - 1
"""A thread id that is not in use."""
XATTRS: Final = (
    *(b"user.dlmfs." + n for n in (b"mode", b"token", b"holders", b"waiters", b"lvb", b"owner")),
    *(b"user.dlmfs.capabilities", b"user.other", b"security.capability", b"user.dlmfs."),
)


def name(rng: Random, names: tuple[bytes, ...]) -> bytes:
    return rng.choice(ODD if rng.random() < 0.08 else names)


def node(rng: Random, kernel: Kernel, depth: int) -> int:
    """The root (0), a domain (1), a lock's file (2), or sometimes anything."""
    if rng.random() < 0.06:
        return rng.choice(WILD)
    if depth == 0:
        return op.ROOT_NODE
    domains = {n for (parent, _), n in kernel.names.items() if parent == op.ROOT_NODE}
    known = [n for n in kernel.nodes if (n in domains) == (depth == 1)]
    return rng.choice(known) if known else op.ROOT_NODE


def handle(rng: Random, kernel: Kernel) -> tuple[int, int]:
    """An open file and its node."""
    if kernel.handles and rng.random() > 0.06:
        fh = rng.choice(list(kernel.handles))
        return fh, kernel.handles[fh]
    return rng.choice(WILD), rng.choice(WILD)


def request(
    rng: Random, kernel: Kernel, opcode: int, body: bytes = b"", *, node: int = op.ROOT_NODE
) -> bytes:
    pid = rng.choice((os.getpid(), 0, NOBODY, 1))
    uid = rng.choice((0, 0, 1000, 1001))
    return messages.request(opcode, kernel.unique(), body, node=node, pid=pid, uid=uid)


Maker = Callable[[Random, Kernel], bytes]


def lookup(rng: Random, kernel: Kernel) -> bytes:
    depth = rng.choice((0, 1))
    body = name(rng, LOCKS if depth else DOMAINS) + b"\0"
    return request(rng, kernel, op.LOOKUP, body, node=node(rng, kernel, depth))


def mkdir(rng: Random, kernel: Kernel) -> bytes:
    body = struct.pack("=II", rng.choice((0o755, 0o40755, 0xFFFFFFFF)), 0o22)
    return request(
        rng, kernel, op.MKDIR, body + name(rng, DOMAINS) + b"\0", node=node(rng, kernel, 0)
    )


def mknod(rng: Random, kernel: Kernel) -> bytes:
    mode = rng.choice((0o100644, 0o100644, 0o100644, 0o644, 0o10644, 0xFFFFFFFF))
    body = struct.pack("=IIII", mode, 0, 0o22, 0) + name(rng, LOCKS) + b"\0"
    return request(rng, kernel, op.MKNOD, body, node=node(rng, kernel, 1))


def open_(rng: Random, kernel: Kernel) -> bytes:
    flags = rng.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY, 3))
    flags |= rng.choice((0, 0, 0, os.O_NONBLOCK, os.O_APPEND, os.O_DIRECT, 0x80000000))
    body = struct.pack("=II", flags, 0)
    return request(rng, kernel, op.OPEN, body, node=node(rng, kernel, 2))


def read(rng: Random, kernel: Kernel) -> bytes:
    fh, inode = handle(rng, kernel)
    offset, size = rng.choice((0, 0, 8, 64, *WILD)), rng.choice((0, 1, 64, 4096, 0xFFFFFFFF))
    body = struct.pack("=QQIIQII", fh, offset, size, 0, 0, 2, 0)
    return request(rng, kernel, op.READ, body, node=inode)


def write(rng: Random, kernel: Kernel) -> bytes:
    fh, inode = handle(rng, kernel)
    data = rng.randbytes(rng.choice((0, 1, 8, 64, 65, 4096)))
    body = struct.pack("=QQIIQII", fh, rng.choice((0, 0, 8, 63, *WILD)), len(data), 0, 0, 2, 0)
    return request(rng, kernel, op.WRITE, body + data, node=inode)


def release(rng: Random, kernel: Kernel) -> bytes:
    fh, inode = handle(rng, kernel)
    return release_of(rng, kernel, fh, inode)


def release_of(rng: Random, kernel: Kernel, fh: int, inode: int) -> bytes:
    return request(rng, kernel, op.RELEASE, struct.pack("=QIIQ", fh, 2, 0, 0), node=inode)


def unlink(rng: Random, kernel: Kernel) -> bytes:
    return request(rng, kernel, op.UNLINK, name(rng, LOCKS) + b"\0", node=node(rng, kernel, 1))


def rmdir(rng: Random, kernel: Kernel) -> bytes:
    depth = int(rng.random() < 0.1)
    return request(rng, kernel, op.RMDIR, name(rng, DOMAINS) + b"\0", node=node(rng, kernel, depth))


def interrupt(rng: Random, kernel: Kernel) -> bytes:
    """A signal for a request that waits; sometimes for one that is answered, or never was."""
    waiting = [u for u, sent in kernel.outstanding.items() if sent.opcode in INTERRUPTIBLE]
    waiting += [
        struct.unpack_from("=Q", m, 8)[0] for m in kernel.last[-2:] if len(m) >= HEADER_SIZE
    ]
    known = bool(waiting) and rng.random() > 0.1
    unique = rng.choice(waiting) if known else rng.choice(WILD)
    return messages.request(op.INTERRUPT, kernel.unique() | 1, struct.pack("=Q", unique))


def forget(rng: Random, kernel: Kernel) -> bytes:
    known = rng.choice(list(kernel.nodes)) if kernel.nodes else 0
    if not known or rng.random() < 0.08:
        body = struct.pack("=Q", rng.choice(WILD))
        return messages.request(op.FORGET, kernel.unique(), body, node=rng.choice(WILD[:4]))
    return forget_of(kernel, known, rng.randint(1, kernel.nodes[known]))


def forget_of(kernel: Kernel, inode: int, count: int) -> bytes:
    return messages.request(op.FORGET, kernel.unique(), struct.pack("=Q", count), node=inode)


def batch_forget(rng: Random, kernel: Kernel) -> bytes:
    some = rng.sample(sorted(kernel.nodes), min(len(kernel.nodes), rng.randint(0, 3)))
    pairs = [(inode, kernel.nodes[inode]) for inode in some]
    if rng.random() < 0.1:
        pairs.append((rng.choice(WILD), rng.choice(WILD)))
    body = struct.pack("=II", len(pairs), 0) + b"".join(struct.pack("=QQ", *p) for p in pairs)
    return messages.request(op.BATCH_FORGET, kernel.unique(), body, node=0)


def setattr_(rng: Random, kernel: Kernel) -> bytes:
    valid = rng.choice((1, 2, 4, 8, 16, 32, 8 | 32 | 64, 0x7FF, 0xFFFFFFFF))
    small = (0, 1, 0o644, 999_999_999, 1_700_000_000, (1 << 32) - 1)
    large = (*small, (1 << 63) - 1)
    body = struct.pack("=II", valid, 0)
    body += struct.pack("=QQQ", *(rng.choice(WILD) for _ in range(3)))
    body += struct.pack("=qqq", *(rng.choice((*large, -1, -(1 << 63))) for _ in range(3)))
    body += struct.pack("=IIIIIIII", *(rng.choice(small) for _ in range(8)))
    return request(rng, kernel, op.SETATTR, body, node=node(rng, kernel, rng.choice((0, 1, 2))))


def getattr_(rng: Random, kernel: Kernel) -> bytes:
    body = struct.pack("=IIQ", rng.choice((0, 1)), 0, handle(rng, kernel)[0])
    return request(rng, kernel, op.GETATTR, body, node=node(rng, kernel, rng.choice((0, 1, 2))))


def getxattr(rng: Random, kernel: Kernel) -> bytes:
    body = struct.pack("=II", rng.choice((0, 1, 64, 65536)), 0) + name(rng, XATTRS) + b"\0"
    return request(rng, kernel, op.GETXATTR, body, node=node(rng, kernel, rng.choice((1, 2, 2))))


def listxattr(rng: Random, kernel: Kernel) -> bytes:
    body = struct.pack("=II", rng.choice((0, 1, 65536)), 0)
    return request(rng, kernel, op.LISTXATTR, body, node=node(rng, kernel, rng.choice((0, 1, 2))))


def readdir(rng: Random, kernel: Kernel) -> bytes:
    offset, size = rng.choice((0, 0, 3, *WILD)), rng.choice((0, 24, 40, 4096, 0xFFFFFFFF))
    body = struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)
    return request(rng, kernel, op.READDIR, body, node=node(rng, kernel, rng.choice((0, 1, 2))))


def poll(rng: Random, kernel: Kernel) -> bytes:
    fh, inode = handle(rng, kernel)
    body = struct.pack("=QQII", fh, rng.choice(WILD), rng.choice((0, 1)), 0x41)
    return request(rng, kernel, op.POLL, body, node=inode)


def simple(rng: Random, kernel: Kernel) -> bytes:
    """A request that does little, with the body that it should have."""
    word, four = struct.pack("=Q", rng.choice(WILD)), struct.pack("=QII", 0, 0, 0)
    opcode, body = rng.choice(
        (
            *((op.STATFS, b""), (op.DESTROY, b""), (op.OPENDIR, bytes(8)), (op.FSYNC, four)),
            *((op.RELEASEDIR, bytes(24)), (op.FSYNCDIR, four), (op.SYMLINK, b"a\0b\0")),
            *((op.LINK, word + b"a\0"), (op.RENAME, word + b"a\0b\0"), (op.REMOVEXATTR, b"u\0")),
            *((op.RENAME2, word + bytes(8) + b"a\0b\0"), (op.NOTIFY_REPLY, bytes(40))),
            (op.SETXATTR, struct.pack("=II", 3, 0) + b"user.x\0abc"),
        )
    )
    return request(rng, kernel, opcode, body, node=node(rng, kernel, rng.choice((0, 1, 2))))


def unknown(rng: Random, kernel: Kernel) -> bytes:
    """An opcode without a handler, or one that does not exist, with any body."""
    opcode = rng.choice(
        (op.CREATE, op.FLUSH, op.IOCTL, op.STATX, op.INIT, 0, 7, 19, 54, *WILD[4:7])
    )
    return request(rng, kernel, opcode, rng.randbytes(rng.choice((0, 8, 64))))


MAKERS: Final[dict[str, tuple[int, Maker]]] = {
    "lookup": (6, lookup),
    "mkdir": (6, mkdir),
    "mknod": (10, mknod),
    "open": (22, open_),
    "read": (5, read),
    "write": (6, write),
    "release": (12, release),
    "unlink": (5, unlink),
    "rmdir": (3, rmdir),
    "interrupt": (6, interrupt),
    "forget": (4, forget),
    "batch_forget": (2, batch_forget),
    "setattr": (3, setattr_),
    "getattr": (2, getattr_),
    "getxattr": (4, getxattr),
    "listxattr": (1, listxattr),
    "readdir": (3, readdir),
    "poll": (4, poll),
    "simple": (4, simple),
    "unknown": (3, unknown),
}


def mutated(rng: Random, kernel: Kernel, data: bytes) -> bytes:
    """The message with something wrong in it."""
    changed = bytearray(data)
    kind = rng.randrange(8)
    if kind == 0:  # cut short, and the header knows
        del changed[rng.randrange(HEADER_SIZE, len(changed) + 1) :]
        changed[:4] = struct.pack("=I", len(changed))
    elif kind == 1:  # cut anywhere, and the header does not
        del changed[rng.randrange(1, len(changed)) :]
    elif kind == 2:
        changed[:4] = struct.pack("=I", rng.choice(WILD[:7]))
    elif kind == 3:
        changed += rng.randbytes(rng.choice((1, 8, 100)))
        changed[:4] = struct.pack("=I", len(changed))
    elif kind == 4 and len(changed) > HEADER_SIZE:
        place = rng.randrange(HEADER_SIZE, len(changed))
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 5:
        changed[4:8] = struct.pack("=I", rng.randrange(56))
    elif kind == 6 and kernel.outstanding:
        changed[8:16] = struct.pack("=Q", rng.choice(list(kernel.outstanding)))
    elif kernel.last:
        return rng.choice(kernel.last)
    return bytes(changed)
