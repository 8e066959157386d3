"""The promises of the README, each on real mounts with real processes."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs

pytestmark = pytest.mark.fuse

COUNT = """
import os, sys
for _ in range(int(sys.argv[2])):
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0")
    os.pwrite(fd, b"%d" % (n + 1), 0)
    os.close(fd)
"""


def errno_of(path: Path, flags: int) -> int:
    try:
        os.close(os.open(path, flags | os.O_CREAT))
    except OSError as error:
        return error.errno or -1
    return 0


def test_promise_exclusion(nodes: Nodes) -> None:
    a, b = nodes.pair()
    first = nodes.hold(a / "dom/x")
    assert first.wait() == "held"
    second = nodes.hold(b / "dom/x")
    assert second.waits
    first.release()
    assert second.wait() == "held"


@pytest.mark.parametrize("rule", ["node", "file"])
def test_promise_exclusion_a_counter_in_the_value_loses_nothing(nodes: Nodes, rule: str) -> None:
    """Three nodes; with holder=file two processes each, which exclude each other as well."""
    mounts = [nodes.mount(name, f"holder={rule}") for name in "abc"]
    for where in mounts:
        (where / "dom").mkdir()
    each, rounds = (2 if rule == "file" else 1), 40
    children = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(where / "dom/n"), str(rounds)])
        for where in mounts
        for _ in range(each)
    ]
    nodes.children += children
    for child in children:
        assert child.wait(90) == 0
    with open(mounts[0] / "dom/n", "rb") as file:
        assert int(file.read().rstrip(b"\0")) == rounds * len(children)


def test_promise_tokens_grow(nodes: Nodes) -> None:
    a, b = nodes.pair("holder=file")
    last = 0
    for where in (a, a, b, a, b, b):
        holder = nodes.hold(where / "dom/x")
        assert holder.wait() == "held"
        assert holder.token > last
        last = holder.token
        holder.release()


def test_promise_fencing_a_deleted_state_file_fences_the_node(nodes: Nodes) -> None:
    a, _ = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        nodes.state.unlink()
        with pytest.raises(OSError, match="Input/output error"):
            os.write(fd, b"x")
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 10, 0)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000)[0][1] & select.POLLERR
        assert errno_of(a / "dom/x", os.O_RDWR) == errno.ENOLCK
        lease = nodes.status(a)["lease"]
        assert lease["state"] == "FENCED"
        assert "deleted" in lease["reason"]
    finally:
        os.close(fd)


def test_promise_value_survives_the_death_of_its_writer_and_says_so(nodes: Nodes) -> None:
    a, b = nodes.pair()
    victim = nodes.hold(a / "dom/x")
    assert victim.wait() == "held"
    fd = os.open(a / "dom/x", os.O_RDWR)  # holder=node: the same node may
    os.write(fd, b"precious")
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    nodes.kill(a)
    assert waiter.wait() == "held"
    os.close(fd)
    info = json.loads(dlmfs("info", "--json", str(b / "dom/x")).stdout)
    assert bytes.fromhex(info["lvb_hex"]).rstrip(b"\0") == b"precious"
    assert info["abandoned"]["node"] == "a"
    with open(b / "dom/x", "r+b", buffering=0) as file:
        assert json.loads(os.getxattr(b / "dom/x", "user.dlmfs.abandoned"))["node"] == "a"
        file.write(b"new")
    assert os.getxattr(b / "dom/x", "user.dlmfs.abandoned") == b""


def test_promise_progress_a_dead_process_frees_its_lock(nodes: Nodes) -> None:
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    holder.process.kill()
    assert waiter.wait() == "held"


def test_promise_progress_readers_do_not_starve_a_writer(nodes: Nodes) -> None:
    a, b = nodes.pair("holder=file")
    reader = nodes.hold(a / "dom/x", os.O_RDONLY)
    assert reader.wait() == "held"
    writer = nodes.hold(b / "dom/x")
    assert writer.waits
    late = nodes.hold(a / "dom/x", os.O_RDONLY)
    assert late.waits, "a later reader overtook a waiting writer"
    reader.release()
    assert writer.wait() == "held"
    writer.release()
    assert late.wait() == "held"


def test_promise_trylock(nodes: Nodes) -> None:
    """Refused while used, handed over while merely cached; either at once."""
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    assert errno_of(b / "dom/x", os.O_RDWR | os.O_NONBLOCK) == errno.ETXTBSY
    assert (b / "dom/x").exists(), "the refused trylock leaves the file, as in the kernel"
    assert select.select([], [], [], 0) == ([], [], [])
    holder.release()
    assert errno_of(b / "dom/x", os.O_RDWR | os.O_NONBLOCK) == 0
    assert errno_of(a / "dom/x", os.O_RDWR | os.O_NONBLOCK) == 0


def test_promise_interruptible(nodes: Nodes) -> None:
    """A signal ends the wait with EINTR; the queue goes on without the waiter."""
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    first, second = nodes.hold(b / "dom/x"), nodes.hold(b / "dom/x")
    assert first.waits
    assert second.waits
    first.process.send_signal(signal.SIGUSR1)
    assert first.wait() == f"error {errno.EINTR}"
    holder.release()
    assert second.wait() == "held"


def test_promise_killable(nodes: Nodes) -> None:
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    waiter.process.kill()
    assert waiter.process.wait(PATIENCE_S) == -signal.SIGKILL
    holder.release()
    assert errno_of(b / "dom/x", os.O_RDWR) == 0


def test_promise_no_silent_state(nodes: Nodes) -> None:
    """A waiter can see who stands in its way, from the first day on."""
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    lock = nodes.status(a)["domains"][0]["locks"][0]
    assert lock["holders"][0]["pid"] == holder.process.pid
    assert lock["wanted_by"][0]["node"] == "b"
    assert nodes.status(b)["domains"][0]["locks"][0]["waiters"][0]["pid"] == waiter.process.pid
    info = json.loads(dlmfs("info", "--json", str(b / "dom/x")).stdout)
    assert [(m["node"], m["level"]) for m in info["members"]] == [("a", "EX")]
    assert [w["node"] for w in info["waiters"]] == ["b"]


def test_shared_readers_hold_together(nodes: Nodes) -> None:
    a, b = nodes.pair()
    assert nodes.hold(a / "dom/x", os.O_RDONLY).wait() == "held"
    assert nodes.hold(b / "dom/x", os.O_RDONLY).wait() == "held"
    assert errno_of(a / "dom/x", os.O_RDWR | os.O_NONBLOCK) == errno.ETXTBSY


def test_a_waiting_create_does_not_freeze_its_directory(nodes: Nodes) -> None:
    """fuse-notes, Critical 1: CREATE would wait with the directory locked."""
    a, b = nodes.pair()
    assert nodes.hold(a / "dom/x").wait() == "held"
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    deadline = time.monotonic() + PATIENCE_S
    while not (b / "dom/x").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = subprocess.run(["ls", "-l", str(b / "dom")], timeout=PATIENCE_S, capture_output=True)
    assert b" x\n" in done.stdout
    assert nodes.hold(b / "dom/other").wait() == "held"


def test_reopening_a_cached_lock_commits_nothing(nodes: Nodes) -> None:
    """dlmfs.txt: a request for an already acquired lock will not generate another DLM call."""
    a, _ = nodes.pair()
    assert errno_of(a / "dom/x", os.O_RDWR) == 0

    def revision() -> int:
        conn = sqlite3.connect(f"file:{nodes.state}?mode=ro", uri=True)
        try:
            row = conn.execute("SELECT revision FROM meta").fetchone()
            return int(row[0])
        finally:
            conn.close()

    before = revision()
    for _ in range(20):
        assert errno_of(a / "dom/x", os.O_RDWR) == 0
    assert revision() == before


def test_poll_tells_the_holder_that_another_node_waits(nodes: Nodes) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == []
    waiter = nodes.hold(b / "dom/x")
    assert poll.poll(PATIENCE_S * 1000) == [(fd, select.POLLIN)]
    os.close(fd)
    assert waiter.wait() == "held"


def test_holder_node_shares_and_holder_file_excludes_on_one_mount(nodes: Nodes) -> None:
    by_node = nodes.mount("a")
    by_file = nodes.mount("b", "holder=file")
    for where in (by_node, by_file):
        (where / "dom").mkdir()
    held = nodes.hold(by_node / "dom/x")
    assert held.wait() == "held"
    both = nodes.hold(by_node / "dom/x")
    assert both.wait() == "held"
    held.release()
    both.release()
    assert nodes.hold(by_file / "dom/x").wait() == "held"
    assert nodes.hold(by_file / "dom/x").waits


def test_a_holder_that_opens_again_does_not_wait_for_itself(nodes: Nodes) -> None:
    """protocol-traps 5: also through a descriptor inherited from a shell."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    os.close(os.open(a / "dom/x", os.O_RDONLY))
    done = subprocess.run(["cat", str(a / "dom/x")], timeout=PATIENCE_S, capture_output=True)
    assert len(done.stdout) == 64
    os.close(fd)
    assert waiter.wait() == "held"


def test_names_and_refusals(nodes: Nodes) -> None:
    """A few of the kernel's answers; all of them are tested with the file system's breadth."""
    where = nodes.mount("a")
    assert errno_of(where / "x", os.O_RDWR) == errno.EACCES
    (where / "dom").mkdir()
    assert errno_of(where / "dom" / ("n" * 256), os.O_RDWR) == errno.ENAMETOOLONG
    assert errno_of(where / "dom/$x", os.O_RDWR) == errno.EINVAL
    with pytest.raises(OSError, match="Invalid argument"):
        (where / ("d" * 64)).mkdir()
    with pytest.raises(PermissionError):
        (where / "dom/sub").mkdir()
    fd = os.open(where / "dom/x", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="busy"):
        (where / "dom/x").unlink()
    with pytest.raises(OSError, match="not empty"):
        (where / "dom").rmdir()
    assert os.write(fd, b"v" * 100) == 64
    assert os.fstat(fd).st_size == 64
    os.close(fd)
    (where / "dom/x").unlink()
    with open(where / "dom/x", "w+b", buffering=0) as file:
        assert file.read() == bytes(64), "the value went with the last unlink"
    (where / "dom/x").unlink()
    (where / "dom").rmdir()


def test_a_clean_end_leaves_nothing_in_the_store(nodes: Nodes) -> None:
    a, b = nodes.pair()
    for where in (a, b):
        for lock in "xyz":
            assert errno_of(where / "dom" / lock, os.O_RDWR) == 0
    dlmfs("umount", str(a))
    assert nodes.status(b)["domains"][0]["members"] == ["b"]
    dlmfs("umount", str(b))
    conn = sqlite3.connect(nodes.state)
    try:
        assert conn.execute("SELECT key FROM kv").fetchall() == []
        assert conn.execute("SELECT lease FROM session").fetchall() == []
    finally:
        conn.close()
