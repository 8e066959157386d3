"""Races on real mounts, most of them with a store that comes back after the answer was given.

MKDIR, RMDIR and UNLINK hold the kernel's directory lock and are therefore answered in bounded time: with
ENOLCK, while what they began goes on. What happens until it is done, and after, are the races here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes

pytestmark = pytest.mark.fuse

STATE = "user.dlmfs.state"
ABANDONED = "user.dlmfs.abandoned"
REFUSED = f"error {errno.ENOLCK}"
MKDIR = "import os, sys; os.mkdir(sys.argv[1])"


@contextlib.contextmanager
def silent_store(nodes: Nodes) -> Iterator[None]:
    """No transaction goes through: somebody else is inside of one, as a stopped daemon may be."""
    conn = sqlite3.connect(nodes.state, isolation_level=None)
    try:
        conn.execute("BEGIN IMMEDIATE")
        yield
        conn.execute("ROLLBACK")
    finally:
        conn.close()


def errno_of(call: Callable[[], object]) -> int:
    """0, or what the system call failed with."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT))


def names(directory: Path) -> set[str]:
    """What the daemon lists, whatever the kernel remembers of single names."""
    return set(os.listdir(directory))


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what no event tells from outside."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_an_open_during_a_late_rmdir_never_holds_beside_another_node(nodes: Nodes) -> None:
    """rmdir(2) was answered ENOLCK by a silent store, so its user may go on in the directory, while
    the leave behind it goes on too. An open that was let in then held a lock of a membership that
    ended under it, beside the next node's exclusive holder (promise 1); or it hung.
    """
    a, b = nodes.pair()
    (a / "other").mkdir()
    with silent_store(nodes):
        elsewhere = nodes.hold(a / "other/z")
        assert elsewhere.waits
        assert errno_of(lambda: os.rmdir(a / "dom")) == errno.ENOLCK
        here = nodes.hold(a / "dom/x")
        assert here.wait() == REFUSED
    assert elsewhere.wait() == "held"
    there = nodes.hold(b / "dom/x")
    assert there.wait() == "held"


def test_a_name_made_during_a_late_rmdir_fences_no_node(nodes: Nodes) -> None:
    """The same with mknod(2): the directory went although a file had been made in it meanwhile, and an
    open of that file found no domain, which is an internal error: it fenced the whole node, with
    every lock that it had in other domains (promise 3).
    """
    a, _ = nodes.pair()
    (a / "other").mkdir()
    elsewhere = nodes.hold(a / "other/z")
    assert elsewhere.wait() == "held"
    with silent_store(nodes):
        assert errno_of(lambda: os.rmdir(a / "dom")) == errno.ENOLCK
        made = errno_of(lambda: os.mknod(a / "dom/x", stat.S_IFREG | 0o644))
    until(lambda: "dom" not in names(a), "the domain was not left")
    errno_of(lambda: open_and_close(a / "dom/x"))
    assert os.getxattr(a, STATE) == b"HEALTHY"
    assert elsewhere.process.poll() is None
    assert made == errno.ENOLCK


def test_names_whose_removal_was_answered_too_late_can_be_made_again(nodes: Nodes) -> None:
    """rmdir(2) and unlink(2) were answered ENOLCK, so the kernel kept the names in its cache, for an
    hour; the daemon removed them when the store was back. From then on the directory was there to
    see and nothing could be made in it, and each open of the lock's file ended in ESTALE.
    """
    a, _ = nodes.pair()
    (a / "gone").mkdir()
    open_and_close(a / "dom/x")
    with silent_store(nodes), ThreadPoolExecutor(2) as threads:
        unlinked = threads.submit(errno_of, lambda: os.unlink(a / "dom/x"))
        removed = threads.submit(errno_of, lambda: os.rmdir(a / "gone"))
        assert unlinked.result(PATIENCE_S) == errno.ENOLCK
        assert removed.result(PATIENCE_S) == errno.ENOLCK
    until(lambda: names(a) == {"dom"}, "the domain was not left")
    until(lambda: not names(a / "dom"), "the lock was not forgotten")
    until(lambda: not (a / "gone").exists(), "the kernel still shows a domain that was left")
    open_and_close(a / "dom/x")
    (a / "gone").mkdir()
    open_and_close(a / "gone/x")


def test_a_domain_joined_while_a_late_mkdir_is_undone_is_fenced_with_its_node(nodes: Nodes) -> None:
    """mkdir(2) was answered ENOLCK, and when the store is back its membership is left again, late. A
    second mkdir(2) meanwhile joins anew; the leave of the first then struck the second from the
    list of the node's domains: `status` did not show it, and neither a clean end nor a fence reached
    it, so that its descriptors went on working while others were granted its locks (promise 3).
    """
    a = nodes.mount("a")
    (a / "keep").mkdir()
    with silent_store(nodes):
        assert errno_of(lambda: os.mkdir(a / "dom")) == errno.ENOLCK
        again = subprocess.Popen([sys.executable, "-I", "-c", MKDIR, str(a / "dom")])
        nodes.children.append(again)
        with pytest.raises(subprocess.TimeoutExpired):
            again.wait(0.5)
    assert again.wait(PATIENCE_S) == 0
    with contextlib.ExitStack() as undo:
        fds = []
        for domain in ("dom", "keep"):
            fd = os.open(a / domain / "x", os.O_RDWR | os.O_CREAT)
            undo.callback(os.close, fd)
            assert os.pread(fd, 64, 0) == bytes(64)
            fds.append(fd)
        listed = {domain["name"] for domain in nodes.status(a)["domains"]}
        assert listed == {"dom", "keep"}
        os.unlink(nodes.state)
        until(lambda: os.getxattr(a, STATE) != b"HEALTHY", "the node was not fenced")
        for fd in fds:
            assert errno_of(partial(os.pread, fd, 64, 0)) == errno.EIO


def test_a_clean_end_with_waiters_behind_each_other_marks_no_death(nodes: Nodes) -> None:
    """At the end of a mount the waiting opens are withdrawn one by one. The first one's withdrawal may
    grant the second, which was no longer listed: the exception ended the daemon in the middle, its
    locks were held until it was found dead, and marked as a dead holder's (promise 4).
    """
    a, b = nodes.pair("holder=file")
    cached = nodes.hold(a / "dom/x")
    assert cached.wait() == "held"
    cached.release()
    reader = nodes.hold(a / "dom/x", os.O_RDONLY)
    assert reader.wait() == "held"
    writer = nodes.hold(a / "dom/x")
    assert writer.waits
    behind = nodes.hold(a / "dom/x", os.O_RDONLY)
    assert behind.waits
    os.kill(nodes.pid(a), signal.SIGTERM)
    elsewhere = nodes.hold(b / "dom/x")
    assert elsewhere.wait() == "held"
    assert os.getxattr(b / "dom/x", ABANDONED) == b""


@pytest.mark.parametrize("rule", ["node", "file"])
def test_a_trylock_after_another_nodes_close_is_never_refused_for_its_sake(
    nodes: Nodes, rule: str
) -> None:
    """close(2) returns before the daemon reads the RELEASE. The trylock's wish could overtake it, and
    found a user who had gone (promise 6). One in ten was refused so."""
    a, b = (node / "dom/x" for node in nodes.pair(f"holder={rule}"))
    for path in (a, b):
        path.touch()
    for turn in range(200):
        here, there = (a, b) if turn % 2 else (b, a)
        os.close(os.open(here, os.O_RDWR))
        os.close(os.open(there, os.O_RDONLY | os.O_NONBLOCK))
