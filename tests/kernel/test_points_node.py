"""Names, values and ends: what surprises in the kernel's dlmfs, as far as rows.py does not show it.

The table that names these tests is docs/dlmfs-conformance.md.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fs.nodes import dlmfs
from tests.kernel import cluster
from tests.kernel.cluster import CREATE, RO, RW, TRY, Domain, outcome, rows, told, until

pytestmark = pytest.mark.fuse
programs, trio, dom, fresh = cluster.programs, cluster.trio, cluster.dom, cluster.fresh
EXCL = os.O_EXCL


def read(path: Path) -> bytes:
    fd = os.open(path, RO | CREATE)
    try:
        return os.pread(fd, 64, 0)
    finally:
        os.close(fd)


def write(path: Path, value: bytes) -> None:
    fd = os.open(path, RW | CREATE)
    os.pwrite(fd, value, 0)
    os.close(fd)


# -- names -----------------------------------------------------------------------------------------


def test_each_mount_has_its_own_tree(dom: Domain) -> None:
    os.mknod(dom.a / "x")
    assert not (dom.b / "x").exists()
    assert outcome(os.open, dom.b / "x", RW) == "ENOENT"
    os.close(os.open(dom.b / "x", RW | CREATE | EXCL))
    assert outcome(os.open, dom.b / "x", RW | CREATE | EXCL) == "EEXIST"


def test_two_mounts_may_make_the_same_domain(dom: Domain) -> None:
    for mount in dom.mounts[:2]:
        (mount / "twice").mkdir()
        assert outcome(os.mkdir, mount / "twice") == "EEXIST"
    for mount in dom.mounts[:2]:
        (mount / "twice").rmdir()


def test_modes_and_owners_are_this_nodes_alone(dom: Domain) -> None:
    for folder in (dom.a, dom.b):
        os.mknod(folder / "x", 0o644)
    os.chmod(dom.a / "x", 0o600)
    os.chown(dom.a / "x", 7, 7)
    here, there = os.stat(dom.a / "x"), os.stat(dom.b / "x")
    assert (here.st_mode & 0o777, here.st_uid) == (0o600, 7)
    assert (there.st_mode & 0o777, there.st_uid) == (0o644, os.getuid())


def test_a_read_only_mount_gives_shared_locks_only(fresh: Domain) -> None:
    where = fresh.nodes.folder / "ro"
    where.mkdir()
    source = f"local:{fresh.nodes.state}"
    dlmfs("mount", source, str(where), "-o", "node=ro,ro")
    try:
        assert outcome(os.mkdir, where / "dom") == "EROFS"
    finally:
        dlmfs("umount", "--lazy", str(where))


def test_unknown_mount_options_are_refused_by_name(fresh: Domain) -> None:
    where = fresh.nodes.folder / "opt"
    where.mkdir()
    done = dlmfs("mount", "local", str(where), "-o", "foo", check=False)
    assert done.returncode == 1
    assert "'foo'" in done.stderr


# -- values ----------------------------------------------------------------------------------------


def test_a_value_moves_with_the_lock(dom: Domain) -> None:
    write(dom.a / "x", b"first")
    assert read(dom.b / "x") == b"first".ljust(64, b"\0")
    write(dom.b / "x", b"second")
    assert read(dom.a / "x") == b"second".ljust(64, b"\0")


def test_a_value_survives_the_leaving_of_whoever_used_it_first(dom: Domain) -> None:
    write(dom.a / "x", b"kept")
    read(dom.b / "x")
    (dom.a / "x").unlink()
    dom.a.rmdir()
    assert read(dom.b / "x") == b"kept".ljust(64, b"\0")
    dom.a.mkdir()
    assert read(dom.a / "x") == b"kept".ljust(64, b"\0")


@pytest.mark.parametrize("in_use", [True, False])
def test_a_value_survives_the_death_of_an_exclusive_node(fresh: Domain, in_use: bool) -> None:
    """In use or only cached: nobody can tell, so both are told of."""
    holder, fd = fresh.hold(fresh.a / "x", RW)
    holder("write", fd, b"kept")
    os.mknod(fresh.b / "x")
    if not in_use:
        holder.close(fd)
    fresh.nodes.kill(fresh.mounts[0])
    assert read(fresh.b / "x") == b"kept".ljust(64, b"\0")
    assert '"a"' in told(fresh.b / "x", "abandoned")
    write(fresh.b / "x", b"mended")
    assert told(fresh.b / "x", "abandoned") == ""


def test_a_value_is_forgotten_with_the_last_unlink(dom: Domain) -> None:
    write(dom.a / "x", b"old")
    read(dom.b / "x")
    (dom.a / "x").unlink()
    assert read(dom.b / "x").startswith(b"old")
    (dom.b / "x").unlink()
    assert read(dom.a / "x") == bytes(64)


# -- poll ------------------------------------------------------------------------------------------


def test_poll_tells_of_an_incompatible_wish_until_it_is_served(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RO)
    both = select.POLLIN | select.POLLOUT | select.POLLRDNORM
    assert holder("poll", fd, both, 0) == 0
    reader, other = dom.hold(dom.b / "x", RO)
    assert holder("poll", fd, both, 0) == 0, "a shared lock beside it is no reason"
    writer = dom.queue(dom.c / "x", RW)
    told_of = holder("poll", fd, both, 30_000)
    assert told_of == select.POLLIN | select.POLLRDNORM, "never POLLOUT"
    reader.close(other)
    holder.close(fd)
    writer.close(writer.result())


def test_a_sleeping_poll_is_woken(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RW)
    holder.start("poll", fd, select.POLLIN, 30_000)
    assert not holder.answered()
    waiter = dom.queue(dom.b / "x", RW)
    assert holder.result() & select.POLLIN
    holder.close(fd)
    waiter.close(waiter.result())


def test_a_refused_trylock_is_no_notice(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RW)
    assert dom.program().try_open(dom.b / "x", RW | CREATE | TRY) == "ETXTBSY"
    dom.settle()
    assert holder("poll", fd, select.POLLIN, 0) == 0
    holder.close(fd)


# -- unlink, rmdir, umount ---------------------------------------------------------------------------


def test_unlink_while_another_node_holds_or_waits(dom: Domain) -> None:
    holder, fd = dom.hold(dom.a / "x", RW)
    os.mknod(dom.b / "x")
    (dom.b / "x").unlink()
    waiter = dom.queue(dom.b / "x", RW)
    assert outcome(os.unlink, dom.a / "x") == "EBUSY", "held here, awaited there"
    assert outcome(os.unlink, dom.b / "x") == "EBUSY", (
        "awaited here: at once, where the kernel waits"
    )
    holder.close(fd)
    waiter.close(waiter.result())


def test_a_domain_is_left_at_once(dom: Domain) -> None:
    for name in ("x", "y", "z"):
        write(dom.a / name, b"1")
        (dom.a / name).unlink()
    dom.a.rmdir()
    dom.a.mkdir()


def test_umount_with_an_open_lock_is_refused(fresh: Domain) -> None:
    read(fresh.b / "x")  # so that it is not the last node's leave that forgets the value
    holder, fd = fresh.hold(fresh.a / "x", RW)
    done = subprocess.run(["umount", str(fresh.mounts[0])], capture_output=True, check=False)
    assert done.returncode != 0
    holder("write", fd, b"still")
    holder.close(fd)
    until(
        lambda: dlmfs("umount", str(fresh.mounts[0]), check=False).returncode == 0,
        "the umount of an idle mount",
    )
    assert read(fresh.b / "x").startswith(b"still"), "a cached level is handed on with its value"


def test_a_stopped_program_keeps_its_lock_and_a_dead_one_does_not(dom: Domain) -> None:
    holder, _fd = dom.hold(dom.a / "x", RW)
    holder.signal(signal.SIGSTOP)
    waiter = dom.queue(dom.b / "x", RW)
    holder.signal(signal.SIGKILL)
    waiter.close(waiter.result())


def test_rows_name_the_programs(dom: Domain) -> None:
    """What the kernel does not tell: who holds it, who waits."""
    holder, fd = dom.hold(dom.a / "x", RW)
    (row,) = rows(dom.a / "x", "holders")
    assert (row["pid"], row["mode"]) == (holder.pid, "EX")
    holder.close(fd)
