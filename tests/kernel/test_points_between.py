"""Locks between nodes: what surprises in the kernel's dlmfs, sentence by sentence.

docs/dlmfs-conformance.md names these tests. Where dlmfs differs on purpose, its own answer is
asserted. Programs are processes of their own: a holder in the test's process would be their parent.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fs.nodes import DLMFS, PATIENCE_S, dlmfs
from tests.kernel import cluster
from tests.kernel.cluster import CREATE, RO, RW, TRY, Domain, Program, outcome, rows, told, until

pytestmark = pytest.mark.fuse
programs, trio, dom, fresh = cluster.programs, cluster.trio, cluster.dom, cluster.fresh


def state(program: Program) -> str:
    """The letter that ps shows."""
    return Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[0]


# -- caching and trylock ---------------------------------------------------------------------------


def test_closing_keeps_the_level(dom: Domain) -> None:
    program, fd = dom.hold(dom.a / "x", RW)
    program.close(fd)
    assert told(dom.a / "x", "mode") == "EX"
    assert rows(dom.a / "x", "holders") == []


@pytest.mark.parametrize(("kept", "tried"), [(RW, RW), (RW, RO), (RO, RW)])
def test_a_trylock_is_handed_an_idle_cached_lock(dom: Domain, kept: int, tried: int) -> None:
    program, fd = dom.hold(dom.a / "x", kept)
    program.close(fd)
    assert dom.program().try_open(dom.b / "x", tried | CREATE | TRY) == "ok"
    assert told(dom.a / "x", "mode") == ("NL" if tried == RW else "PR")


@pytest.mark.parametrize(("held", "tried"), [(RW, RW), (RW, RO), (RO, RW)])
def test_a_refused_trylock_leaves_the_file_without_a_lock(
    dom: Domain, held: int, tried: int
) -> None:
    dom.hold(dom.a / "x", held)
    assert dom.program().try_open(dom.b / "x", tried | CREATE | TRY) == "ETXTBSY"
    assert (dom.b / "x").stat().st_size == 64
    assert told(dom.b / "x", "mode") == "NL"
    assert rows(dom.b / "x", "holders") == []


@pytest.mark.parametrize("tried", [RW, RO])
def test_a_trylock_beside_a_local_waiter_answers(dom: Domain, tried: int) -> None:
    dom.hold(dom.a / "x", RW)
    dom.queue(dom.b / "x", RW)
    assert dom.program().try_open(dom.b / "x", tried | TRY) == "ETXTBSY"


@pytest.mark.parametrize("tried", [RW, RO])
def test_a_trylock_at_the_holder_another_node_waits_for_answers(dom: Domain, tried: int) -> None:
    dom.hold(dom.a / "x", RO)
    dom.queue(dom.b / "x", RW)
    assert dom.program().try_open(dom.a / "x", tried | TRY) == "ETXTBSY"


def test_a_trylock_of_a_silent_holder_answers(fresh: Domain) -> None:
    """A stopped daemon keeps its locks (there is no lease to run out) but keeps nobody waiting."""
    fresh.hold(fresh.a / "x", RW)
    os.mknod(fresh.b / "x")
    program = fresh.program()
    daemon = fresh.nodes.pid(fresh.mounts[0])
    os.kill(daemon, signal.SIGSTOP)
    try:
        assert program.try_open(fresh.b / "x", RW | TRY) == "ETXTBSY"
    finally:
        os.kill(daemon, signal.SIGCONT)


def test_refused_trylocks_lose_no_wakeup(dom: Domain) -> None:
    """In the kernel a waiting open that meets a refused trylock can sleep for ever."""
    trying = dom.program()
    for number in range(20):
        lock = f"x{number}"
        holder, fd = dom.hold(dom.a / lock, RW)
        waiter = dom.program()
        waiter.opening(dom.b / lock, RW | CREATE)
        assert trying.try_open(dom.b / lock, RW | CREATE | TRY) == "ETXTBSY"
        holder.close(fd)
        waiter.close(waiter.result())
        for program in (holder, waiter):
            program.end()


# -- a waiting open and signals --------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL])
def test_a_signal_ends_a_waiting_open_and_nothing_stays_cached(
    dom: Domain, number: signal.Signals
) -> None:
    """USR1: EINTR. USR2, whose handler has SA_RESTART: EINTR too; FUSE cannot restart an open."""
    holder, fd = dom.hold(dom.a / "x", RW)
    waiter = dom.queue(dom.b / "x", RW)
    assert state(waiter) == "S", "the kernel's would be in D"
    waiter.signal(number)
    if number == signal.SIGKILL:
        waiter.process.wait(PATIENCE_S)
    else:
        assert outcome(waiter.result) == "EINTR"
    for node in (dom.a, dom.b):
        until(lambda node=node: rows(node / "x", "waiters") == [], "end of the request")  # type: ignore[misc]
    holder.close(fd)
    dom.settle()
    assert told(dom.b / "x", "mode") == "NL"
    assert told(dom.a / "x", "mode") == "EX"


def test_a_killed_waiter_keeps_nobody_behind_it_waiting(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RW)
    waiter = dom.queue(dom.b / "x", RW)
    behind = dom.queue(dom.c / "x", RW)
    waiter.process.kill()
    until(lambda: len(rows(dom.a / "x", "waiters")) == 1, "end of the killed waiter's request")
    holder.close(fd)
    behind.close(behind.result())


# -- one node --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [RW, RO, RW | TRY, RO | TRY])
def test_a_node_holds_both_modes_at_once(dom: Domain, flags: int) -> None:
    """holder=node: the level is the node's, so a second exclusive open on it succeeds."""
    dom.hold(dom.a / "x", RW)
    dom.hold(dom.a / "x", RO)
    dom.program().open(dom.a / "x", flags)
    assert sorted(row["mode"] for row in rows(dom.a / "x", "holders")) == sorted(
        ["EX", "PR", "EX" if flags & RW else "PR"]
    )


@pytest.mark.parametrize("held", [RO, RW])
@pytest.mark.parametrize("flags", [RO, RW])
def test_new_opens_wait_behind_another_nodes_exclusive_wish(
    dom: Domain, held: int, flags: int
) -> None:
    holder, fd = dom.hold(dom.a / "x", held)
    first = dom.queue(dom.b / "x", RW)
    second = dom.queue(dom.a / "x", flags)
    holder.close(fd)
    got = first.result()
    assert dom.waits(second, dom.a / "x")
    first.close(got)
    second.close(second.result())


def test_a_shared_wish_stops_new_exclusive_opens_only(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RW)
    reader = dom.queue(dom.b / "x", RO)
    second, shared = dom.hold(dom.a / "x", RO)
    writer = dom.queue(dom.a / "x", RW)
    holder.close(fd)
    got = reader.result()
    assert told(dom.a / "x", "mode") == "PR"
    assert dom.waits(writer, dom.a / "x")
    second.close(shared)
    reader.close(got)
    writer.close(writer.result())


# -- a holder that opens again ---------------------------------------------------------------------


@pytest.mark.parametrize(("held", "again"), [(RO, RO), (RW, RO), (RW, RW), (RO, RO | TRY)])
def test_a_holder_opens_again_although_another_node_waits(
    dom: Domain, held: int, again: int
) -> None:
    holder, fd = dom.hold(dom.a / "x", held)
    waiter = dom.queue(dom.b / "x", RW)
    second = holder.open(dom.a / "x", again)
    third = holder("open_in_thread", os.fsencode(dom.a / "x"), again)
    assert not waiter.answered()
    for each in (fd, second, third):
        assert not waiter.answered()
        holder.close(each)
    waiter.close(waiter.result())


def test_a_shared_holder_that_wants_more_goes_before_plain_wishes(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RO)
    waiter = dom.queue(dom.b / "x", RW)
    more = holder.open(dom.a / "x", RW)
    assert dom.waits(waiter, dom.b / "x")
    holder.close(more)
    holder.close(fd)
    waiter.close(waiter.result())


@pytest.mark.root
def test_where_the_process_cannot_be_told_the_kernels_rule_holds(fresh: Domain) -> None:
    """A daemon in a process namespace of its own sees no number for the programs outside."""
    where = fresh.nodes.folder / "far"
    where.mkdir()
    mount = ["mount", "-f", f"local:{fresh.nodes.state}", str(where), "-o", "node=far"]
    daemon = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", *DLMFS, *mount])
    try:
        until(lambda: outcome(os.getxattr, where, "user.dlmfs.state") == "ok", "the mount")
        lock = where / fresh.name / "x"
        lock.parent.mkdir()
        holder, fd = fresh.hold(lock, RO)
        waiter = fresh.queue(fresh.b / "x", RW, lock.parent, fresh.b)
        holder.opening(lock, RO)
        until(lambda: len(rows(lock, "waiters")) == 2, "both waiters")
        assert [row.get("pid") for row in rows(lock, "waiters")] == [0, None]
        fresh.settle(lock.parent, fresh.b)
        assert not holder.answered()
        holder.signal(signal.SIGUSR1)
        assert outcome(holder.result) == "EINTR"
        holder.close(fd)
        waiter.close(waiter.result())
    finally:
        fresh.program.close()
        dlmfs("umount", "--lazy", str(where), check=False)
        daemon.terminate()
        daemon.wait(PATIENCE_S)


# -- queues ----------------------------------------------------------------------------------------


def test_a_new_reader_waits_behind_a_queued_writer(dom: Domain) -> None:
    """First come, first served; in the kernel the third node's reader goes first."""
    holder, fd = dom.hold(dom.a / "x", RO)
    writer = dom.queue(dom.b / "x", RW)
    reader = dom.queue(dom.c / "x", RO)
    holder.close(fd)
    got = writer.result()
    assert dom.waits(reader, dom.c / "x")
    writer.close(got)
    reader.close(reader.result())


def test_a_new_reader_waits_behind_a_writer_of_its_own_node(dom: Domain) -> None:
    """In the kernel it is served at once, since the node has the lock shared already."""
    holders = [dom.hold(folder / "x", RO) for folder in (dom.a, dom.b)]
    writer = dom.queue(dom.b / "x", RW)
    reader = dom.queue(dom.b / "x", RO)
    for holder, fd in holders:
        holder.close(fd)
    for program in (writer, reader):
        program.close(program.result())


def test_readers_that_take_turns_do_not_starve_a_writer(dom: Domain) -> None:
    """Two readers that always overlap: the lock is never free of readers by chance."""
    readers = [dom.program(), dom.program()]
    folders = [dom.a, dom.c]
    held = [p.open(f / "x", RO | CREATE) for p, f in zip(readers, folders, strict=True)]
    writer = dom.queue(dom.b / "x", RW)
    for turn in (0, 1):
        readers[turn].close(held[turn])
        readers[turn].opening(folders[turn] / "x", RO)
    got = writer.result()
    for program, folder in zip(readers, folders, strict=True):
        assert dom.waits(program, folder / "x")
    writer.close(got)
    for program in readers:
        program.close(program.result())


def test_the_second_converter_gets_edeadlk(dom: Domain) -> None:
    first, shared = dom.hold(dom.a / "x", RO)
    second, other = dom.hold(dom.b / "x", RO)
    first.opening(dom.a / "x", RW)
    assert dom.waits(first, dom.a / "x")
    assert outcome(second.open, dom.b / "x", RW) == errno.errorcode[errno.EDEADLK]
    assert dom.waits(first, dom.a / "x"), "the second still has its shared lock"
    second.close(other)
    got = first.result()
    for fd in (got, shared):
        first.close(fd)
    second.close(second.open(dom.b / "x", RW))


def test_a_merely_cached_shared_level_is_given_up(dom: Domain) -> None:
    """Two nodes that keep PR for nobody both want EX: neither waits for the other's cache."""
    pair = [dom.program(), dom.program()]
    folders = [dom.a, dom.b]
    for program, folder in zip(pair, folders, strict=True):
        program.close(program.open(folder / "x", RO | CREATE))
        assert told(folder / "x", "mode") == "PR"
    for program, folder in zip(pair, folders, strict=True):
        program.opening(folder / "x", RW)
    until(lambda: pair[0].answered() or pair[1].answered(), "a grant")
    for program in pair if pair[0].answered() else pair[::-1]:
        program.close(program.result())
