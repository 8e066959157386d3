"""Who comes in at the control socket, how many at once, and what a question may cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from dlmfs import control_server, pace
from dlmfs.control_server import OTHERS_MAX, RATION, SHARE, ControlServer, Cost, Handler
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.handlers import _TABLE
from dlmfs.permission import Asker
from tests.control.asking import STRANGER, Facts, acting
from tests.fs.nodes import PATIENCE_S

pytestmark = pytest.mark.root

ENTRY = MountEntry(1, 0, "/nowhere", "local", "fuse.dlmfs", "9999:1", (), ("user_id=0",))


class Scene:
    """A server whose handlers wait until they are let go."""

    def __init__(self) -> None:
        self.inside: list[tuple[str, int]] = []
        self.most = 0
        self.open = asyncio.Event()
        self._came = asyncio.Event()
        self.server = ControlServer(
            ENTRY,
            {cost.name: Handler(self._wait(cost.name), cost) for cost in Cost}
            | {"admin": Handler(self._wait("admin"), admin=True)}
            | {"echo": Handler(lambda _asker, request: request["say"])}
            | {"who": Handler(lambda asker, _request: [asker.uid, sorted(asker.groups)])}
            | {"broken": Handler(self._broken)},
            allow_other=True,
        )

    def _wait(self, name: str) -> Callable[[Asker, Facts], object]:
        async def answer(asker: Asker, _request: Facts) -> str:
            self.inside.append((name, asker.uid))
            self._came.set()
            self.most = max(self.most, len(self.inside))
            await self.open.wait()
            self.inside.remove((name, asker.uid))
            return "done"

        return answer

    @staticmethod
    def _broken(_asker: Asker, _request: Facts) -> object:
        raise AssertionError("the lock dom/secret")

    async def connect(self, uid: int, groups: list[int] | None = None) -> Asking:
        with acting(uid, groups or []):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(self.server.path))
        return Asking(*await asyncio.open_unix_connection(sock=sock))

    async def ask(self, uid: int, **question: object) -> Facts:
        asking = await self.connect(uid)
        return await asking.put(json.dumps(question).encode())

    async def until_inside(self, count: int) -> None:
        while len(self.inside) < count:
            self._came.clear()
            await self._came.wait()

    async def settled(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


class Asking:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def put(self, line: bytes) -> Facts:
        self.writer.write(line + b"\n")
        try:
            answer: Facts = json.loads(await self.reader.read())
        finally:
            self.writer.close()
        return answer

    async def is_closed(self) -> bool:
        """Whether the server ends it, without a word."""
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True
        finally:
            self.writer.close()


def play(story: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        scene = Scene()
        await scene.server.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story(scene)
        finally:
            scene.open.set()
            await scene.settled()
            await scene.server.close()

    asyncio.run(bounded())


@contextlib.contextmanager
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patience that a test can wait for."""
    monkeypatch.setattr(control_server, "ASK_S", 0.05)
    monkeypatch.setattr(control_server, "CROWDED_ASK_S", 0.05)
    yield


# -- who comes in ----------------------------------------------------------------------------------


def test_one_users_connections_keep_nobody_else_out() -> None:
    """Forty that say nothing: he himself is told, root and another user are answered."""

    async def story(scene: Scene) -> None:
        idle = [await scene.connect(STRANGER) for _ in range(40)]
        await scene.settled()
        assert await scene.ask(0, cmd="echo", say="root") == {"ok": "root"}
        assert await scene.ask(STRANGER + 1, cmd="echo", say="other") == {"ok": "other"}
        told = await idle[SHARE].put(b'{"cmd": "echo", "say": 1}')
        assert told["error"]["class"] == "Unavailable"
        assert f"questions of user {STRANGER}" in told["error"]["message"]
        assert await idle[-1].is_closed()
        assert await idle[0].put(b'{"cmd": "echo", "say": "mine"}') == {"ok": "mine"}
        await scene.settled()
        assert await scene.ask(STRANGER, cmd="echo", say="again") == {"ok": "again"}
        for asking in idle:
            asking.writer.close()

    play(story)


def test_many_users_leave_room_for_root() -> None:
    async def story(scene: Scene) -> None:
        users = range(STRANGER, STRANGER + OTHERS_MAX // SHARE + 1)
        idle = [await scene.connect(uid) for uid in users for _ in range(SHARE)]
        await scene.settled()
        told = await scene.ask(STRANGER + 1000, cmd="echo", say=1)
        assert told["error"]["class"] == "Unavailable"
        assert await scene.ask(0, cmd="echo", say=1) == {"ok": 1}
        for asking in idle:
            asking.writer.close()
        await scene.settled()
        assert await scene.ask(STRANGER + 1000, cmd="echo", say=1) == {"ok": 1}

    play(story)


def test_who_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(scene: Scene) -> None:
        for uid in (STRANGER, 0):
            asking = await scene.connect(uid)
            asking.writer.write(b'{"cmd":')
            assert await asking.is_closed()

    with quick(monkeypatch):
        play(story)


def test_the_kernel_says_who_asks() -> None:
    async def story(scene: Scene) -> None:
        asking = await scene.connect(STRANGER, [5, 4711])
        assert await asking.put(b'{"cmd": "who"}') == {"ok": [STRANGER, [5, 4711]]}
        many = await scene.connect(STRANGER, list(range(5000, 5300)))
        assert await many.put(b'{"cmd": "who"}') == {"ok": [STRANGER, []]}

    play(story)


# -- what a question costs -------------------------------------------------------------------------


def test_one_costly_question_of_a_user_at_a_time() -> None:
    async def story(scene: Scene) -> None:
        asked = [
            asyncio.ensure_future(scene.ask(uid, cmd=cmd))
            for uid in (STRANGER, STRANGER + 1)
            for cmd in ("MUCH", "CLUSTER", "MUCH")
        ]
        await scene.until_inside(2)
        await scene.settled()
        assert sorted(uid for _, uid in scene.inside) == [STRANGER, STRANGER + 1]
        assert await scene.ask(STRANGER, cmd="echo", say=1) == {"ok": 1}
        roots = [asyncio.ensure_future(scene.ask(0, cmd="MUCH")) for _ in range(3)]
        await scene.until_inside(5)
        scene.open.set()
        assert await asyncio.gather(*asked, *roots) == [{"ok": "done"}] * 9

    play(story)


def test_the_cluster_works_for_a_user_so_often_only() -> None:
    async def story(scene: Scene) -> None:
        scene.open.set()
        answers = [await scene.ask(STRANGER, cmd="CLUSTER") for _ in range(RATION + 1)]
        assert answers[:-1] == [{"ok": "done"}] * RATION
        assert answers[-1]["error"]["class"] == "Unavailable"
        assert "ask again in" in answers[-1]["error"]["message"]
        assert await scene.ask(STRANGER, cmd="MUCH") == {"ok": "done"}
        assert await scene.ask(STRANGER + 1, cmd="CLUSTER") == {"ok": "done"}
        for _ in range(RATION + 1):
            assert await scene.ask(0, cmd="CLUSTER") == {"ok": "done"}

    play(story)


def test_the_cluster_works_for_few_users_at_once() -> None:
    """A node has few questions under way, and root needs one."""

    async def story(scene: Scene) -> None:
        users = range(STRANGER, STRANGER + 6)
        asked = [asyncio.ensure_future(scene.ask(uid, cmd="CLUSTER")) for uid in users]
        await scene.until_inside(control_server.CLUSTER_AT_ONCE)
        await scene.settled()
        root = asyncio.ensure_future(scene.ask(0, cmd="CLUSTER"))
        await scene.until_inside(control_server.CLUSTER_AT_ONCE + 1)
        assert ("CLUSTER", 0) in scene.inside
        scene.open.set()
        assert await asyncio.gather(*asked, root) == [{"ok": "done"}] * 7
        assert scene.most == control_server.CLUSTER_AT_ONCE + 1

    play(story)


# -- what is wrong with a question -----------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b"7", b"null", b'"status"', b"{}", b'{"cmd": 7}', b'{"cmd": ["x"]}',
        b"\xff\xfe",
        b'{"cmd": "echo"}', b"[" * 60_000, b'{"a":' * 10_000, b'{"cmd": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_question_that_is_none(line: bytes) -> None:
    """Costs that question, and leaves no line in the log (every test looks)."""

    async def story(scene: Scene) -> None:
        told = await (await scene.connect(STRANGER)).put(line)
        assert told["error"]["class"] == "UsageError"
        assert await scene.ask(STRANGER, cmd="echo", say=1) == {"ok": 1}

    play(story)


@pytest.mark.allow_warnings
def test_what_went_wrong_inside_is_for_root() -> None:
    async def story(scene: Scene) -> None:
        theirs, ours = [await scene.ask(uid, cmd="broken") for uid in (STRANGER, 0)]
        assert theirs["error"]["class"] == ours["error"]["class"] == "Bug"
        assert "secret" not in theirs["error"]["message"]
        assert "secret" in ours["error"]["message"]

    play(story)


def test_a_question_for_root_alone() -> None:
    async def story(scene: Scene) -> None:
        scene.open.set()
        assert (await scene.ask(STRANGER, cmd="admin"))["error"]["class"] == "NotPermitted"
        assert await scene.ask(0, cmd="admin") == {"ok": "done"}
        scene.server.allow_other = False
        assert (await scene.ask(STRANGER, cmd="echo", say=1))["error"]["class"] == "NotPermitted"

    play(story)


# -- large answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {}, [], None, 1.5, "x", {"a": []}, {"a": {}, "b": [[], {}, [{"c": [[[[1, [2]]]]]}]]},
        [None, [0, False]],
        {"ok": {"domains": [{"name": "\udcff", "locks": [{"n": i} for i in range(5000)]}] * 3}},
    ],
)  # fmt: skip
def test_an_answer_is_encoded_in_pieces(answer: object) -> None:
    pieces = list(pace.encoded(answer))
    assert json.loads(b"".join(pieces)) == answer
    assert b"".join(pieces).endswith(b"\n")
    assert all(len(piece) < 2 * pace.PIECE for piece in pieces)


def test_an_answer_in_pieces_arrives_whole() -> None:
    async def story(scene: Scene) -> None:
        large = [{"name": "x" * 50, "number": i} for i in range(3000)]
        scene.server.handlers = {"large": Handler(lambda _asker, _request: {"rows": large})}
        assert await scene.ask(STRANGER, cmd="large") == {"ok": {"rows": large}}

    play(story)


def test_what_others_must_work_for_costs_as_much() -> None:
    """A question that is not rationed may be put without end."""
    costly = {name for name, (_, cost, _) in _TABLE.items() if cost is Cost.CLUSTER}
    assert costly == {"why", "health", "evict", "remove-domain"}
    assert not [name for name, (_, cost, _) in _TABLE.items() if cost is Cost.LITTLE]
