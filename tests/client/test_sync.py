"""Locks for programs with threads, on real mounts, under both holder rules."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlmfs.client import (
    Cancelled,
    Domain,
    Lock,
    LockLost,
    NotGranted,
    NotPermitted,
    TimedOut,
    Unavailable,
    UsageError,
    base,
    place,
    watcher,
)
from dlmfs.client.keeper import Keeper
from dlmfs.client.place import Place
from dlmfs.client.watcher import Watcher
from tests.cli.jobs import Job
from tests.client.conftest import Twice
from tests.client.threads import awaited, begin, free, join
from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs
from tests.robust.helpers import daemon_of, kill
from tests.waiting.agents import holding, stood_in_line_for, until, waiting, wanting

pytestmark = pytest.mark.fuse


# -- having it ---------------------------------------------------------------------------------------


def test_a_lock_and_its_value(lock: Twice) -> None:
    with Lock(lock.a) as mine:
        assert mine.held
        mine.check()
        assert mine.get_value() == b""
        mine.set_value(b"hello")
        assert mine.abandoned() is None
        assert not free(lock.b)
        assert str(mine.token) == os.getxattr(lock.a, "user.dlmfs.token").decode()
        assert "held" in repr(mine)
    assert not mine.held
    with Lock(lock.b, shared=True) as theirs:
        assert theirs.get_value() == b"hello"
        assert theirs.token > 0
        with pytest.raises(UsageError, match="held shared"):
            theirs.set_value(b"x")
        with Lock(lock.a, shared=True) as too:
            assert too.get_value() == b"hello"
    with mine:  # again, by the same object
        assert mine.token > 0
        with pytest.raises(UsageError, match="64 bytes, not 65"):
            mine.set_value(bytes(65))


def test_tokens_grow_between_nodes(lock: Twice) -> None:
    tokens = []
    for path in (lock.a, lock.b) * 3:
        with Lock(path) as mine:
            tokens.append(mine.token)
    assert tokens == sorted(set(tokens))


def test_what_is_not_held_says_so(lock: Twice) -> None:
    mine = Lock(lock.a)
    for use in (mine.release, mine.get_value, mine.check, mine.fileno, lambda: mine.token):
        with pytest.raises(UsageError, match="not acquired"):
            use()
    mine.cancel()
    mine.acquire()
    with pytest.raises(UsageError, match="held by this object"):
        mine.acquire()
    mine.release()


def test_on_one_node_lock_objects_exclude_each_other(lock: Twice) -> None:
    """Threads of one process, and `dlmfs lock`; under holder=node too."""
    inside: list[int] = []
    most = 0

    def work() -> None:
        nonlocal most
        for _ in range(5):
            with Lock(lock.a):
                inside.append(1)
                most = max(most, len(inside))
                inside.pop()

    with Lock(lock.a):
        assert not free(lock.a)
        assert dlmfs("lock", "-n", str(lock.a), "true", check=False).returncode == 1
        threads = [begin(work) for _ in range(4)]
        until(lambda: len(awaited()) == 4, "all four wait")
        assert not inside
    join(*threads)
    assert most == 1


def test_threads_of_one_process_do_not_keep_another_node_out(lock: Twice) -> None:
    """The daemon serves a process that has the lock already before all others, lest it waits for
    itself: so its threads must not ask while one of them has it."""
    mine = threading.Semaphore(0)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with Lock(lock.a):
                mine.release()

    threads = [begin(work) for _ in range(3)]
    try:
        for _ in range(3):
            assert mine.acquire(timeout=PATIENCE_S)
            theirs = Lock(lock.b)
            asked = begin(theirs.acquire)
            until(lambda it=theirs: it.held or wanting(lock.a), "its wish is known")  # type: ignore[misc]
            while mine.acquire(blocking=False):
                pass
            turns = 0
            while not theirs.held:
                turns += mine.acquire(timeout=0.05)
                assert turns < 20, "it never has its turn"
            join(asked)
            theirs.release()
    finally:
        stop.set()
        join(*threads)


def test_the_status_tells_of_this_process(lock: Twice) -> None:
    with Lock(lock.a):
        (thread,) = holding(lock.a)
        assert Path(f"/proc/self/task/{thread}").exists()


def test_what_cannot_be_had(lock: Twice) -> None:
    with pytest.raises(UsageError, match="lock has up to 255 bytes, this one has 256"):
        Lock(lock.a.parent / ("n" * 254 + "é"))
    with pytest.raises(UsageError, match="domain has up to 63 bytes, this one has 64"):
        Lock("n" * 64 + "/x", mount=lock.a.parent)
    with pytest.raises(UsageError, match="lock cannot begin with"):
        Lock(lock.a.parent / "$x")
    with pytest.raises(UsageError, match="does not exist"):
        Lock(lock.a.parent / "never-made", create=False).acquire()
    with pytest.raises(UsageError, match="not on a dlmfs mount"):
        Lock("/tmp/x/y")


@pytest.mark.root
def test_a_mode_that_forbids_it(lock: Twice) -> None:
    lock.a.touch()
    lock.a.chmod(0o600)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            Lock(lock.a).acquire()
        except NotPermitted:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


# -- waiting -----------------------------------------------------------------------------------------


def test_a_wait_that_is_over_leaves_nothing_behind(lock: Twice) -> None:
    """Not even the place that an interrupted open keeps for a second: others would wait for it."""
    with Lock(lock.a):
        for path in lock:
            with pytest.raises(TimedOut, match=r"within 0\.05 s"):
                Lock(path, timeout=0.05).acquire()
            with pytest.raises(TimedOut):
                Lock(path).acquire(timeout=0)
            assert not awaited(), "its thread waits on"
            assert waiting(path) == []
            assert len(holding(lock.a)) == 1
    assert free(lock.b)


def test_a_wait_for_another_program_of_the_node(lock: Twice) -> None:
    """Under holder=node it stands in flock(2), which a signal must end as well."""
    job = Job(lock.a, "-c", "echo has; read _")
    try:
        assert job.line() == "has"
        for _ in range(2):
            with pytest.raises(TimedOut):
                Lock(lock.a, timeout=0.05).acquire()
            assert not awaited(), "its thread waits on"
        assert not free(lock.a)
        assert len(holding(lock.a)) == 1
    finally:
        job.close()


def test_cancel_ends_another_threads_wait(lock: Twice) -> None:
    outcome: list[object] = []
    waiter = Lock(lock.b)

    def wait() -> None:
        try:
            waiter.acquire()
        except Cancelled as error:
            outcome.append(error)

    with Lock(lock.a):
        thread = begin(wait)
        until(lambda: waiting(lock.b), "it waits")
        waiter.cancel()
        join(thread)
        assert len(outcome) == 1
        assert not waiter.held
        assert waiting(lock.b) == []


def test_ctrl_c_ends_a_wait(lock: Twice) -> None:
    def interrupt() -> None:
        until(lambda: waiting(lock.b), "it waits")
        os.kill(os.getpid(), signal.SIGINT)

    waiter = Lock(lock.b)
    with Lock(lock.a):
        thread = begin(interrupt)
        with pytest.raises(KeyboardInterrupt):
            waiter.acquire()
        join(thread)
        assert waiting(lock.b) == []
        assert not waiter.held
    waiter.acquire()
    waiter.release()


def test_a_grant_in_the_instant_of_cancelling_does_not_leak(lock: Twice) -> None:
    """Whoever comes first decides; in no case is the lock kept by nobody."""
    draw = random.Random(6)
    held = cancelled = 0
    span = 0.01  # as long as a grant takes, about; the machine's load decides
    while held + cancelled < 60 or not held or not cancelled:
        assert held + cancelled < 2000, "it is always the same one that comes first"
        holder, waiter = Lock(lock.a), Lock(lock.b)
        holder.acquire()
        failed: list[BaseException] = []

        def wait(waiter: Lock = waiter, failed: list[BaseException] = failed) -> None:
            try:
                waiter.acquire()
            except Cancelled as error:
                failed.append(error)

        thread = begin(wait)
        until(lambda: waiting(lock.b), "it waits")
        holder.release()
        time.sleep(draw.random() * span)
        waiter.cancel()
        join(thread)
        assert waiter.held == (not failed)
        if waiter.held:
            held += 1
            span *= 0.9
            waiter.release()
        else:
            cancelled += 1
            span *= 1.1


def test_a_stopped_daemon_does_not_hold_up_who_would_not_wait(nodes: Nodes) -> None:
    """The thread in open(2) cannot be woken then; it ends later, and nothing is held."""
    a = nodes.mount("a")
    with Lock(a / "dom/x"):
        pass
    waiter = Lock(a / "dom/x")
    with daemon_of(a) as daemon:
        signal.pidfd_send_signal(daemon, signal.SIGSTOP)
        try:
            with pytest.raises(TimedOut):
                waiter.acquire(timeout=0.1)
        finally:
            signal.pidfd_send_signal(daemon, signal.SIGCONT)
    until(lambda: not holding(a / "dom/x") and not waiting(a / "dom/x"), "nothing is left")
    with waiter:
        assert waiter.held


# -- notices and loss ----------------------------------------------------------------------------------


def test_notices_by_callback_and_by_waiting(lock: Twice) -> None:
    heard = threading.Semaphore(0)
    mine = Lock(lock.a, on_notice=heard.release)
    other = Lock(lock.b)

    def in_vain() -> None:
        with pytest.raises(Cancelled):
            other.acquire()

    with mine:
        assert not mine.wait_wanted(0)
        for _ in range(2):  # each waiter anew
            waiter = begin(in_vain)
            assert heard.acquire(timeout=PATIENCE_S)
            assert mine.wait_wanted(PATIENCE_S)
            mine.wanted.clear()
            until(lambda: waiting(lock.b), "it waits")
            other.cancel()
            join(waiter)
            until(lambda: wanting(lock.a) == [], "the wish is gone")
        assert not mine.lost.is_set()


@pytest.mark.allow_warnings
def test_a_callback_that_fails_does_not_end_the_notices(
    lock: Twice, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("mine")

    with Lock(lock.a, on_notice=fail) as mine:
        ask_until_wanted(mine, lock.b)
    with Lock(lock.a) as mine:
        ask_until_wanted(mine, lock.b)
    assert "callback failed" in caplog.text


def ask_until_wanted(mine: Lock, other: Path) -> None:
    """A try of a moment may be over before it is in the queue."""
    deadline = time.monotonic() + PATIENCE_S
    while not mine.wait_wanted(0.0):
        assert time.monotonic() < deadline
        with pytest.raises(TimedOut):
            Lock(other).acquire(timeout=0.2)


def lose_state(nodes: Nodes, _where: Path) -> None:
    nodes.state.unlink()


def lose_daemon(_nodes: Nodes, where: Path) -> None:
    kill(where)


@pytest.mark.allow_warnings
@pytest.mark.parametrize("lose", [lose_state, lose_daemon])
def test_a_lost_lock(nodes: Nodes, lose: Callable[[Nodes, Path], None]) -> None:
    a = nodes.mount("a")
    mine, shared = Lock(a / "dom/x"), Lock(a / "dom/y", shared=True)
    with pytest.raises(LockLost, match="was lost"), mine:
        shared.acquire()
        mine.set_value(b"before")
        lose(nodes, a)
        assert mine.wait_lost(PATIENCE_S)
        assert shared.wait_lost(PATIENCE_S)
        assert mine.wanted.is_set(), "who waits for a notice waits no more"
        with pytest.raises(LockLost):
            mine.wait_wanted()
        for use in (mine.get_value, mine.abandoned, mine.check, shared.get_value):
            with pytest.raises(LockLost):
                use()
        with pytest.raises(LockLost):
            mine.set_value(b"late")
        assert not mine.held
        assert mine.token > 0, "the token stays, for the report"
    shared.release()
    with pytest.raises((Unavailable, LockLost)):
        mine.acquire()


def test_a_loss_does_not_hide_what_went_wrong_before(nodes: Nodes) -> None:
    a = nodes.mount("a")
    with pytest.raises(ValueError, match="mine"), Lock(a / "dom/x") as mine:
        kill(a)
        mine.wait_lost(PATIENCE_S)
        raise ValueError("mine")


def test_after_a_remount_the_same_object_works_again(nodes: Nodes) -> None:
    a = nodes.mount("a")
    mine = Lock(a / "dom/x")
    with pytest.raises(LockLost), mine:
        mine.set_value(b"before")
        kill(a)
        assert mine.wait_lost(PATIENCE_S)
    nodes.mount("a")
    with mine:
        mark = mine.abandoned()
        assert mark is not None
        assert mark.node == "a"
        assert 0 < mark.token < mine.token
        assert mine.get_value() == b"before"
        mine.set_value(b"after")
        assert mine.abandoned() is None


# -- domains -------------------------------------------------------------------------------------------


def test_a_domain(lock: Twice) -> None:
    mount = lock.a.parent.parent
    with Domain("library") as jobs:
        assert (mount / "library").is_dir()
        held = jobs.lock("x")
        held.acquire()
        with jobs.lock("y", shared=True, timeout=1) as other:
            assert other.held
        assert jobs.names() == ["x", "y"]
        with pytest.raises(NotGranted):
            jobs.forget("x")
        with pytest.raises(NotGranted, match="lock files"):
            jobs.leave()
        with pytest.raises(UsageError):
            jobs.lock("a/b")
    assert not held.held, "the end of the block lets go of all"
    jobs.forget("x")
    assert jobs.names() == ["y"]
    again = Domain(mount / "library")
    assert (again.name, again.path) == ("library", jobs.path)
    again.leave(forget=True)
    assert not (mount / "library").exists()


def test_a_name_that_is_no_domains() -> None:
    with pytest.raises(UsageError):
        Domain("/tmp/x")


def test_who_waits_behind_one_that_does_not_notice_the_loss_is_told(nodes: Nodes) -> None:
    """Under holder=node they wait for each other in flock(2), of which the mount's end is no end."""
    path = nodes.mount("a", "holder=node") / "dom/x"
    path.parent.mkdir()
    outcome: list[type[BaseException] | None] = []
    with open(path, "w+b", buffering=0) as careless:
        fcntl.flock(careless, fcntl.LOCK_EX)
        thread = begin(lambda: outcome.append(_raised(Lock(path).acquire)))
        until(lambda: stood_in_line_for(careless.fileno()), "it waits")
        kill(nodes.mounts[0])
        join(thread)
        assert outcome == [Unavailable]


def test_a_callback_that_waits_does_not_keep_other_locks_from_being_told(lock: Twice) -> None:
    goes_on = threading.Event()
    other = lock.a.with_name(f"{lock.a.name}-other")
    with (
        Lock(lock.a, on_notice=lambda: goes_on.wait(PATIENCE_S)) as one,
        Lock(other) as two,
    ):
        threads = []
        for mine, theirs in ((one, lock.b), (two, lock.b.with_name(other.name))):
            threads.append(begin(lambda theirs=theirs: Lock(theirs).acquire(timeout=PATIENCE_S)))  # type: ignore[misc]
            assert mine.wanted.wait(PATIENCE_S), f"nobody said that {theirs} is wanted"
        assert not goes_on.is_set()
        goes_on.set()
    join(*threads)


def test_what_was_about_an_earlier_holding_is_not_told_of_the_next(lock: Twice) -> None:
    mine = Lock(lock.a)
    mine.acquire()
    earlier = mine._keeper
    assert earlier is not None
    mine.release()
    with mine:
        earlier.happened(select.POLLERR | select.POLLIN)
        assert not mine.lost.is_set()
        assert not mine.wanted.is_set()


def test_a_stopped_daemon_does_not_keep_another_mounts_locks(nodes: Nodes) -> None:
    """While it is asked about a lock that it has just granted, the one epoll can do nothing else."""
    a, b = nodes.pair("holder=file")
    device = place.place(a / "dom/x").dev
    mine = Lock(b / "dom/mine")
    mine.acquire()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        watcher.watcher(device).add(fd, mine._keeper)  # type: ignore[arg-type]
        watcher.watcher(device).remove(fd)

    pid = nodes.pid(a)
    os.kill(pid, signal.SIGSTOP)
    try:
        asking = begin(ask)
        assert asked.wait(PATIENCE_S)
        until(lambda: asleep_in_poll(asking), "the daemon is asked")
        thread = begin(mine.release)
        thread.join(PATIENCE_S / 3)
        assert not thread.is_alive(), "it waits for the stopped daemon"
        assert asking.is_alive()
    finally:
        os.kill(pid, signal.SIGCONT)
    join(asking)
    os.close(fd)


def asleep_in_poll(thread: threading.Thread) -> bool:
    """Whether the thread sleeps in epoll_ctl(2)."""
    text = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
    return text.split()[0] == str({"x86_64": 233, "aarch64": 21}[os.uname().machine])


# -- one object used twice -----------------------------------------------------------------------------


def test_who_takes_an_object_twice_is_refused_and_costs_it_nothing(lock: Twice) -> None:
    """The refusal must neither drop what is held nor forget that it is lost."""
    mine = Lock(lock.a)
    with mine:
        with pytest.raises(UsageError, match="held by this object"), mine:
            pass
        with pytest.raises(UsageError, match="held by this object"):
            mine.try_acquire()
        assert mine.held
        assert not free(lock.b)
        mine.lost.set()
        mine.wanted.set()
        with pytest.raises(UsageError, match="held by this object"):
            mine.acquire()
        assert mine.lost.is_set()
        assert mine.wanted.is_set()


def test_of_two_threads_that_take_one_object_at_once_one_is_refused(
    lock: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked whether it is held before either has taken it."""
    both = threading.Barrier(2)
    real = place.place

    def placed(*args: Any) -> Place:
        where = real(*args)
        both.wait(PATIENCE_S)
        return where

    mine = Lock(lock.a)
    outcomes: list[str] = []

    def take() -> None:
        try:
            mine.acquire(timeout=PATIENCE_S)
        except UsageError:
            outcomes.append("refused")
        else:
            outcomes.append("held")

    with monkeypatch.context() as patch:
        patch.setattr(base, "doors", base.doors._replace(place=placed))
        join(begin(take), begin(take))
    assert sorted(outcomes) == ["held", "refused"]
    mine.release()
    assert free(lock.b)


def test_a_released_lock_is_free_at_once_for_another_object(lock: Twice) -> None:
    """Also before the thread that held it has ended."""
    first, second = Lock(lock.a), Lock(lock.a)
    for _ in range(50):
        first.acquire()
        first.release()
        assert second.try_acquire()
        second.release()


# -- exceptions of a signal's handler ------------------------------------------------------------------


def test_a_release_that_an_exception_ended_goes_on(
    lock: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Lock(lock.a)
    mine.acquire()

    def interrupted(_self: Keeper) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "_close_unused", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.release()
        assert not mine.held
    mine.acquire(timeout=PATIENCE_S)  # by the same object
    mine.release()
    assert free(lock.b)


def test_a_handler_may_release_in_the_middle_of_a_release(lock: Twice) -> None:
    mine = Lock(lock.a)
    mine.acquire()
    keeper = mine._keeper
    assert keeper is not None

    def handle() -> None:
        with keeper._mutex, watcher._making:
            mine.release()

    join(begin(handle))
    assert free(lock.b)


def test_no_thread_for_the_notices_is_an_error_and_nothing_is_held(
    lock: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_device: str) -> Watcher:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("dlmfs.client.keeper.watcher", refuse)
        mine = Lock(lock.a)
        outcome: list[type[BaseException] | None] = []
        join(begin(lambda: outcome.append(_raised(mine.acquire))))
        assert outcome == [RuntimeError]
    assert free(lock.b)


def _raised(what: Callable[[], object]) -> type[BaseException] | None:
    try:
        what()
    except BaseException as error:
        return type(error)
    return None
