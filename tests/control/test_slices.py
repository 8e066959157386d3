"""However many locks there are, no question keeps the event loop from serving them for long.

No clock: what is counted is the function calls between two turns of the loop. `bench/stalls.py` measures
the time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dlmfs import privileges, takedown
from dlmfs.config import MountConfig, parse_options, parse_source
from dlmfs.core.events import Claim, Stage
from dlmfs.fs.tree import Directory
from dlmfs.fuse import mount
from dlmfs.handlers import _TABLE, handlers
from dlmfs.model import Mode
from dlmfs.node import Node
from dlmfs.permission import Asker
from dlmfs.store.sqlite import SqliteStore
from tests.control.asking import STRANGER, Facts
from tests.fs.nodes import PATIENCE_S

pytestmark = [pytest.mark.fuse, pytest.mark.root]

LOCKS = 8_000
HEADS = 1_000
CALLS_MAX = 9_000
"""Between two turns; a slice of 500 locks takes some five calls of each, a row some 40."""
QUESTIONS: dict[str, list[Facts]] = {
    "status": [{}],
    "info": [{"domain": "dom", "lock": "crowd"}, {"domain": "dom", "lock": "k00001"}],
    "hindrance": [{"domain": "dom", "lock": "crowd"}],
    "nodes": [{}],
    "why": [{"domain": "dom", "lock": "crowd"}],
    "health": [{}],
    "top": [{"idle": True}, {}, {"filter": "k0001", "idle": True}],
    "evict": [],  # touches no lock
    "remove-domain": [{"domain": "gone"}],
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # The daemon is this very process: it is not to end with its node's life, and other tests need
    # root's rights.
    monkeypatch.setattr(takedown, "begin", lambda: None)
    monkeypatch.setattr(privileges, "confine", lambda _kept: None)
    path = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir="/dev/shm"))
    (path / "mnt").mkdir()
    try:
        yield path
    finally:
        for entry in mount.mounts():
            if entry.mountpoint == str(path / "mnt"):
                mount.unmount(entry.mountpoint, lazy=True)
        shutil.rmtree(path, ignore_errors=True)


def served(folder: Path, story: Callable[[Node], Awaitable[None]]) -> None:
    """A node in this process, with a real mount and store, while `story` runs."""
    source, where = f"local:{folder}/state.db", str(folder / "mnt")
    config = MountConfig(source, parse_source(source), where, parse_options(["node=x"]))

    async def life() -> None:
        node = Node(config)
        telling: list[asyncio.Future[None]] = []

        async def told() -> None:
            try:
                await story(node)
            finally:
                forget(node)
                await asyncio.to_thread(mount.unmount, where, lazy=True)

        await node.run(lambda: telling.append(asyncio.ensure_future(told())))
        await telling[0]

    async def bounded() -> None:
        async with asyncio.timeout(4 * PATIENCE_S):
            await life()

    asyncio.run(bounded())


async def fill(node: Node) -> None:
    """Locks of everybody's, a quarter of them held by a process that is us; one that many hold."""
    await asyncio.to_thread(os.mkdir, f"{node.config.mountpoint}/dom")
    (space,) = node.membership.spaces.values()
    folder = node.fs.tree.root.children[b"dom"]
    assert isinstance(folder, Directory)
    for number in range(LOCKS):
        name = b"k%05d" % number
        node.fs.tree.add(folder, name, stat.S_IFREG | 0o644, STRANGER, 0)
        if number % 4 == 0:
            space.lock(name).res.holders[number] = holder(number)
        else:
            space.lock(name)
    node.fs.tree.add(folder, b"crowd", stat.S_IFREG | 0o644, 0, 0)
    space.lock(b"crowd").res.holders.update((n, holder(n)) for n in range(LOCKS // 4))
    assert isinstance(node.store, SqliteStore)
    conn = sqlite3.connect(node.store.path, isolation_level=None)
    value = b'{"v":1,"m":{"x":[1,2,1]},"lvb":"","ab":["x",1]}'
    conn.execute("BEGIN")
    for domain in ("dom", "gone"):
        rows = [(f"h/{domain}/k{n:05}".encode(), value) for n in range(HEADS)]
        conn.executemany("INSERT INTO kv VALUES (?, ?, 1, 1, 0)", rows)
    conn.execute("COMMIT")
    conn.close()


def forget(node: Node) -> None:
    """Or the node would leave all these locks one by one."""
    for space in node.membership.spaces.values():
        space.locks.clear()


def holder(number: int) -> Claim:
    claim = Claim(number, Mode.PR, pid=os.getpid())
    claim.stage, claim.token = Stage.HELD, 7
    return claim


class Counted:
    """Runs a coroutine as a task would, and notes the most calls that one step of it made."""

    def __init__(self) -> None:
        self.most = 0
        self.steps = 0
        self._calls = 0

    def _note(self, _frame: FrameType, event: str, _arg: object) -> None:
        self._calls += event in ("call", "c_call")

    async def run(self, work: Awaitable[Any]) -> object:
        steps = work.__await__()
        while True:
            self._calls = 0
            sys.setprofile(self._note)
            try:
                waits_for = next(steps)
            except StopIteration as end:
                return end.value
            finally:
                sys.setprofile(None)
                self.steps += 1
                self.most = max(self.most, self._calls)
            if waits_for is None:
                await asyncio.sleep(0)
            else:
                waits_for._asyncio_future_blocking = False
                await asyncio.wait([waits_for])


def test_every_kind_of_question_is_put_here() -> None:
    assert set(QUESTIONS) == set(_TABLE)


def test_no_question_takes_many_calls_at_once(folder: Path) -> None:
    most: dict[str, int] = {}

    async def story(node: Node) -> None:
        await fill(node)
        table = handlers(node)
        for command, asker in (
            (command, asker)
            for command in sorted(QUESTIONS)
            for asker in (Asker(STRANGER, STRANGER), Asker(0, 0, trusted=True))
        ):
            if table[command].admin and not asker.trusted:
                continue
            for request in QUESTIONS[command]:
                counted = Counted()
                answer = table[command].answer(asker, request)
                assert isinstance(answer, Awaitable)
                await counted.run(answer)
                most[f"{command} {request} {asker.trusted}"] = counted.most

    served(folder, story)
    assert all(most.values())
    assert max(most.values()) < CALLS_MAX, most
