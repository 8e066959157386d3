"""How a lock is taken, step by step, in a world that is made up; and where locks lie."""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.client import aio, logic, sync
from dlmfs.client.logic import (
    Abandoned,
    Close,
    Device,
    Exclude,
    MakeDomain,
    MakeLock,
    Open,
    Pause,
    Request,
    State,
    Token,
)
from dlmfs.client.place import Place, find_mount, place, space
from dlmfs.errors import (
    Deadlock,
    DlmfsError,
    LockLost,
    NotGranted,
    NotPermitted,
    StoreFull,
    Unavailable,
    UsageError,
)
from tests.fs.nodes import Nodes

PLACE = Place("/dlm", "0:7", "local", "jobs", "backup")
DEV = os.makedev(0, 7)


class World:
    """Answers steps from a script: an errno fails, 0 succeeds. Descriptors count from 10. The node's
    states come from a list of their own; then it serves."""

    def __init__(self, *script: int, states: Iterable[str | int] = ()) -> None:
        self.script = list(script)
        self.states = list(states)
        self.steps: list[logic.Step] = []
        self.open: set[int] = set()
        self.waiting = 0

    def do(self, step: logic.Step) -> object:
        self.steps.append(step)
        if isinstance(step, Pause):
            return 0
        if isinstance(step, logic.Waiters):
            return self.waiting
        if isinstance(step, State):
            state = self.states.pop(0) if self.states else "HEALTHY"
            if isinstance(state, int):
                raise OSError(state, os.strerror(state))
            return state
        if isinstance(step, Close):
            self.open.remove(step.fd)
            return 0
        code = self.script.pop(0) if self.script else 0
        if code == errno.ENOTUNIQ:
            raise KeyboardInterrupt
        if code == errno.EXDEV and isinstance(step, Device):
            return os.makedev(0, 8)
        if code:
            raise OSError(code, os.strerror(code))
        if isinstance(step, Open):
            self.open.add(10 + len(self.steps))
            return 10 + len(self.steps)
        return DEV if isinstance(step, Device) else 0

    def take(self, *, shared: bool = False, trying: bool = False, create: bool = True) -> int:
        return logic.drive(logic.taking(Request(PLACE, shared, trying, create)), self.do)


def test_who_may_not_wait_is_told_how_many_do() -> None:
    world = World(errno.EDQUOT, 0)
    with pytest.raises(Unavailable, match="share of a limit"):
        world.take()
    world = World(errno.EDQUOT)
    world.waiting = 256
    with pytest.raises(Unavailable, match=r"256 wait for it here.*max_lock_waiters.*dlmfs why"):
        world.take()
    assert not world.open


def test_the_ordinary_way() -> None:
    world = World()
    fd = world.take()
    assert world.steps == [
        Open("/dlm/jobs/backup", os.O_RDWR | os.O_CLOEXEC),
        Device(fd),
        Exclude(fd, fcntl.LOCK_EX),
        Token(fd),
    ]
    assert world.open == {fd}
    world = World()
    fd = world.take(shared=True, trying=True, create=False)
    assert world.steps == [
        Open("/dlm/jobs/backup", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC),
        Device(fd),
        Exclude(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
        Token(fd),
    ]


def test_a_missing_domain_is_made_once_and_by_one() -> None:
    missing = errno.ENOENT
    for made in (0, errno.EEXIST):
        world = World(missing, missing, made, missing)
        world.take()
        assert world.steps[1:3] == [MakeLock("/dlm/jobs/backup"), MakeDomain("/dlm/jobs")]
        assert world.steps[4] == MakeLock("/dlm/jobs/backup")
        assert len(world.steps) == 9
    with pytest.raises(NotPermitted, match="/dlm/jobs may not"):
        World(missing, missing, errno.EACCES).take()


def test_a_missing_lock_is_made_once_and_by_one() -> None:
    for made in (0, errno.EEXIST):
        world = World(errno.ENOENT, made)
        world.take()
        assert world.steps[1] == MakeLock("/dlm/jobs/backup")
        assert len(world.steps) == 6
    with pytest.raises(NotPermitted, match="/dlm/jobs/backup may not"):
        World(errno.ENOENT, errno.EACCES).take()
    with pytest.raises(UsageError, match="does not exist"):
        World(*[errno.ENOENT, 0] * 100).take()  # always removed by another one
    with pytest.raises(UsageError, match="does not exist"):
        World(errno.ENOENT).take(create=False)


def test_races_with_unlink_are_tried_again_but_not_for_ever() -> None:
    assert World(errno.EAGAIN, errno.ESTALE, errno.EAGAIN).take()
    world = World(*[errno.EAGAIN] * 100)
    with pytest.raises(Unavailable, match="limit"):
        world.take()
    assert len(world.steps) == logic.RETRIES + 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ETXTBSY, NotGranted),
        (errno.EDEADLK, Deadlock),
        (errno.EINVAL, UsageError),
        (errno.EACCES, NotPermitted),
        (errno.ENOLCK, Unavailable),
        (errno.EDQUOT, Unavailable),
        (errno.ENOSPC, StoreFull),
        (errno.ENOTCONN, Unavailable),
        (errno.EIO, Unavailable),
        (errno.ENOMEM, Unavailable),
    ],
)
def test_refusals(code: int, kind: type[DlmfsError]) -> None:
    with pytest.raises(kind, match="/dlm/jobs/backup") as raised:
        World(code).take(trying=True)
    assert type(raised.value) is kind


def test_failures_of_what_was_held() -> None:
    def kind(code: int) -> type[DlmfsError]:
        return type(logic.failure(OSError(code, ""), "/dlm/jobs/backup"))

    assert {kind(code) for code in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)} == {LockLost}
    assert kind(errno.EBADF) is UsageError
    assert kind(errno.ENOSPC) is StoreFull


def test_a_file_that_is_no_lock_is_not_kept() -> None:
    """The mount went away between our looking and the open."""
    world = World(0, errno.EXDEV)
    with pytest.raises(Unavailable, match="unmounted"):
        world.take()
    assert not world.open


def test_in_use_by_another_program_of_this_node() -> None:
    world = World(0, 0, errno.EWOULDBLOCK)
    with pytest.raises(NotGranted, match="on this node"):
        world.take(trying=True)
    assert not world.open


# -- a node that cannot serve --------------------------------------------------------------------------

LATE = (errno.ENOLCK, errno.EIO)
"""What calls answer that a fence overtakes."""


@pytest.mark.parametrize("where", [(), (0,), (0, 0), (0, 0, 0), (errno.ENOENT,)])
@pytest.mark.parametrize("code", LATE)
def test_who_waits_goes_on_trying_and_who_would_not_is_refused(
    where: tuple[int, ...], code: int
) -> None:
    """Wherever the fence comes: at the open, the look at the file, flock(2), the token, the mkdir."""
    states = ("FENCED: cut off", "REJOINING: cut off", "REJOINING")
    world = World(*where, code, states=states)
    fd = world.take()
    assert world.open == {fd}
    whys = [step.why for step in world.steps if isinstance(step, Pause)]
    assert [why.rpartition(" is ")[2] for why in whys] == [*states, ""], "and that it is over"
    tried = World(*where, code)
    with pytest.raises(Unavailable):
        tried.take(trying=True)
    assert not tried.open
    assert not any(isinstance(step, Pause | State) for step in tried.steps)


def test_the_pauses_grow_and_end() -> None:
    world = World(errno.ENOLCK, states=["REJOINING"] * 30)
    world.take()
    pauses = [step.seconds for step in world.steps if isinstance(step, Pause)]
    assert tuple(pauses[:5]) == logic.PAUSES_S
    assert pauses[5:] == [logic.PAUSES_S[-1]] * 25 + [0]


def test_a_node_that_says_it_serves_is_not_asked_for_ever() -> None:
    """It is this lock's own trouble then: its head cannot be read, or a fault broke it."""
    world = World(*[errno.ENOLCK] * 1000)
    with pytest.raises(Unavailable, match="/dlm/jobs/backup cannot be had"):
        world.take()
    assert sum(isinstance(step, Open) for step in world.steps) == logic.REFUSALS + 1
    away = ["REJOINING", "HEALTHY"] * 100
    assert World(*[errno.ENOLCK] * 100, states=away).take(), "each time it has come back"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("FENCED for good: evicted by b", "evicted by b: mount it again"),
        (errno.ENOTCONN, "daemon is gone"),
        (errno.ENODATA, "unmounted just now"),
        (errno.EOPNOTSUPP, "unmounted just now"),
    ],
)
def test_a_node_that_does_not_come_back_is_told_at_once(state: str | int, says: str) -> None:
    world = World(errno.ENOLCK, states=["FENCED: cut off", state])
    with pytest.raises(Unavailable, match=says):
        world.take()


def test_who_may_not_read_the_state_is_served_as_well() -> None:
    assert World(errno.ENOLCK, states=[errno.EACCES]).take()


CODES = st.sampled_from(
    [0, errno.ENOENT, errno.EAGAIN, errno.ESTALE, errno.EIO, errno.EXDEV, errno.ENOTUNIQ]
)


@given(st.lists(CODES, max_size=20), st.booleans(), st.booleans())
def test_whatever_happens_a_file_is_returned_or_closed(
    script: list[int], trying: bool, create: bool
) -> None:
    world = World(*script)
    try:
        fd = world.take(trying=trying, create=create)
    except (DlmfsError, KeyboardInterrupt):
        assert not world.open
    else:
        assert world.open == {fd}


def test_values() -> None:
    assert logic.padded(b"x") == b"x" + bytes(63)
    assert logic.stripped(logic.padded(b"\0x\0\0")) == b"\0x"
    with pytest.raises(UsageError, match="64 bytes, not 65"):
        logic.padded(bytes(65))
    assert logic.abandonment(b"") is None
    assert logic.abandonment(b'{"node": "a", "token": 7}') == Abandoned("a", 7)
    assert logic.is_lost(select.POLLERR | select.POLLIN)
    assert not logic.is_lost(select.POLLIN)
    assert logic.is_wanted(select.POLLIN)


def test_the_two_kinds_have_the_same_names() -> None:
    for one, other in ((sync.Lock, aio.Lock), (sync.Domain, aio.Domain)):
        names = {name for name in dir(one) if not name.startswith("_")}
        assert names == {name for name in dir(other) if not name.startswith("_")}
        for name in names:
            ours, theirs = getattr(one, name), getattr(other, name)
            if callable(ours):
                assert (
                    ours.__code__.co_varnames[: ours.__code__.co_argcount]
                    == (theirs.__code__.co_varnames[: theirs.__code__.co_argcount])
                )
                assert ours.__doc__, name


# -- places ----------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_where_a_lock_lies(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nodes.mount("a"), nodes.mount("b")
    monkeypatch.delenv("DLMFS_MOUNT", raising=False)
    with pytest.raises(UsageError, match="dlmfs mounts"):
        find_mount()
    monkeypatch.setenv("DLMFS_MOUNT", str(a))
    assert place("jobs/backup").path == str(a / "jobs/backup")
    assert place("jobs/backup", mount=b).path == str(b / "jobs/backup")
    assert place(b"jobs/\xff").name == "\udcff"
    link = nodes.folder / "link"
    link.symlink_to(b)
    assert place(link / "jobs/backup") == place(b / "jobs/backup")
    assert place(Path(b) / "jobs/../jobs/backup").path == str(b / "jobs/backup")
    for wrong in ("backup", "a/b/c", "../x/y", "x/..", "jobs/", "jobs/x/", a, a / "jobs"):
        with pytest.raises(UsageError, match="not a lock"):
            place(wrong)
    for outside in (nodes.folder / "x/y", "/etc/passwd"):
        with pytest.raises(UsageError, match="not on a dlmfs mount"):
            place(outside)
    with pytest.raises(UsageError, match="NUL"):
        place("jobs/a\0b")


def test_no_mount_at_all_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLMFS_MOUNT", raising=False)
    monkeypatch.setattr("dlmfs.fuse.mountinfo.mounts", list)
    with pytest.raises(Unavailable, match="dlmfs mount SOURCE DIR"):
        place("jobs/backup")


def test_one_space_by_other_words() -> None:
    assert space("etcd://h1,h2:1/prod") == space("etcd://h2/prod") != space("etcd://h2/test")
    assert space("local:/x") != space("local:/y")
