"""The device loop against a kernel that is played by the test, over a pair of sockets."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlmfs.errors import Bug, StoreFull
from dlmfs.fuse import opcodes as op
from dlmfs.fuse import wire
from dlmfs.fuse.device import DRAIN, Device, Reply
from tests.fuse import messages
from tests.fuse.tiny import Tiny

# What this module provokes is logged, by design.
pytestmark = pytest.mark.allow_warnings


class Scripted(Tiny):
    """Operations whose `open` does what the test says, and which note what else happens."""

    def __init__(self) -> None:
        super().__init__()
        self.on_open: Callable[[wire.Header, int], Reply] = lambda _h, _flags: self.opened()
        self.interrupted: list[int] = []
        self.lost: list[tuple[int, bytes]] = []

    def open(self, h: wire.Header, flags: int) -> Reply:
        return self.on_open(h, flags)

    def interrupt(self, unique: int) -> None:
        self.interrupted.append(unique)

    def undelivered(self, h: wire.Header, payload: bytes) -> None:
        self.lost.append((h.unique, payload))


class Bench:
    """A device, its operations, and the kernel's end of its descriptor."""

    def __init__(self, ready: bool = True) -> None:
        self.loop = asyncio.new_event_loop()
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.kernel.setblocking(False)
        self.operations = Scripted()
        self.device = Device(ours.detach(), self.operations, self.loop)
        self.operations.device = self.device
        self.events: list[str] = []
        self.device.on_ready = lambda: self.events.append("ready")
        self.device.on_end = lambda reason: self.events.append(f"end: {reason}")
        self.device.start()
        if ready:
            self.send(messages.init())
            self.replies()

    def close(self) -> None:
        self.device.close()
        self.kernel.close()
        self.loop.close()

    def turn(self) -> None:
        """Let the loop look at its descriptors once."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def send(self, *requests: bytes) -> None:
        for request in requests:
            self.kernel.send(request)
        self.turn()

    def replies(self) -> list[tuple[int, int, bytes]]:
        """What was answered: (unique, errno, payload)."""
        found: list[tuple[int, int, bytes]] = []
        while True:
            try:
                data = self.kernel.recv(65536)
            except BlockingIOError:
                return found
            length, code, unique = struct.unpack_from("=IiQ", data)
            assert length == len(data)
            found.append((unique, -code, data[16:]))

    def ask(self, *requests: bytes) -> list[tuple[int, int, bytes]]:
        self.send(*requests)
        return self.replies()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture
def fresh() -> Iterator[Bench]:
    bench = Bench(ready=False)
    yield bench
    bench.close()


# -- INIT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offered", "taken"), [(32, 32), (45, 45), (60, 45)])
def test_init_takes_the_smaller_minor_version(fresh: Bench, offered: int, taken: int) -> None:
    ((unique, code, payload),) = fresh.ask(messages.init(minor=offered))
    assert (unique, code, fresh.events) == (2, 0, ["ready"])
    major, minor, _readahead, flags, background, _, max_write = struct.unpack_from(
        "=IIIIHHI", payload
    )
    assert (major, minor, background, max_write) == (7, taken, 65535, 4096)
    # Neither ATOMIC_O_TRUNC (3), nor WRITEBACK_CACHE (16), nor READDIRPLUS (13), nor the two
    # kinds of remote file locks (1, 10).
    assert flags & (1 << 3 | 1 << 16 | 1 << 13 | 1 << 1 | 1 << 10) == 0
    assert flags & op.HANDLE_KILLPRIV


def test_init_of_a_kernel_without_extended_flags(fresh: Bench) -> None:
    ((_unique, code, payload),) = fresh.ask(messages.init_old())
    assert code == 0
    assert struct.unpack_from("=I", payload, 12)[0] & op.INIT_EXT == 0


def test_init_asks_for_nothing_that_was_not_offered(fresh: Bench) -> None:
    ((_unique, _code, payload),) = fresh.ask(messages.init(flags=0))
    assert struct.unpack_from("=I", payload, 12) == (0,)


def test_init_of_a_newer_major_version_is_asked_again(fresh: Bench) -> None:
    ((_unique, code, payload),) = fresh.ask(messages.init(major=8, minor=1))
    assert (code, payload[:4], fresh.events) == (0, struct.pack("=I", 7), [])
    fresh.ask(messages.init(unique=4))
    assert fresh.events == ["ready"]


@pytest.mark.parametrize(("major", "minor"), [(6, 99), (7, 22)])
def test_init_of_a_kernel_that_is_too_old(fresh: Bench, major: int, minor: int) -> None:
    ((_unique, code, _),) = fresh.ask(messages.init_old(major=major, minor=minor))
    assert code == errno.EPROTO
    assert "too old" in fresh.events[0]


def test_nothing_is_served_before_init(fresh: Bench) -> None:
    assert fresh.ask(messages.lookup(2, b"now"), messages.interrupt(2)) == [(2, errno.ENOSYS, b"")]


# -- dispatch -----------------------------------------------------------------------------------


def test_a_payload_is_sent(bench: Bench) -> None:
    ((unique, code, payload),) = bench.ask(messages.open_(4))
    assert (unique, code) == (4, 0)
    assert wire.opened_fh(payload) == 1
    assert bench.ask(messages.release(6, 1)) == [(6, 0, b"")]
    assert not bench.operations.open_files


def raising(error: Exception) -> Callable[[wire.Header, int], Reply]:
    def handler(_h: wire.Header, _flags: int) -> Reply:
        raise error

    return handler


@pytest.mark.parametrize(
    ("handler", "code"),
    [
        (lambda _h, _flags: errno.ETXTBSY, errno.ETXTBSY),
        (raising(OSError(errno.ENOTDIR, "said the handler")), errno.ENOTDIR),
        (raising(OSError("no errno")), errno.EIO),
        (raising(StoreFull("no space")), errno.ENOSPC),
        (raising(Bug("of ours")), errno.EIO),
        (raising(ValueError("of ours")), errno.EIO),
        (raising(struct.error("of ours")), errno.EIO),
        (lambda _h, _flags: 0, errno.EIO),
        (lambda _h, _flags: 4096, errno.EIO),
        (lambda _h, _flags: -errno.EPERM, errno.EIO),
    ],
)
def test_errors_of_a_handler(
    bench: Bench, handler: Callable[[wire.Header, int], Reply], code: int
) -> None:
    bench.operations.on_open = handler
    assert bench.ask(messages.open_(4)) == [(4, code, b"")]
    assert bench.ask(messages.lookup(6, b"none")) == [(6, errno.ENOENT, b"")]


@pytest.mark.parametrize(
    ("opcode", "code"),
    [
        *((op.CREATE, errno.ENOSYS), (op.FLUSH, errno.ENOSYS), (op.ACCESS, errno.ENOSYS)),
        *((op.IOCTL, errno.ENOTTY), (op.FALLOCATE, errno.EOPNOTSUPP)),
        *((op.TMPFILE, errno.EOPNOTSUPP), (op.LSEEK, errno.ENOSYS), (op.BMAP, errno.ENOSYS)),
        *((op.READDIRPLUS, errno.ENOSYS), (op.GETLK, errno.ENOSYS), (op.STATX, errno.ENOSYS)),
        *((op.COPY_FILE_RANGE, errno.ENOSYS), (op.INIT, errno.ENOSYS), (4711, errno.ENOSYS)),
    ],
)
def test_what_the_device_refuses_itself(bench: Bench, opcode: int, code: int) -> None:
    body = struct.pack("=16I", 7, 45, *(0,) * 14) if opcode == op.INIT else b"\0" * 64
    assert bench.ask(messages.request(opcode, 4, body)) == [(4, code, b"")]


def test_forget_has_no_reply(bench: Bench) -> None:
    one = messages.request(op.FORGET, 4, struct.pack("=Q", 3), node=2)
    two = messages.request(op.BATCH_FORGET, 6, struct.pack("=IIQQQQ", 2, 0, 2, 1, 3, 5))
    assert bench.ask(one, two) == []
    assert bench.operations.calls == ["forget 2 3", "forget 2 1", "forget 3 5"]


def test_destroy_is_answered(bench: Bench) -> None:
    assert bench.ask(messages.request(op.DESTROY, 4)) == [(4, 0, b"")]
    assert bench.operations.calls == ["destroy"]


def test_one_wake_up_serves_only_so_many(bench: Bench) -> None:
    for number in range(DRAIN + 5):
        bench.kernel.send(messages.lookup(4 + 2 * number, b"none"))
    bench.turn()
    assert len(bench.replies()) == DRAIN
    bench.turn()
    assert len(bench.replies()) == 5


# -- pending ------------------------------------------------------------------------------------


def pend(bench: Bench, unique: int) -> None:
    bench.operations.on_open = lambda _h, _flags: None
    assert bench.ask(messages.open_(unique)) == []


def test_a_pending_request_is_answered_later(bench: Bench) -> None:
    pend(bench, 4)
    assert bench.device.pending == 1
    assert bench.device.answer(4, b"payload")
    assert bench.replies() == [(4, 0, b"payload")]
    assert bench.device.pending == 0


def test_a_request_is_answered_once(bench: Bench) -> None:
    pend(bench, 4)
    assert bench.device.answer(4, errno.EINTR)
    with pytest.raises(Bug):
        bench.device.answer(4, b"again")
    with pytest.raises(Bug):
        bench.device.answer(6, b"never asked")
    assert len(bench.replies()) == 1


def test_interrupt_reaches_a_pending_request_once(bench: Bench) -> None:
    pend(bench, 4)
    assert bench.ask(messages.interrupt(4), messages.interrupt(4)) == []
    assert bench.operations.interrupted == [4]
    assert bench.device.answer(4, errno.EINTR)
    assert bench.replies() == [(4, errno.EINTR, b"")]


def test_interrupt_of_something_answered_or_unknown_is_ignored(bench: Bench) -> None:
    pend(bench, 4)
    bench.device.answer(4, errno.EINTR)
    bench.replies()
    assert bench.ask(messages.interrupt(4), messages.interrupt(99)) == []
    assert bench.operations.interrupted == []


def test_a_request_that_repeats_a_pending_one_is_dropped(bench: Bench) -> None:
    pend(bench, 4)
    assert bench.ask(messages.open_(4), messages.request(op.CREATE, 4)) == []
    assert bench.device.answer(4, b"")
    assert bench.replies() == [(4, 0, b"")]


# -- replies that do not arrive -----------------------------------------------------------------


class Failing:
    """Stands in for os.write: fails with the given errnos in turn, then writes."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.write = os.write

    def __call__(self, fd: int, data: bytes) -> int:
        if self.codes:
            raise OSError(self.codes.pop(0), "from the kernel")
        return self.write(fd, data)


def test_an_aborted_request_is_undone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlmfs.fuse.device.os.write", Failing(errno.ENOENT))
    assert bench.ask(messages.open_(4)) == []
    assert bench.operations.lost == [(4, wire.opened(1, 0b100001))]


def test_an_aborted_pending_request_is_reported(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pend(bench, 4)
    monkeypatch.setattr("dlmfs.fuse.device.os.write", Failing(errno.ENOENT))
    assert not bench.device.answer(4, wire.opened(1, 0))
    assert bench.operations.lost == []  # the caller of `answer` knows already


def test_an_error_that_does_not_arrive_needs_no_undoing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.operations.on_open = lambda _h, _flags: errno.ETXTBSY
    monkeypatch.setattr("dlmfs.fuse.device.os.write", Failing(errno.ENOENT))
    assert bench.ask(messages.open_(4)) == []
    assert bench.operations.lost == []


def test_a_reply_that_the_kernel_refuses_becomes_eio(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlmfs.fuse.device.os.write", Failing(errno.EINVAL))
    assert bench.ask(messages.open_(4)) == [(4, errno.EIO, b"")]
    assert [unique for unique, _payload in bench.operations.lost] == [4]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTCONN, errno.EBADF, errno.EINVAL])
def test_notifications_never_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    bench.device.notify_poll(7)
    assert bench.kernel.recv(100) == wire.notify_poll(7)
    monkeypatch.setattr("dlmfs.fuse.device.os.write", Failing(code, code))
    bench.device.notify_poll(7)
    bench.device.invalidate_inode(7)
    bench.device.close()
    bench.device.notify_poll(7)
    bench.device.invalidate_entry(1, b"name")


def test_invalidated_names_are_sent(bench: Bench) -> None:
    bench.kernel.settimeout(10)
    bench.device.invalidate_entry(1, b"one")
    bench.device.invalidate_entry(1, b"two")
    assert bench.kernel.recv(100) == wire.notify_inval_entry(1, b"one")
    assert bench.kernel.recv(100) == wire.notify_inval_entry(1, b"two")


# -- the end ------------------------------------------------------------------------------------


class Reading:
    """Stands in for os.read: raises or returns what it was given, in turn."""

    def __init__(self, *steps: int | bytes) -> None:
        self.steps = list(steps)

    def __call__(self, fd: int, size: int) -> bytes:
        step = self.steps.pop(0) if self.steps else errno.EAGAIN
        if isinstance(step, int):
            raise OSError(step, "from the kernel")
        return step


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENODEV, "unmounted"),
        (errno.ECONNABORTED, "aborted"),
        (errno.ENOTCONN, "aborted"),
        (errno.EPERM, "reading the FUSE device"),
    ],
)
def test_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    pend(bench, 4)
    monkeypatch.setattr("dlmfs.fuse.device.os.read", Reading(code))
    bench.send(b"anything")
    assert len(bench.events) == 2
    assert reason in bench.events[1]
    assert not bench.device.answer(4, b"too late")
    bench.turn()
    assert len(bench.events) == 2
    bench.device.close()
    bench.device.close()


def test_an_aborted_or_interrupted_read_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(errno.ENOENT, errno.ENOENT, messages.lookup(4, b"none"))
    monkeypatch.setattr("dlmfs.fuse.device.os.read", reading)
    assert bench.ask(b"anything") == [(4, errno.ENOENT, b"")]
    assert bench.events == ["ready"]


def test_close_is_no_end(bench: Bench) -> None:
    bench.device.close()
    bench.turn()
    assert bench.events == ["ready"]


# -- any bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 39])
def test_less_than_a_header_is_ignored(bench: Bench, size: int) -> None:
    if size:
        assert bench.ask(messages.lookup(4, b"now")[:size]) == []
    assert bench.ask(messages.lookup(6, b"none")) == [(6, errno.ENOENT, b"")]


def test_malformed_requests_are_einval(bench: Bench) -> None:
    cut = messages.lookup(4, b"now")[:-1]
    no_name = messages.request(op.LOOKUP, 6, b"")
    short = messages.request(op.OPEN, 8, b"\0\0\0\0")
    found = bench.ask(cut, no_name, short)
    assert found == [(unique, errno.EINVAL, b"") for unique in (4, 6, 8)]


def test_malformed_requests_without_reply_get_none(bench: Bench) -> None:
    assert (
        bench.ask(
            messages.request(op.FORGET, 4, b"\0"),
            messages.request(op.INTERRUPT, 5, b"\0"),
            messages.request(op.BATCH_FORGET, 6, struct.pack("=II", 9999, 0)),
            messages.interrupt(4)[:-1],
        )
        == []
    )


def sample(rng: random.Random, unique: int) -> bytes:
    """A request that is well-formed, more or less."""
    made: list[Any] = [
        messages.open_(unique, node=rng.choice([2, 3])),
        messages.release(unique, rng.randrange(50)),
        messages.read(unique, 1, rng.randrange(100), rng.randrange(100)),
        messages.write(unique, 1, rng.randrange(100), rng.randbytes(rng.randrange(100))),
        messages.lookup(unique, rng.choice([b"now", b"held", b"none"])),
        messages.setattr_(unique, rng.randrange(512)),
        messages.interrupt(rng.randrange(max(1, unique)) & ~1),
        messages.request(rng.randrange(60), unique, rng.randbytes(rng.randrange(90))),
        messages.request(op.BATCH_FORGET, unique, struct.pack("=IIQQ", rng.randrange(3), 0, 1, 1)),
    ]
    message = bytearray(rng.choice(made))
    match rng.randrange(6):
        case 0:
            del message[rng.randrange(len(message)) :]
        case 1:
            message[rng.randrange(len(message))] = rng.randrange(256)
        case 2:
            message += rng.randbytes(rng.randrange(1, 20))
    return bytes(message) or b"\0"


@pytest.mark.parametrize("seed", range(20))
def test_the_device_survives_anything(bench: Bench, seed: int) -> None:
    """Garbled, cut, repeated and reordered requests: each unique is answered at most once at a
    time, and afterwards the device still works."""
    rng = random.Random(seed)

    def open_(h: wire.Header, _flags: int) -> Reply:
        if h.node == 3:
            return None
        return errno.ETXTBSY if rng.random() < 0.5 else bench.operations.opened()

    bench.operations.on_open = open_
    sent: list[bytes] = []
    for number in range(300):
        message = sample(rng, 4 + 2 * number)
        if sent and rng.random() < 0.1:
            message = rng.choice(sent)
        sent.append(message)
        bench.send(message)
        found = bench.replies()
        assert len(found) <= 1
    assert bench.events == ["ready"]
    for unique in list(bench.device._pending):
        assert bench.device.answer(unique, errno.EINTR)
    bench.replies()
    unique = 1 << 60
    assert bench.ask(messages.lookup(unique, b"none")) == [(unique, errno.ENOENT, b"")]
