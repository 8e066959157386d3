"""Names that nobody uses: which files go by themselves, and which stay."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from dlmfs.config import parse_options
from dlmfs.engine.forgetting import leave_unused
from dlmfs.errors import UsageError
from dlmfs.fs.tree import LockFile
from dlmfs.fuse import opcodes, wire
from dlmfs.model import EMPTY_LVB
from tests.fs.nodes import ROOT, Nodes, dlmfs
from tests.fs.simulated import Mount

TRANSIENT = stat.S_IFREG | stat.S_ISVTX | 0o644
PLAIN = stat.S_IFREG | 0o644
LONG_S = 90.0
"""Enough for every look that is still to come."""
DEADLINE_S = 60.0


class Names(Mount):
    """A mount in whose domain files are made by the kernel's own requests."""

    def make(self, name: bytes, mode: int = TRANSIENT) -> LockFile:
        header = self.header(self.file.domain.ino, opcodes.MKNOD)
        reply = self.fs.mknod(header, name, mode, 0, 0)
        assert isinstance(reply, bytes), reply
        file = self.fs.tree.inodes[wire.entry_node(reply)]
        assert isinstance(file, LockFile)
        return file

    def ask(self, file: LockFile, flags: int = os.O_RDWR) -> int:
        """The number of an open that is sent."""
        header = self.header(file.ino, opcodes.OPEN)
        reply = self.fs.open(header, flags)
        if reply is not None:
            self.kernel.said[header.unique] = reply
        return header.unique

    def use(self, file: LockFile) -> int:
        """Open it: the handle."""
        unique = self.ask(file)
        assert self.loop.run_until(lambda: unique in self.kernel.said, 10)
        said = self.kernel.said[unique]
        assert isinstance(said, bytes), said
        return wire.opened_fh(said)

    def leave(self, file: LockFile, fh: int) -> None:
        self.fs.release(self.header(file.ino, opcodes.RELEASE), fh)

    def write(self, file: LockFile, fh: int, data: bytes) -> None:
        header = self.header(file.ino, opcodes.WRITE)
        assert self.fs.write(header, fh, 0, data) is None
        assert self.loop.run_until(lambda: header.unique in self.kernel.said, 10)

    @property
    def names(self) -> set[bytes]:
        return set(self.file.domain.children)

    @property
    def heads(self) -> set[bytes]:
        keys = self.space.keys
        found = self.space.store.server.data  # type: ignore[attr-defined]
        return {key[len(keys.heads) :] for key in found if key.startswith(keys.heads)}


@pytest.fixture
def mount() -> Names:
    return Names()


def test_a_transient_file_goes_when_it_is_closed(mount: Names) -> None:
    mount.space._leased = False
    for number in range(200):
        file = mount.make(b"job-%d" % number)
        mount.leave(file, mount.use(file))
    assert mount.loop.run_until(lambda: mount.names == {b"x"}, 10)
    assert not mount.heads
    assert not mount.space.locks
    assert not mount.space.left_keys, "no lease: nobody will ever ask whether they are gone"
    assert mount.fs.usage.locks == 1
    assert all(not mount.fs.tree.inodes[ino].linked for ino in mount.fs.tree.inodes if ino > 3)


def test_one_that_is_made_and_never_opened_goes_too(mount: Names) -> None:
    mount.make(b"tried")
    assert mount.loop.run_until(lambda: mount.names == {b"x"}, 10)


def test_a_file_that_is_in_use_stays_and_goes_afterwards(mount: Names) -> None:
    file = mount.make(b"long")
    fh = mount.use(file)
    mount.loop.run_for(1000.0)
    assert b"long" in mount.names
    mount.leave(file, fh)
    assert mount.loop.run_until(lambda: b"long" not in mount.names, 2 * 61)
    assert not mount.heads


def test_a_name_that_is_used_again_and_again_stays_cached(mount: Names) -> None:
    file = mount.make(b"hot")
    mount.leave(file, mount.use(file))
    revision = mount.space.locks[b"hot"].res.revision
    for _ in range(100):
        mount.loop.run_for(0.8)
        mount.leave(file, mount.use(file))
    assert mount.space.locks[b"hot"].res.revision == revision


def test_a_file_that_was_there_before_stays(mount: Names) -> None:
    file = mount.make(b"kept", PLAIN)
    mount.leave(file, mount.use(file))
    mount.loop.run_for(LONG_S)
    assert b"kept" in mount.names
    assert mount.heads == {b"kept"}


def test_a_value_keeps_its_file_until_it_is_empty(mount: Names) -> None:
    file = mount.make(b"valued")
    fh = mount.use(file)
    mount.write(file, fh, b"here")
    mount.leave(file, fh)
    mount.loop.run_for(LONG_S)
    assert b"valued" in mount.names
    fh = mount.use(file)
    mount.write(file, fh, EMPTY_LVB)
    mount.leave(file, fh)
    assert mount.loop.run_until(lambda: b"valued" not in mount.names, 3 * 61)
    assert not mount.heads


def test_the_sticky_bit_can_be_given_and_taken_away(mount: Names) -> None:
    kept, given = mount.make(b"kept"), mount.make(b"given", PLAIN)
    for file, mode in ((kept, PLAIN), (given, TRANSIENT)):
        change = wire.SetAttr(0, None, None, None, None, mode, None, None, False, False)
        assert isinstance(mount.fs.setattr(mount.header(file.ino, opcodes.SETATTR), change), bytes)
    mount.loop.run_for(LONG_S)
    assert mount.names == {b"x", b"kept"}


def test_with_forget_every_idle_file_goes() -> None:
    mount = Names()
    mount.fs.unused._forget_s = 30.0
    idle, held, touched = (mount.make(name, PLAIN) for name in (b"idle", b"held", b"touched"))
    mount.leave(idle, mount.use(idle))
    fh = mount.use(held)
    mount.loop.run_for(25.0)
    assert {idle.name, held.name, touched.name} <= mount.names
    mount.loop.run_for(40.0)
    assert mount.names == {b"x", b"held"}
    mount.leave(held, fh)
    assert mount.loop.run_until(lambda: b"held" not in mount.names, 2 * 61)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY])
def test_the_engine_leaves_nothing_that_is_open_or_awaited(mount: Names, flags: int) -> None:
    """Whoever asks: only the engine knows."""
    file = mount.make(b"held")
    fh = mount.use(file)
    waiting = mount.ask(file, flags)
    lock = mount.space.locks[b"held"]
    leave_unused(lock, pytest.fail)
    assert not lock.busy
    mount.leave(file, fh)
    leave_unused(lock, pytest.fail)
    mount.loop.run_for(0.5)
    assert isinstance(mount.kernel.said[waiting], bytes)
    assert b"held" in mount.heads


def leaving(mount: Names) -> LockFile:
    """A file whose lock the node is leaving just now: the commit is under way."""
    file = mount.make(b"racing")
    mount.leave(file, mount.use(file))
    lock = mount.space.locks[file.name]
    assert mount.loop.run_until(lambda: lock.busy, 10)
    return file


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_NONBLOCK])
def test_who_opens_meanwhile_has_the_lock(mount: Names, flags: int) -> None:
    file = leaving(mount)
    before = mount.space.locks[file.name].res.revision
    unique = mount.ask(file, flags)
    assert mount.loop.run_until(lambda: unique in mount.kernel.said, 10)
    said = mount.kernel.said[unique]
    assert isinstance(said, bytes), said
    assert file.linked
    assert mount.space.locks[file.name].res.revision > before, "tokens go on growing (promise 2)"
    mount.leave(file, wire.opened_fh(said))
    assert mount.loop.run_until(lambda: b"racing" not in mount.names, 2 * 61)


def test_who_comes_after_is_told_to_look_again(mount: Names) -> None:
    file = leaving(mount)
    assert mount.loop.run_until(lambda: not file.linked, 10)
    unique = mount.ask(file)
    assert mount.kernel.said[unique] == errno.ESTALE
    fh = mount.use(mount.make(b"racing"))
    assert mount.fs.handles[fh].token


def test_an_unlink_meanwhile_is_done_once(mount: Names) -> None:
    leaving(mount)
    header = mount.header(mount.file.domain.ino, opcodes.UNLINK)
    assert mount.fs.unlink(header, b"racing") is None
    assert mount.loop.run_until(lambda: header.unique in mount.kernel.said, 10)
    assert mount.kernel.said[header.unique] == b""
    assert mount.fs.usage.locks == 1
    assert not mount.heads


# -- with real mounts ---------------------------------------------------------------------------------

MANY = """
import sys
import dlmfs.client
for number in range(40):
    with dlmfs.client.Lock(f"{sys.argv[1]}/dom/job-{number}"):
        pass
"""
AGAIN = """
import os, random, sys, threading, time
where, held = sys.argv[1:]
failures = []
def use(name, rng):
    for _ in range(3):
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o1644)
            mark = f"{held}/{name[-1]}"
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails if another has the lock, too
            print(name[-1], os.getxattr(fd, "user.dlmfs.token").decode(), flush=True)
            os.unlink(mark)
            os.close(fd)
        except OSError as error:
            failures.append(f"{name}: {error}")
            return
        time.sleep(rng.uniform(0.99, 1.05))
threads = [
    threading.Thread(target=use, args=(f"{where}/dom/n{n % 3}", random.Random(n))) for n in range(6)
]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit("; ".join(failures) or 0)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def python(script: str, *args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", script, *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def heads(nodes: Nodes) -> list[bytes]:
    with contextlib.closing(sqlite3.connect(f"file:{nodes.state}?mode=ro", uri=True)) as state:
        rows = state.execute("SELECT key FROM kv").fetchall()
    return [key for (key,) in rows if key.startswith(b"h/")]


@pytest.mark.fuse
def test_names_that_the_clients_use_once_leave_nothing(nodes: Nodes) -> None:
    where = nodes.mount("a", "holder=file")
    (where / "dom").mkdir()
    (where / "dom/mine").touch()
    child = python(MANY, str(where))
    done = dlmfs("lock", str(where / "dom/once"), "--", "true")
    child.communicate(timeout=DEADLINE_S)
    assert (done.returncode, child.returncode) == (0, 0)
    wait_until(lambda: os.listdir(where / "dom") == ["mine"])
    assert heads(nodes) == [b"h/dom/mine"]


@pytest.mark.parametrize(("text", "seconds"), [("30", 30.0), ("0.5", 0.5), ("0", None)])
def test_forget_takes_seconds(text: str, seconds: float | None) -> None:
    assert parse_options([f"forget={text}"]).forget_s == seconds


@pytest.mark.parametrize("text", ["", "-1", "nan", "a day", "1e9"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give seconds from 0 to"):
        parse_options([f"forget={text}"])


@pytest.mark.fuse
def test_with_forget_what_touch_made_goes_too(nodes: Nodes) -> None:
    where = nodes.mount("a", "forget=0.2")
    (where / "dom").mkdir()
    (where / "dom/touched").touch()
    os.close(os.open(where / "dom/held", os.O_RDWR | os.O_CREAT, 0o644))
    wait_until(lambda: os.listdir(where / "dom") == [])
    assert not heads(nodes)


@pytest.mark.fuse
def test_programs_that_open_again_never_notice(nodes: Nodes) -> None:
    a, b = nodes.pair("holder=file")
    (nodes.folder / "held").mkdir()
    children = [python(AGAIN, str(where), str(nodes.folder / "held")) for where in (a, b)]
    told = [child.communicate(timeout=DEADLINE_S)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    tokens = [line.split() for text in told for line in text.splitlines()]
    assert len(tokens) == len({tuple(each) for each in tokens}) == 2 * 6 * 3
    for where in (a, b):
        wait_until(lambda where=where: os.listdir(where / "dom") == [])  # type: ignore[misc]
    assert not heads(nodes)
