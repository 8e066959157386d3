"""When a kept place is given up, with the clock out of the game: a second is a thousand here."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from dlmfs.fs import kin, places
from dlmfs.fs.handle import Handle
from dlmfs.fs.places import Places
from dlmfs.model import Mode
from tests.fs.nodes import PATIENCE_S

INO = 7


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdin is not None
        process.stdin.close()


def handle(pid: int, mode: Mode = Mode.EX, ino: int = INO) -> Handle:
    return cast("Handle", SimpleNamespace(pid=pid, mode=mode, file=SimpleNamespace(ino=ino)))


class Kept:
    """Places, and the handles that were given up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, watches: bool = True) -> None:
        self.over: list[Handle] = []
        self.changed = asyncio.Event()
        self.places = Places(loop, loop if watches else None, self.give_up, kin.fate)

    def give_up(self, lost: Handle) -> None:
        self.over.append(lost)
        self.changed.set()

    async def given_up(self) -> list[Handle]:
        async with asyncio.timeout(PATIENCE_S):
            await self.changed.wait()
        return self.over


@pytest.fixture
def long_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "KEPT_S", 1000.0)


@pytest.mark.usefixtures("long_second")
def test_the_end_of_the_process_gives_its_place_up_at_once(
    child: subprocess.Popen[bytes],
) -> None:
    async def main() -> None:
        kept = Kept(asyncio.get_running_loop())
        waiter = handle(child.pid)
        assert kept.places.keep(waiter)
        assert len(kept.places) == 1
        child.kill()
        assert await kept.given_up() == [waiter]
        assert len(kept.places) == 0

    asyncio.run(main())


@pytest.mark.usefixtures("long_second")
def test_who_comes_back_has_its_claim_and_nobody_else_has_it(
    child: subprocess.Popen[bytes],
) -> None:
    """The key is the thread, the file and the mode; and a claim is taken once."""

    async def main() -> None:
        kept = Kept(asyncio.get_running_loop())
        waiter = handle(child.pid)
        assert kept.places.keep(waiter)
        assert kept.places.take(os.getpid(), INO, Mode.EX) is None
        assert kept.places.take(child.pid, INO + 1, Mode.EX) is None
        assert kept.places.take(child.pid, INO, Mode.PR) is None
        assert kept.places.take(child.pid, INO, Mode.EX) is waiter
        assert kept.places.take(child.pid, INO, Mode.EX) is None
        child.kill()
        child.wait(PATIENCE_S)
        await asyncio.sleep(0)  # one round of the loop: nothing is watched any more
        assert kept.over == []

    asyncio.run(main())


@pytest.mark.usefixtures("long_second")
@pytest.mark.parametrize("but", [None, Mode.PR, Mode.EX])
def test_another_kind_of_open_gives_up_what_it_does_not_take(
    child: subprocess.Popen[bytes], but: Mode | None
) -> None:
    async def main() -> None:
        kept = Kept(asyncio.get_running_loop())
        waiters = {mode: handle(child.pid, mode) for mode in (Mode.PR, Mode.EX)}
        elsewhere = handle(child.pid, Mode.EX, INO + 1)
        for waiter in (*waiters.values(), elsewhere):
            assert kept.places.keep(waiter)
        kept.places.leave(child.pid, INO, but=but)
        assert kept.over == [waiter for mode, waiter in waiters.items() if mode is not but]
        kept.places.clear(INO)
        assert set(map(id, kept.over)) == set(map(id, waiters.values()))
        kept.places.clear()
        assert kept.over[-1] is elsewhere
        assert len(kept.places) == 0

    asyncio.run(main())


@pytest.mark.usefixtures("long_second")
def test_no_place_for_the_dying_and_the_unknown(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would ever come back for it."""

    async def main() -> None:
        kept = Kept(asyncio.get_running_loop())
        assert not kept.places.keep(handle(0))
        gone = child.pid
        child.kill()
        child.wait(PATIENCE_S)
        assert not kept.places.keep(handle(gone))
        kept.places = Places(asyncio.get_running_loop(), None, kept.give_up, lambda _pid: None)
        assert not kept.places.keep(handle(os.getpid()))
        assert (len(kept.places), kept.over) == (0, [])

    asyncio.run(main())


@pytest.mark.parametrize("watches", [True, False])
def test_the_second_ends_by_itself(monkeypatch: pytest.MonkeyPatch, *, watches: bool) -> None:
    """Also where no process can be watched."""
    monkeypatch.setattr(places, "KEPT_S", 0.01)

    async def main() -> None:
        kept = Kept(asyncio.get_running_loop(), watches=watches)
        waiter = handle(os.getpid())
        assert kept.places.keep(waiter)
        assert await kept.given_up() == [waiter]
        assert kept.places.take(os.getpid(), INO, Mode.EX) is None

    asyncio.run(main())
