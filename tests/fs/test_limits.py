"""What a mount refuses, and that one user cannot exhaust it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dlmfs.errors import Unavailable
from dlmfs.fs.limits import Usage
from dlmfs.model import Limits
from tests.fs.nodes import Nodes, dlmfs

NOBODY = 65534


def errno_of(call: Callable[..., object], *args: object) -> int:
    try:
        made = call(*args)
    except OSError as error:
        return error.errno or -1
    if isinstance(made, int):
        os.close(made)
    return 0


def as_nobody(call: Callable[..., object], *args: object) -> int:
    """The errno of a call made by another user, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os._exit(errno_of(call, *args))
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def create(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def test_usage_counts_all_and_each_user() -> None:
    usage = Usage(Limits(max_domains=4, max_locks=4, user_share=50), own=7)
    for _ in range(2):
        assert usage.refuse_lock(5) == 0
        usage.count_lock(5, 1)
    assert usage.refuse_lock(5) == errno.EDQUOT
    assert usage.refuse_lock(0) == usage.refuse_lock(7) == usage.refuse_lock(6) == 0
    usage.count_lock(0, 2)
    assert usage.refuse_lock(0) == usage.refuse_lock(6) == errno.ENOSPC
    usage.count_lock(5, -1)
    assert usage.refuse_lock(5) == 0
    usage.count_domain(5, 4)
    assert usage.refuse_domain(5) == errno.ENOSPC


@pytest.mark.fuse
@pytest.mark.root
def test_names_and_open_files_are_bounded(nodes: Nodes) -> None:
    limits = "max_domains=4,max_locks=6,max_holders=8,user_share=50"
    nodes.folder.chmod(0o755)
    where = nodes.mount("a", limits)
    where.chmod(0o777)
    assert [as_nobody(os.mkdir, where / f"n{i}") for i in range(3)] == [0, 0, errno.EDQUOT]
    assert [errno_of(os.mkdir, where / f"r{i}") for i in range(3)] == [0, 0, errno.ENOSPC]
    (where / "r0").rmdir()
    assert errno_of(os.mkdir, where / "r3") == 0

    domain = where / "n0"
    domain.chmod(0o777)
    expected = [0, 0, 0, errno.EDQUOT]
    assert [as_nobody(create, domain / f"n{i}") for i in range(4)] == expected
    assert [errno_of(create, domain / f"r{i}") for i in range(4)] == [0, 0, 0, errno.ENOSPC]
    (domain / "n0").unlink()
    assert as_nobody(create, domain / "again") == 0

    fds = [os.open(domain / "r0", os.O_RDONLY) for _ in range(5)]

    def three_more() -> None:
        for _ in range(3):
            os.open(domain / "r0", os.O_RDONLY)
        os.open(domain / "r0", os.O_RDONLY)

    assert as_nobody(three_more) == errno.EAGAIN, "five and three are all"
    os.close(fds.pop())
    os.close(fds.pop())

    def five() -> None:
        for _ in range(5):
            os.open(domain / "r0", os.O_RDONLY)

    assert as_nobody(five) == errno.EDQUOT, "four are half"
    assert errno_of(os.open, domain / "r0", os.O_RDONLY) == 0
    for fd in fds:
        os.close(fd)


@pytest.mark.fuse
def test_waiters_are_bounded_and_the_lock_goes_on(nodes: Nodes) -> None:
    where = nodes.mount("a", "holder=file", "max_waiters=2")
    (where / "dom").mkdir()
    holder = nodes.hold(where / "dom/x")
    assert holder.wait() == "held"
    waiters = [nodes.hold(where / "dom/x") for _ in range(2)]
    for waiter in waiters:
        assert waiter.waits
    assert nodes.hold(where / "dom/x").wait() == f"error {errno.EAGAIN}"
    holder.release()
    first = next(w for w in waiters if w.poll(10))
    assert first.wait() == "held"
    late = nodes.hold(where / "dom/x")
    assert late.waits, "there is room again"
    first.release()
    waiters.remove(first)
    assert waiters[0].wait() == "held"
    waiters[0].release()
    assert late.wait() == "held"


@pytest.mark.fuse
def test_waiters_on_one_lock_are_bounded_for_each_user(nodes: Nodes) -> None:
    """Root's too, and the daemon's own: jobs that a clock starts behind one that is stuck."""
    where = nodes.mount("a", "holder=file", "max_lock_waiters=2")
    (where / "dom").mkdir()
    holder = nodes.hold(where / "dom/x")
    assert holder.wait() == "held"
    waiters = [nodes.hold(where / "dom/x") for _ in range(2)]
    for waiter in waiters:
        assert waiter.waits
    assert nodes.hold(where / "dom/x").wait() == f"error {errno.EDQUOT}"
    done = dlmfs("lock", str(where / "dom/x"), "--", "true", check=False)
    assert done.returncode == Unavailable.exit
    assert "2 wait for it here" in done.stderr
    assert "max_lock_waiters" in done.stderr
    other = nodes.hold(where / "dom/y")
    assert other.wait() == "held", "of each lock"
    second = nodes.hold(where / "dom/y")
    assert second.waits
    holder.release()
    first = next(w for w in waiters if w.poll(10))
    assert first.wait() == "held"
    assert nodes.hold(where / "dom/x").waits, "there is room again"


def test_what_a_user_waits_for_is_counted_by_file() -> None:
    user = Usage(Limits(max_waiters=5, max_lock_waiters=2), own=0).user(0)
    user.waits(1)
    assert not user.may_wait_no_more(1)
    user.waits(1)
    assert user.may_wait_no_more(1)
    assert not user.may_wait_no_more(2)
    user.waits_no_more(1)
    assert not user.may_wait_no_more(1)
    user.waits_no_more(1)
    assert (user.waiters, user.waiting_at) == (0, {})


@pytest.mark.fuse
def test_a_state_at_its_bound_refuses_new_names_only(nodes: Nodes) -> None:
    where = nodes.mount("a", "max_state_mb=1")
    domain = where / "dom"
    domain.mkdir()
    made = 0
    refusal = 0
    while not refusal and made < 20_000:
        refusal = errno_of(create, domain / f"l{made}")
        made += not refusal
    assert refusal == errno.ENOSPC
    assert errno_of(os.mkdir, where / "more") == errno.ENOSPC
    with open(domain / "l0", "r+b", buffering=0) as file:
        assert file.write(b"still") == 5
    assert errno_of(os.unlink, domain / "l1") == 0


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("max_locks=0", "from 1 to"),
        ("max_locks=x", "from 1 to"),
        ("max_locks", "takes a value"),
        ("user_share=101", "from 1 to 100"),
        ("max_lock=5", "did you mean 'max_locks'"),
    ],
)
def test_bad_limits_are_refused_by_name(tmp_path: Path, option: str, told: str) -> None:
    done = dlmfs("mount", "local", str(tmp_path), "-o", option, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
