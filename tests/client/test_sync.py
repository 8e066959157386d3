"""Locks for programs with threads, on real mounts, under both owner rules."""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

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
)
from tests.cli.test_lock import Job
from tests.client.conftest import Twice
from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs
from tests.robust.helpers import daemon_of, kill
from tests.waiting.agents import holding, until, waiting, wanting

pytestmark = pytest.mark.fuse


def free(path: Path) -> bool:
    """Whether it can be had at once, by a lock that is then dropped again."""
    lock = Lock(path)
    if not lock.try_acquire():
        return False
    lock.release()
    return True


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def begin(what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    return thread


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
    """Threads of one process, and `dlmfs lock`; under owner=node too."""
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
        until(lambda: len(_keepers_in_wait(lock.a)) == 4, "all four wait")
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


def _keepers_in_wait(path: Path) -> list[str]:
    """Threads of ours that stand in open(2) or flock(2) for a lock."""
    from dlmfs.client import keeper

    return [k.name for k in list(keeper._keepers.values()) if not k.settled.is_set()]


def test_the_status_tells_of_this_process(lock: Twice) -> None:
    with Lock(lock.a):
        (thread,) = holding(lock.a)
        assert Path(f"/proc/self/task/{thread}").exists()


def test_what_cannot_be_had(lock: Twice) -> None:
    with pytest.raises(UsageError, match="no name"):
        Lock(lock.a.parent / ("n" * 32)).acquire()
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
            assert not _keepers_in_wait(path), "its thread waits on"
            assert waiting(path) == []
            assert len(holding(lock.a)) == 1
    assert free(lock.b)


def test_a_wait_for_another_program_of_the_node(lock: Twice) -> None:
    """Under owner=node it stands in flock(2), which a signal must end as well."""
    job = Job(lock.a, "-c", "echo has; read _")
    try:
        assert job.line() == "has"
        for _ in range(2):
            with pytest.raises(TimedOut):
                Lock(lock.a, timeout=0.05).acquire()
            assert not _keepers_in_wait(lock.a), "its thread waits on"
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
    for _ in range(60):
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
        time.sleep(draw.random() * 0.01)  # as long as a grant takes, about
        waiter.cancel()
        join(thread)
        assert waiter.held == (not failed)
        if waiter.held:
            held += 1
            waiter.release()
        else:
            cancelled += 1
    assert held
    assert cancelled


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
        with pytest.raises(TimedOut):
            Lock(lock.b).acquire(0.05)
        assert mine.wait_wanted(PATIENCE_S)
    with Lock(lock.a) as mine:
        with pytest.raises(TimedOut):
            Lock(lock.b).acquire(0.05)
        assert mine.wait_wanted(PATIENCE_S)
    assert "callback failed" in caplog.text


def lose_state(nodes: Nodes, _where: Path) -> None:
    nodes.state.unlink()


def lose_daemon(_nodes: Nodes, where: Path) -> None:
    kill(where)


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


# -- processes -----------------------------------------------------------------------------------------


def in_child(what: Callable[[], object]) -> tuple[int, int]:
    """Fork; the child does it, says whether it went well, and lives until its pipe is closed."""
    reading, writing = os.pipe()
    answer, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        try:
            what()
            os.write(telling, b"y")
            os.read(reading, 1)
        finally:
            os._exit(0)
    os.close(reading)
    os.close(telling)
    assert os.read(answer, 1) == b"y", "it failed in the child"
    os.close(answer)
    return pid, writing


def test_a_forked_child_neither_has_nor_keeps_the_lock(lock: Twice) -> None:
    mine = Lock(lock.a)

    def in_the_child() -> None:
        assert not mine.held
        with pytest.raises(LockLost, match="forked"):
            mine.check()
        with pytest.raises(LockLost):
            mine.get_value()
        mine.release()
        assert not Lock(lock.a).try_acquire()

    with mine:
        mine.set_value(b"x")
        pid, pipe = in_child(in_the_child)
        mine.check()
    try:
        assert free(lock.b), "the child keeps what its parent had"
        with Lock(lock.a):
            pass
    finally:
        os.close(pipe)
        os.waitpid(pid, 0)


def test_a_wait_of_the_parent_is_nothing_to_a_forked_child(lock: Twice) -> None:
    """It neither waits for the parent's mutexes nor begins threads to end the parent's wait."""
    waiter = Lock(lock.b)

    def in_vain() -> None:
        with pytest.raises(Cancelled):
            waiter.acquire()

    with Lock(lock.a):
        thread = begin(in_vain)
        until(lambda: waiting(lock.b), "it waits")
        keeper = waiter._keeper
        assert keeper is not None

        def in_the_child() -> None:
            waiter.cancel()
            waiter.__del__()
            assert threading.active_count() == 1
            assert not waiter.held

        with keeper._mutex:
            pid, pipe = in_child(in_the_child)
        os.close(pipe)
        os.waitpid(pid, 0)
        waiter.cancel()
        join(thread)


def test_a_forked_child_can_use_the_library(lock: Twice) -> None:
    """Its parent's watching thread does not run in it."""
    with Lock(lock.a):
        pass

    def in_the_child() -> None:
        with Lock(lock.b) as mine:
            with pytest.raises(TimedOut):
                Lock(lock.a).acquire(0.05)
            assert mine.wait_wanted(PATIENCE_S)

    pid, pipe = in_child(in_the_child)
    os.close(pipe)
    os.waitpid(pid, 0)


def test_what_is_opened_in_the_instant_of_a_fork_is_closed_in_the_child(lock: Twice) -> None:
    """In the parent it is opened, and not yet noted."""
    from dlmfs.client import keeper

    with Lock(lock.a) as mine:
        kept = mine._keeper
        assert kept is not None
        fd = kept._fd
        kept.settled.clear()
        kept._fd = -1

        def in_the_child() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

        try:
            pid, pipe = in_child(in_the_child)
        finally:
            kept._fd = fd
            kept.settled.set()
        os.close(pipe)
        os.waitpid(pid, 0)
        assert keeper._keepers


def test_a_program_that_is_started_does_not_inherit_the_lock(lock: Twice) -> None:
    with Lock(lock.a):
        child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    try:
        assert free(lock.b)
    finally:
        child.kill()
        child.wait()


def test_who_dies_lets_go(lock: Twice) -> None:
    code = "import sys; from dlmfs.client import Lock; lock = Lock(sys.argv[1]); lock.acquire(); "
    code += "print('has', flush=True); sys.stdin.read()"
    source = str(Path(__file__).parents[2] / "src")
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(lock.a)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdout, child.stdin:
        assert select.select([child.stdout], [], [], PATIENCE_S)[0]
        assert child.stdout.readline() == b"has\n"
        assert not free(lock.b)
        child.kill()
        child.wait()
    assert free(lock.b)


def test_an_object_that_nobody_has_any_more_lets_go(lock: Twice) -> None:
    Lock(lock.a).acquire()
    gc.collect()
    assert free(lock.b)


def test_the_programs_signals_are_its_own(lock: Twice) -> None:
    """A signal for the process goes to a thread of its own, and its handlers stay."""
    with Lock(lock.a) as mine:
        (thread,) = holding(lock.a)
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        blocked = int(next(x for x in status.splitlines() if x.startswith("SigBlk")).split()[1], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1):
            assert blocked >> (number - 1) & 1
        assert mine.held
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL


def test_the_file_stays_open_while_it_is_used(lock: Twice) -> None:
    mine = Lock(lock.a)
    mine.acquire()
    keeper = mine._keeper
    assert keeper is not None
    with keeper.using() as fd:
        mine.release()
        os.fstat(fd)
        with pytest.raises(LockLost), keeper.using():
            pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_use_and_release_by_different_threads(lock: Twice) -> None:
    """A descriptor's number may be another file's a moment after it is closed: no use of it comes
    through then."""
    mine = Lock(lock.a)
    stop = threading.Event()
    other = lock.a.parent.parent.parent / "ordinary"
    wrong: list[bytes] = []

    def use() -> None:
        while not stop.is_set():
            try:
                mine.set_value(b"lock's")
            except (LockLost, UsageError):
                continue

    def churn() -> None:
        while not stop.is_set():
            with open(other, "w+b", buffering=0) as file:
                wrong.extend(filter(None, (os.pread(file.fileno(), 64, 0) for _ in range(3))))

    threads = [begin(use), begin(churn)]
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with mine:
            pass
    stop.set()
    join(*threads)
    assert not wrong


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
