"""libo2dlm's calls. The codes were recorded from the C library, version 1.8.7, on a mount of ours
that was made to look like the kernel's to it."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dlmfs.client import UsageError, o2dlm
from dlmfs.client.o2dlm import EXMODE, PRMODE, TRYLOCK, Code, Context, Level, O2dlmError
from tests.client.conftest import Twice
from tests.fs.nodes import PATIENCE_S, Nodes
from tests.robust.helpers import kill

pytestmark = pytest.mark.fuse


def code(call: Callable[..., object], *args: object) -> int:
    """0, or the library's error code."""
    try:
        call(*args)
    except O2dlmError as error:
        return error.code
    return 0


def test_the_table_of_errors() -> None:
    assert list(Code) == list(range(-1485330944, -1485330912))
    assert str(O2dlmError(Code.LVB_INVALID, "x")) == "O2DLM_ET_LVB_INVALID: x"


def test_initialize(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    a = nodes.mount("a", "holder=file")
    (a / "dom").mkdir()
    (a / "dom/file").touch()
    recorded = [
        ("/nonexistent", "dom", -1485330935),
        ("/etc/passwd", "dom", -1485330937),
        (a, "d" * 399, -1485330939),
        (a, "d" * 255, -1485330939),
        (a, "d" * 254, -1485330929),
        (a, "d" * 64, -1485330929),
        (a, "", -1485330922),
        (a, "a/b", -1485330929),
        (nodes.folder, "dom", -1485330936),
        (a, "dom", 0),
    ]
    for path, domain, result in recorded:
        assert code(o2dlm.initialize, path, domain) == result, (path, domain)
    assert code(o2dlm.initialize, a, "dom/file") == Code.BAD_DOMAIN_DIR
    monkeypatch.setenv("DLMFS_MOUNT", str(a))
    assert o2dlm.initialize(None, "dom").path == str(a / "dom")
    monkeypatch.setenv("DLMFS_MOUNT", "/tmp")
    with pytest.raises(UsageError, match="not on a dlmfs mount"):
        o2dlm.initialize(None, "dom")


def test_the_calls_answer_as_the_c_library(nodes: Nodes) -> None:
    a = nodes.mount("a", "holder=file")
    x, y = o2dlm.initialize(a, "dom"), o2dlm.initialize(a, "dom")
    long = "aaaaaaaaaabbbbbbbbbbccccccccccd"
    assert len(long) == 31
    recorded: list[tuple[int, Callable[..., object], tuple[object, ...]]] = [
        (-1485330942, o2dlm.lock, (x, long + "d", 0, EXMODE)),
        (0, o2dlm.lock, (x, long, 0, EXMODE)),
        (-1485330922, o2dlm.lock, (x, "", 0, PRMODE)),
        (-1485330942, o2dlm.lock, (x, ".x", 0, PRMODE)),
        (-1485330922, o2dlm.lock, (x, "$x", 0, PRMODE)),
        (-1485330922, o2dlm.lock, (x, "a/b", 0, PRMODE)),
        (-1485330941, o2dlm.lock, (x, "l", 0, 7)),
        (0, o2dlm.lock, (x, "l", 0xF0, PRMODE)),
        (-1485330923, o2dlm.lock, (x, "l", 0, EXMODE)),
        (-1485330919, o2dlm.lock, (y, "l", TRYLOCK, EXMODE)),
        (0, o2dlm.lock, (y, "m", 0, EXMODE)),
        (0, o2dlm.read_lvb, (x, "l", 100)),
        (-1485330917, o2dlm.write_lvb, (x, "l", b"hey")),
        (0, o2dlm.write_lvb, (y, "m", bytes(100))),
        (0, o2dlm.write_lvb, (y, "m", b"")),
        (-1485330913, o2dlm.read_lvb, (y, "m", 0)),
        (-1485330924, o2dlm.read_lvb, (x, "nope", 9)),
        (-1485330924, o2dlm.unlock, (x, "nope")),
        (-1485330927, o2dlm.drop_lock, (x, "l")),
        (-1485330927, o2dlm.drop_lock, (y, "l")),
        (-1485330925, o2dlm.drop_lock, (x, "nope")),
        (-1485330925, o2dlm.drop_lock, (x, "")),
        (-1485330925, o2dlm.drop_lock, (x, long + "d")),
        (0, o2dlm.unlock, (x, "l")),
        (0, o2dlm.drop_lock, (x, "l")),
        (-1485330924, o2dlm.unlock, (x, long + "d")),
        (0, o2dlm.destroy, (x,)),
    ]
    for result, call, args in recorded:
        assert code(call, *args) == result, (call.__name__, args)
    assert (a / "dom").is_dir(), "y is in it"
    assert os.listdir(a / "dom") != []
    assert code(o2dlm.destroy, y) == 0
    assert not (a / "dom").exists()
    assert code(o2dlm.destroy, y) == Code.DOMAIN_DIR


def test_values_between_two_nodes(nodes: Nodes) -> None:
    a, b = nodes.pair()
    x, y = o2dlm.initialize(a, "dom"), o2dlm.initialize(b, "dom")
    o2dlm.lock(x, "l", 0, EXMODE)
    assert o2dlm.write_lvb(x, "l", b"hello" + bytes(100)) == 64
    assert code(o2dlm.lock, y, "l", TRYLOCK, PRMODE) == Code.TRYLOCK_FAILED
    o2dlm.unlock(x, "l")
    o2dlm.lock(y, "l", 0, PRMODE)
    assert o2dlm.read_lvb(y, "l", 5) == b"hello"
    for context in (x, y):
        o2dlm.destroy(context)
    assert not (a / "dom").exists()
    assert not (b / "dom").exists()


WAITER = """
import sys
from dlmfs.client import o2dlm
context = o2dlm.initialize(sys.argv[1], "dom")
o2dlm.lock(context, "l", 0, o2dlm.EXMODE)
print("has", flush=True)
"""


def test_a_blocking_notice(nodes: Nodes) -> None:
    """The program polls, calls process_bast, and its function lets go."""
    a, b = nodes.pair()
    context = o2dlm.initialize(a, "dom")
    seen: list[str] = []

    def let_go(name: str) -> None:
        seen.append(name)
        o2dlm.unlock(context, name)

    fd = o2dlm.lock_with_bast(context, "l", 0, EXMODE, let_go, "l")
    assert not select.select([fd], [], [], 0)[0]
    source = str(Path(__file__).parents[2] / "src")
    waiter = subprocess.Popen(
        [sys.executable, "-c", WAITER, str(b)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    nodes.children.append(waiter)
    assert select.select([fd], [], [], PATIENCE_S)[0]
    o2dlm.process_bast(context, fd)
    assert seen == ["l"]
    o2dlm.process_bast(context, fd)  # of no lock any more
    assert waiter.stdout is not None
    assert select.select([waiter.stdout], [], [], PATIENCE_S)[0]
    assert waiter.stdout.readline() == b"has\n"
    assert waiter.wait(PATIENCE_S) == 0
    o2dlm.destroy(context)


def test_a_lost_lock(nodes: Nodes) -> None:
    a = nodes.mount("a")
    context = o2dlm.initialize(a, "dom")
    o2dlm.lock(context, "l", 0, EXMODE)
    nodes.state.unlink()
    poll = select.poll()
    poll.register(context.locks["l"], 0)
    assert poll.poll(PATIENCE_S * 1000)
    assert code(o2dlm.read_lvb, context, "l", 9) == Code.LVB_READ
    assert code(o2dlm.write_lvb, context, "l", b"x") == Code.LVB_WRITE
    assert code(o2dlm.lock, context, "m", 0, EXMODE) == Code.LOCKING
    kill(a)
    assert code(o2dlm.destroy, context) == Code.DOMAIN_DIR


def test_programs_that_are_started_do_not_inherit_a_lock(lock: Twice) -> None:
    context: Context = o2dlm.initialize(lock.a.parent.parent, "dom")
    name = lock.a.name
    o2dlm.lock(context, name, 0, Level.EXMODE)
    child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    try:
        o2dlm.unlock(context, name)
        other = o2dlm.initialize(lock.b.parent.parent, "dom")
        assert code(o2dlm.lock, other, name, TRYLOCK, EXMODE) == 0
        for each, held in ((other, True), (context, False)):
            if held:
                o2dlm.unlock(each, name)
            for hidden in list(each.locks):
                o2dlm.unlock(each, hidden)
                with contextlib.suppress(O2dlmError):
                    o2dlm.drop_lock(each, hidden)
    finally:
        child.kill()
        child.wait()


def test_what_lies_below_an_unmounted_mount_locks_nothing(nodes: Nodes) -> None:
    below = nodes.folder / "a" / "dom"
    below.mkdir(parents=True)
    a = nodes.mount("a")
    context = o2dlm.initialize(a, "dom")
    subprocess.run(["umount", "--lazy", a], check=True)
    assert below.is_dir()
    with pytest.raises(o2dlm.O2dlmError, match="unmounted"):
        o2dlm.lock(context, "x", 0, o2dlm.EXMODE)
    for fd in context.locks.values():
        os.close(fd)
