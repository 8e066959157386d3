"""Locked and by whom, from shared to exclusive and back, decorators: for threads and asyncio alike."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dlmfs as package
from dlmfs.client import Lock, LockLost, TimedOut, Unavailable, UsageError, aio
from tests.cli.jobs import Job
from tests.client.conftest import Twice
from tests.client.threads import begin, free, join
from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes, dlmfs
from tests.robust.helpers import kill
from tests.waiting.agents import holding

pytestmark = pytest.mark.fuse


class Kind:
    """One of the two libraries, called in the same way."""

    def __init__(self, run: Callable[[Any], Any], lock: Any) -> None:
        self.run, self.lock = run, lock


@pytest.fixture(params=["threads", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    if request.param == "threads":
        yield Kind(lambda result: result, Lock)
        return
    loop = asyncio.new_event_loop()
    yield Kind(loop.run_until_complete, aio.Lock)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def test_whether_it_is_locked_and_by_whom(kind: Kind, lock: Twice) -> None:
    mine = kind.lock(lock.a, shared=True)
    assert kind.run(mine.locked()) is False
    assert kind.run(mine.holders()) == []
    with Lock(lock.b, shared=True):
        assert kind.run(mine.locked()) is True, "shared by another node is locked, too"
        assert kind.run(mine.holders()) == []
        kind.run(mine.acquire())
        assert kind.run(mine.locked()) is True
        (holder,) = kind.run(mine.holders())
        assert (holder.node, holder.mode, holder.pid) == ("a", "PR", holding(lock.a)[0])
        mine.release()
    assert kind.run(mine.locked()) is False


def test_from_shared_to_exclusive_and_back(kind: Kind, lock: Twice) -> None:
    mine = kind.lock(lock.a, shared=True)
    kind.run(mine.acquire())
    kind.run(mine.exclusive())
    token = mine.token
    assert not Lock(lock.b, shared=True).try_acquire()
    kind.run(mine.set_value(b"changed"))
    kind.run(mine.shared())
    assert mine.is_shared
    with Lock(lock.b, shared=True) as other:
        assert other.get_value() == b"changed"
        with pytest.raises(TimedOut):
            kind.run(mine.exclusive(timeout=0.05))
        assert not mine.held, "what could not be had leaves nothing"
    kind.run(mine.acquire())
    assert mine.token > token, "exclusively, as it was asked for last"
    kind.run(mine.exclusive())
    mine.release()
    with pytest.raises(UsageError, match="not acquired"):
        kind.run(mine.shared())


def test_two_that_both_go_on_alone_do_not_wait_for_each_other(lock: Twice) -> None:
    both = [Lock(path, shared=True) for path in lock]
    for each in both:
        each.acquire()
    inside: list[Lock] = []

    def go_on(each: Lock) -> None:
        each.exclusive(timeout=PATIENCE_S)
        inside.append(each)
        assert len(inside) == 1
        inside.remove(each)
        each.release()

    join(*(begin(lambda each=each: go_on(each)) for each in both))  # type: ignore[misc]
    assert free(lock.a)


def test_a_loss_in_the_middle_of_a_block_that_went_on_alone(nodes: Nodes) -> None:
    a = nodes.mount("a")

    async def main() -> None:
        async with aio.Lock(a / "dom/x", shared=True) as mine:
            await mine.exclusive()
            await asyncio.to_thread(kill, a)
            await asyncio.sleep(PATIENCE_S)

    with pytest.raises(LockLost):
        asyncio.run(main())
    a = nodes.mount("a")
    with pytest.raises(LockLost), Lock(a / "dom/x") as mine:
        kill(a)
        assert mine.wait_lost(PATIENCE_S)
        mine.shared()


def test_as_a_decorator(lock: Twice) -> None:
    inside = threading.Semaphore(1)

    @package.Lock(lock.a, timeout=PATIENCE_S)
    def work(a: int, *, b: int) -> int:
        """What it does."""
        assert inside.acquire(blocking=False)
        assert not free(lock.b)
        inside.release()
        return a + b

    assert work.__name__ == "work"
    results: list[int] = []
    join(*(begin(lambda: results.append(work(1, b=2))) for _ in range(3)))
    assert results == [3, 3, 3]
    assert free(lock.b)


@pytest.mark.parametrize("of", [Lock, aio.Lock])
def test_as_a_decorator_of_a_coroutine(of: Any, lock: Twice) -> None:
    inside = 0

    @of(lock.a, timeout=PATIENCE_S)  # type: ignore[untyped-decorator]
    async def work(a: int) -> int:
        nonlocal inside
        inside += 1
        assert inside == 1
        await asyncio.sleep(0)
        inside -= 1
        return a

    async def main() -> list[int]:
        return list(await asyncio.gather(*(work(n) for n in range(3))))

    assert asyncio.run(main(), debug=True) == [0, 1, 2]
    with pytest.raises(UsageError, match=r"dlmfs\.Lock"):
        aio.Lock(lock.a)(lambda: None)


def test_a_text_is_no_value(kind: Kind, lock: Twice) -> None:
    mine = kind.lock(lock.a)
    kind.run(mine.acquire())
    try:
        for value in ("text", 5, None):
            with pytest.raises(UsageError, match="a value is bytes, not "):
                kind.run(mine.set_value(value))
        kind.run(mine.set_value(bytearray(b"x")))
        assert kind.run(mine.get_value()) == b"x"
    finally:
        mine.release()


def test_a_lock_can_be_made_before_there_is_a_mount(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DLMFS_MOUNT", raising=False)
    monkeypatch.setattr("dlmfs.fuse.mountinfo.mounts", list)
    mine = kind.lock("jobs/backup")
    assert "jobs/backup" in repr(mine)
    for use in (mine.acquire, mine.try_acquire, mine.locked, mine.holders):
        with pytest.raises(Unavailable, match="no dlmfs is mounted"):
            kind.run(use())
    with pytest.raises(UsageError, match="not on a dlmfs mount"):
        kind.lock("/tmp/x/y")


def test_the_package_has_the_librarys_names_and_loads_them_late() -> None:
    from dlmfs import client

    for name in client.__all__:
        assert getattr(package, name) is getattr(client, name)
        assert name in dir(package)
    assert package.client is client
    with pytest.raises(AttributeError):
        _ = package.lock
    code = "import sys, dlmfs; print([m for m in sys.modules if m.startswith('dlmfs.')])"
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "[]\n"


# -- `dlmfs lock` inside of `dlmfs lock` -----------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["-o"], ["-n"]])
def test_a_nested_command_that_would_wait_for_itself_is_refused(
    lock: Twice, options: list[str]
) -> None:
    inner = [*DLMFS, "lock", *options, str(lock.a), "true"]
    done = dlmfs("lock", *options, str(lock.a), "--", *inner, check=False)
    assert done.returncode == 1
    assert "would wait for itself" in done.stderr
    inner = [*DLMFS, "lock", "-s", str(lock.a), "true"]
    done = dlmfs("lock", "-s", str(lock.a), "--", *inner, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_only_inherited_the_environment_is_not_refused(lock: Twice) -> None:
    """The lock has been another's since, and is waited for like any."""
    environment = f"DLMFS_LOCK={lock.a}"
    job = Job("-o", lock.a, "-c", "echo has; read _")
    try:
        assert job.line() == "has"
        words = [
            "env",
            environment,
            *DLMFS,
            "lock",
            "-n",
            str(lock.a),
            "true",
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "")
    finally:
        job.close()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
