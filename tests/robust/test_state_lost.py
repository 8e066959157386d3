"""The state file goes away or turns into something else while nodes use it.

What is in SQLite's log (-wal) may outlive damage to the file itself, so after damage in place an
operation may also succeed; it must then be right. What must never happen: a dead daemon, an errno
that the reference does not name, two nodes with one lock, an umount that hangs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs
from tests.robust.helpers import (
    LONG,
    daemon_of,
    ended,
    error_of,
    kill,
    leaves,
    remount,
    sound,
    use,
    wanted,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600 if LONG else 120)]

LOST = {errno.EIO, errno.ENOLCK}
"""The errors of docs/reference.md for a lock, and a node, that lost its store."""

TURNS = 200 if LONG else 8

NEW = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK


def delete(state: Path, _other: Path) -> None:
    state.unlink()


def replace(state: Path, other: Path) -> None:
    os.replace(other, state)


def truncate(state: Path, _other: Path) -> None:
    os.truncate(state, 0)


def halve(state: Path, _other: Path) -> None:
    os.truncate(state, state.stat().st_size // 2 + 100)


def garble(state: Path, _other: Path) -> None:
    """Overwritten in place, the header too."""
    with open(state, "r+b") as file:
        file.write(bytes(range(1, 256)) * (state.stat().st_size // 255))


def overwrite(state: Path, other: Path) -> None:
    """`cp other state`: the same inode, another sound state in it."""
    shutil.copyfile(other, state)


Damage = Callable[[Path, Path], None]
GONE_AT_ONCE: list[Damage] = [delete, replace]
IN_PLACE: list[Damage] = [truncate, halve, garble, overwrite]


@pytest.fixture
def other(nodes: Nodes) -> Path:
    """A sound state of another lock space, in which the same lock exists."""
    path = nodes.folder / "other.db"
    where = nodes.folder / "elsewhere"
    where.mkdir()
    nodes.mounts.append(where)
    dlmfs("mount", f"local:{path}", str(where), "-o", "node=a")
    (where / "dom").mkdir()
    with open(where / "dom/x", "w+b", buffering=0) as file:
        file.write(b"of another space")
    kill(where)  # so that heads and members stay in the file
    dlmfs("umount", str(where))
    with contextlib.closing(sqlite3.connect(path)) as conn:  # its log into the file itself
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert sound(path)
    return path


@contextlib.contextmanager
def living(*mounts: Path) -> Iterator[None]:
    """The daemons of these mounts live through the block."""
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(daemon_of(where)) for where in mounts]
        yield
        for handle, where in zip(handles, mounts, strict=True):
            assert not ended(handle, 0), f"the daemon of {where.name} died"


def serves(fd: int) -> bool:
    """Whether a descriptor still gives its lock's value."""
    code = error_of(lambda: os.pread(fd, 64, 0))
    assert code in LOST | {0}, os.strerror(code)
    return code == 0


def starts_anew(nodes: Nodes, name: str) -> None:
    """With the damaged file moved away, as the message of a refused mount says, all is well."""
    for path in nodes.folder.glob("state.db*"):
        path.rename(nodes.folder / f"damaged-{path.name}")
    where = remount(nodes, name)
    (where / "dom").mkdir()
    with open(where / "dom/x", "w+b", buffering=0) as file:
        assert os.pread(file.fileno(), 64, 0) == bytes(64)
        file.write(b"new")
    leaves(where)


USES: list[tuple[str, Callable[[Path, int], object]]] = [
    ("read", lambda _where, fd: os.pread(fd, 64, 0)),
    ("write", lambda _where, fd: os.pwrite(fd, b"v", 0)),
    ("open of a cached lock", lambda where, _fd: os.close(os.open(where / "dom/x", NEW))),
    ("open of a new lock", lambda where, _fd: os.close(os.open(where / "dom/new", NEW))),
    ("mkdir", lambda where, _fd: (where / "more").mkdir()),
]


@pytest.mark.parametrize("damage", GONE_AT_ONCE if LONG else [replace])
def test_every_operation_notices_that_the_file_is_gone(
    nodes: Nodes, other: Path, damage: Damage
) -> None:
    """The first one after it, whichever it is: the path may name another lock space already."""
    unnoticed = []
    for number, (name, operation) in enumerate(USES):
        where = nodes.mount(f"a{number}")
        (where / "dom").mkdir()
        fd = os.open(where / "dom/x", NEW)
        try:
            os.pwrite(fd, b"kept", 0)
            spare = nodes.folder / "spare.db"
            shutil.copyfile(other, spare)
            with living(where):
                damage(nodes.state, spare)
                code = error_of(partial(operation, where, fd))
                assert code in LOST | {0}, f"{name}: {os.strerror(code)}"
                if code == 0:
                    unnoticed.append(name)
        finally:
            os.close(fd)
        leaves(where)
    assert not unnoticed, f"served from a state that is gone: {unnoticed}"


@pytest.mark.parametrize("damage", GONE_AT_ONCE if LONG else [delete])
def test_the_file_is_gone_under_two_nodes(nodes: Nodes, other: Path, damage: Damage) -> None:
    """Holder, waiter and poll all hear of it with no operation of theirs; both nodes can go."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", NEW)
    try:
        waiter = nodes.hold(b / "dom/x")
        poll = select.poll()
        poll.register(fd, select.POLLERR)
        wanted(fd)
        with living(a, b):
            damage(nodes.state, other)
            assert poll.poll(PATIENCE_S * 1000)[0][1] & select.POLLERR
            answer = waiter.wait().split()
            assert answer[0] == "error"
            assert int(answer[1]) in LOST
            assert not serves(fd)
            for where in (a, b):
                assert error_of(partial(os.open, where / "dom/y", NEW)) in LOST
                lease = nodes.status(where)["lease"]
                assert lease["state"] == "FENCED"
                assert "deleted or replaced" in lease["reason"]
    finally:
        os.close(fd)
    leaves(a)
    leaves(b)
    for name in "ab":
        where = remount(nodes, name)
        (where / "dom").mkdir()
        assert nodes.hold(where / f"dom/{name}").wait() == "held"


@pytest.mark.parametrize(
    ("damage", "pair"),
    [
        pytest.param(damage, pair, id=f"{damage.__name__}-{'two' if pair else 'one'}")
        for damage in IN_PLACE
        for pair in (False, True)
        if LONG or (pair and damage in (garble, overwrite))
    ],
)
def test_the_file_is_damaged_in_place(
    nodes: Nodes, other: Path, damage: Damage, pair: bool
) -> None:
    mounts = [nodes.mount(name) for name in ("ab" if pair else "a")]
    for where in mounts:
        (where / "dom").mkdir()
    a, b = mounts[0], mounts[-1]
    fd = os.open(a / "dom/x", NEW)
    fds = [fd]
    try:
        os.pwrite(fd, b"kept", 0)
        with living(*mounts):
            damage(nodes.state, other)
            for turn in range(TURNS):
                if not _turn(a, b, turn, fds):
                    break
            assert dlmfs("status", "--json", str(a)).returncode == 0
    finally:
        for each in fds:
            os.close(each)
    for where in mounts:
        leaves(where)
    starts_anew(nodes, "a")


def _turn(a: Path, b: Path, turn: int, fds: list[int]) -> bool:
    """A bit of everything on damaged state; False once the second node has the first one's lock."""
    fd, text = fds[0], b"%4d" % turn
    code = error_of(lambda: os.pwrite(fd, text, 0))
    assert code in LOST | {0}, os.strerror(code)
    if code == 0:
        assert not serves(fd) or os.pread(fd, 4, 0) == text
    first = len(fds)
    for where in {a, b}:
        new = _attempt(where / f"dom/n{turn}", fds)
        assert new in LOST | {0, errno.ETXTBSY}, os.strerror(new)
    assert sum(map(serves, fds[first:])) <= 1, "both nodes have a new lock"
    made = error_of((a / f"d{turn}").mkdir)
    assert made in LOST | {0}, os.strerror(made)
    if a != b and _attempt(b / "dom/x", fds) == 0:
        assert not serves(fd), "both nodes have the lock"
        return False
    return True


def _attempt(path: Path, fds: list[int]) -> int:
    """A trylock; what it opens is closed at the end of the test."""

    def attempt() -> None:
        fds.append(os.open(path, NEW))

    return error_of(attempt)


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_the_log_beside_the_state_is_deleted(nodes: Nodes, suffix: str) -> None:
    """Whoever mounts then would build a log of its own: two lock spaces in one file."""
    a = nodes.mount("a")
    (a / "dom").mkdir()
    fds: list[int] = []
    try:
        assert _attempt(a / "dom/x", fds) == 0
        os.pwrite(fds[0], b"kept", 0)
        with living(a):
            Path(f"{nodes.state}{suffix}").unlink()
            b = nodes.folder / "b"
            b.mkdir()
            nodes.mounts.append(b)
            done = dlmfs("mount", f"local:{nodes.state}", str(b), "-o", "node=b", check=False)
            assert done.returncode in (0, 32), done.stderr
            if done.returncode == 0 and error_of((b / "dom").mkdir) == 0:
                for name in "xpqr":
                    first = len(fds)
                    codes = [_attempt(where / "dom" / name, fds) for where in (b, a)]
                    assert set(codes) <= LOST | {0, errno.ETXTBSY}
                    # a may have x through another descriptor of its own
                    new = fds[first:] if name != "x" else fds[first : first + (codes[0] == 0)]
                    old = [] if name != "x" else [fds[0]]
                    assert sum(map(serves, new + old)) <= 1, f"both nodes have {name}"
    finally:
        for fd in fds:
            os.close(fd)


def test_the_folder_of_sessions_is_deleted(nodes: Nodes) -> None:
    """Without its lock file a live node looks dead. Taken for so, it must know it; both come back."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", NEW)
    try:
        os.pwrite(fd, b"kept", 0)
        waiter = nodes.hold(b / "dom/x")
        wanted(fd)
        with living(a, b):
            shutil.rmtree(f"{nodes.state}.d")
            lost = select.poll()
            lost.register(fd, select.POLLERR)
            told = bool(lost.poll(2000))
            if told:
                assert error_of(partial(os.pread, fd, 4, 0)) in LOST
            if waiter.poll(0):
                if waiter.said[0] == "held":
                    assert not serves(fd), "both nodes have the lock"
                else:
                    assert int(waiter.said[1]) in LOST
    finally:
        os.close(fd)
        waiter.process.kill()
    for where in (a, b):
        _comes_back(nodes, where)
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    assert use(b, "try", b / "dom/x") == (errno.ETXTBSY, "")
    holder.release()
    leaves(a)
    leaves(b)


def _comes_back(nodes: Nodes, where: Path) -> None:
    """Until the node serves a lock of its own again; meanwhile it says that it does not."""
    limit = time.monotonic() + PATIENCE_S
    while use(where, "try", where / f"dom/of-{where.name}")[0]:
        lease = nodes.status(where)["lease"]
        assert time.monotonic() < limit, f"{where.name} does not come back: {lease}"
