"""Resources that refuse the past: files, SQL, HTTP."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.client import StaleToken, UsageError
from dlmfs.client.guard import (
    HEADER,
    AsgiGuard,
    FileGuard,
    Register,
    SqlGuard,
    WsgiGuard,
    check,
    headers,
)
from dlmfs.client.tokens import AHEAD_MAX, furthest
from dlmfs.errors import BadState
from tests.fs.nodes import PATIENCE_S
from tests.waiting.agents import stood_in_line_for, until

OTHER = 54321

# -- files --------------------------------------------------------------------------------------------


def test_a_file_refuses_older_tokens(tmp_path: Path) -> None:
    path = tmp_path / "report"
    guard = FileGuard(path)
    guard.replace(5, b"five")
    path.chmod(0o640)
    guard.replace(5, b"five again")
    FileGuard(path).replace(7, b"seven")
    with pytest.raises(StaleToken, match="has seen the token 7"):
        guard.replace(6, b"late")
    assert path.read_bytes() == b"seven"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "report.token"]
    for wrong in (0, -1, 1 << 64):
        with pytest.raises(UsageError, match="no fencing token"):
            guard.replace(wrong, b"")


def test_work_that_fails_leaves_the_token_behind(tmp_path: Path) -> None:
    """Noted before the work: whatever a crash leaves undone, the older holder does not do it."""
    guard = FileGuard(tmp_path / "x")
    with pytest.raises(ValueError, match="half"), guard.admit(9):
        raise ValueError("half")
    with pytest.raises(StaleToken), guard.admit(8):
        pass
    (tmp_path / "x.token").write_text("hello")
    with pytest.raises(BadState, match="holds no token"), guard.admit(10):
        pass


def test_nobody_is_let_in_beside_an_older_one(tmp_path: Path) -> None:
    guard = FileGuard(tmp_path / "x")
    with guard.admit(1):
        fd = os.open(guard.token_path, os.O_RDWR)
        assert is_locked(fd)
    assert not is_locked(fd)
    os.close(fd)


def is_locked(fd: int) -> bool:
    """By somebody else."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.lockf(fd, fcntl.LOCK_UN)
    return False


def test_who_may_read_a_guarded_file_keeps_nobody_out(tmp_path: Path) -> None:
    """By flock(2), say; and the token's file cannot even be opened by others, whatever it was before."""
    guard = FileGuard(tmp_path / "x")
    Path(guard.token_path).touch(mode=0o666)
    with open(guard.token_path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with guard.admit(1):
            assert stat.S_IMODE(os.stat(guard.token_path).st_mode) == 0o600


def test_a_token_file_that_somebody_put_there_is_not_used(tmp_path: Path) -> None:
    guard = FileGuard(tmp_path / "x")
    token, victim = Path(guard.token_path), tmp_path / "nologin"
    token.symlink_to(victim)
    with pytest.raises(BadState, match="is a link"), guard.admit(1):
        pass
    assert not victim.exists()
    token.unlink()
    victim.touch()
    token.hardlink_to(victim)
    with pytest.raises(BadState, match="no plain file"), guard.admit(1):
        pass
    token.unlink()
    os.mkfifo(token)
    with pytest.raises(BadState, match="no plain file"), guard.admit(1):
        pass
    assert victim.read_bytes() == b""


@pytest.mark.root
def test_the_token_file_of_another_user(tmp_path: Path) -> None:
    """The owner of what is guarded may keep it."""
    guard = FileGuard(tmp_path / "x")
    os.close(os.open(guard.token_path, os.O_CREAT, 0o600))
    os.chown(guard.token_path, OTHER, OTHER)
    with pytest.raises(BadState, match="another user's"), guard.admit(1):
        pass
    (tmp_path / "x").touch()
    os.chown(tmp_path / "x", OTHER, OTHER)
    with guard.admit(1):
        pass


def now() -> int:
    """The token of a state of the embedded engine that begins now."""
    return int(time.time() * 31_250) << 16


@pytest.mark.parametrize("seen", [0, 7 << 16, now()], ids=["none", "small", "now"])
def test_a_token_that_cannot_be_yet_shuts_nobody_out(
    tmp_path: Path, database: Path, seen: int
) -> None:
    """Noted, it would do so for good. A jump over the time in which nobody came is none."""
    files, tables, register = FileGuard(tmp_path / "x"), SqlGuard(), Register()
    statuses: list[str] = []
    guard = WsgiGuard(application, register)

    def request(token: int) -> str:
        environ = {
            "REQUEST_METHOD": "POST",
            "HTTP_DLMFSTOKEN": str(token),
            "wsgi.input": io.BytesIO(),
        }
        answer = guard(environ, lambda status, _headers: statuses.append(status))
        if isinstance(answer, list):
            assert b"years ahead" in answer[0]
        else:
            close = getattr(answer, "close")  # noqa: B009
            close()
        return statuses[-1][:3]

    def refused(far: int) -> None:
        with pytest.raises(UsageError, match="years ahead"), files.admit(far):
            pass
        with pytest.raises(UsageError, match="years ahead"), tables.transaction(conn, "r", far):
            pass
        assert request(far) == "400"

    with closing(sqlite3.connect(database)) as conn:
        refused((1 << 63) - 1)
        for token in filter(None, (seen, (seen or now()) + AHEAD_MAX // 2)):
            with files.admit(token), tables.transaction(conn, "r", token):
                pass
            assert request(token) == "200"
            refused(token + 2 * AHEAD_MAX)


def test_a_guard_can_be_told_that_a_token_years_ahead_is_right(
    tmp_path: Path, database: Path
) -> None:
    """As docs/library.md has it, for a host whose clock was once ahead."""
    far = furthest(0) * 2
    path = tmp_path / "f"
    with pytest.raises(UsageError, match="years ahead"), FileGuard(path).admit(far):
        pass
    subprocess.run(["sh", "-c", f"printf '%020d\n' {far} > {path}.token"], check=True)
    with FileGuard(path).admit(far):
        pass
    told = tmp_path / "register"
    told.write_text(f'{{"": {far}}}\n')
    assert Register(str(told)).enter("", far)
    guard = SqlGuard()
    with closing(sqlite3.connect(database)) as conn:
        guard.create(conn)
        conn.execute(f"INSERT INTO dlmfs_guard VALUES ('r', {far}, '')")
        conn.commit()
        with guard.transaction(conn, "r", far):
            pass


def test_a_register_is_bounded() -> None:
    register = Register(resources=2)
    for name in "ab":
        assert register.enter(name, 1)
    for name in ("c", "n" * 2000):
        with pytest.raises(UsageError, match="2 resources at most"):
            register.enter(name, 1)
    assert register.enter("a", 1)
    assert not register.enter("b", 2)


# -- SQL ----------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "stock.db"
    with closing(sqlite3.connect(path)) as conn:
        SqlGuard().create(conn)
        conn.execute("CREATE TABLE log (word TEXT)")
        conn.commit()
    return path


def words(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as conn:
        return [row[0] for row in conn.execute("SELECT word FROM log ORDER BY rowid")]


def test_a_database_refuses_older_tokens(database: Path) -> None:
    guard = SqlGuard()
    with closing(sqlite3.connect(database)) as conn:
        for token, word in ((5, "a"), (5, "b"), (1 << 55, "c")):
            with guard.transaction(conn, "jobs/stock", token) as cursor:
                cursor.execute("INSERT INTO log VALUES (?)", (word,))
        with (
            pytest.raises(StaleToken, match="jobs/stock"),
            guard.transaction(conn, "jobs/stock", 6) as cursor,
        ):
            cursor.execute("INSERT INTO log VALUES ('late')")
        with guard.transaction(conn, "jobs/other", 6) as cursor:
            cursor.execute("INSERT INTO log VALUES ('d')")
    assert words(database) == ["a", "b", "c", "d"]


def test_a_transaction_that_fails_takes_its_token_back(database: Path) -> None:
    guard = SqlGuard()
    with closing(sqlite3.connect(database)) as conn:
        with (
            pytest.raises(ValueError, match="half"),
            guard.transaction(conn, "r", 9) as cursor,
        ):
            cursor.execute("INSERT INTO log VALUES ('half')")
            raise ValueError("half")
        with guard.transaction(conn, "r", 8):
            pass
    assert words(database) == []


def test_the_row_is_locked_until_the_commit(database: Path) -> None:
    guard = SqlGuard()
    with (
        closing(sqlite3.connect(database)) as one,
        closing(sqlite3.connect(database, timeout=0)) as two,
    ):
        with (
            guard.transaction(one, "r", 1),
            pytest.raises(sqlite3.OperationalError, match="locked"),
            guard.transaction(two, "r", 2),
        ):
            pass
        with guard.transaction(two, "r", 2):
            pass
        with pytest.raises(StaleToken), guard.transaction(one, "r", 1):
            pass


def test_autocommit_and_names_are_refused(database: Path) -> None:
    with (
        closing(sqlite3.connect(database, isolation_level=None)) as conn,
        pytest.raises(UsageError, match="commits each statement"),
        SqlGuard().transaction(conn, "r", 1),
    ):
        pass
    with pytest.raises(UsageError, match="name of a table"):
        SqlGuard(table="x; DROP TABLE log")
    with pytest.raises(UsageError, match="paramstyle"):
        SqlGuard(paramstyle="named")


class Snapshot:
    """A transaction that has read before: its reads show the row of that time (REPEATABLE READ as MySQL
    and MariaDB have it, by default), while its writes go by the row of now, and see none there."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor, self.rowcount = cursor, 0
        self._row = cursor.execute("SELECT token, stamp FROM dlmfs_guard").fetchone()
        self._columns = 0

    def execute(self, text: str, values: tuple[object, ...]) -> None:
        if text.startswith("SELECT"):
            self._columns = text.partition("FROM")[0].count(",") + 1
        else:
            self._cursor.execute(text, values)

    def fetchone(self) -> Any:
        return self._row[: self._columns]


def test_a_transaction_that_sees_the_past_is_not_let_in(database: Path) -> None:
    guard = SqlGuard()
    with closing(sqlite3.connect(database)) as conn:
        with guard.transaction(conn, "r", 5):
            pass
        cursor = Snapshot(conn.cursor())
        with guard.transaction(conn, "r", 9):
            pass
        with pytest.raises(StaleToken, match="larger than 5"):
            guard.admit(cursor, "r", 5)


class Uncounted:
    """A cursor of a module that counts only changed rows, or none."""

    def __init__(self, cursor: sqlite3.Cursor, count: int) -> None:
        self._cursor, self.rowcount = cursor, count

    def execute(self, text: str, values: tuple[object, ...]) -> None:
        self._cursor.execute(text, values)

    def fetchone(self) -> Any:
        return self._cursor.fetchone()


@pytest.mark.parametrize("count", [0, -1])
def test_modules_that_count_otherwise(database: Path, count: int) -> None:
    with closing(sqlite3.connect(database)) as conn:
        cursor = Uncounted(conn.cursor(), count)
        for token in (5, 5, 6):
            SqlGuard().admit(cursor, "r", token)
        with pytest.raises(StaleToken):
            SqlGuard().admit(cursor, "r", 5)


# -- files: who else there is --------------------------------------------------------------------------


def test_all_names_of_a_file_have_one_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v1").write_text("x")
    (tmp_path / "current").symlink_to("v1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = FileGuard("v1")
    FileGuard(tmp_path / "current").replace(9, b"nine")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1").read_bytes() == b"nine"
    monkeypatch.chdir(tmp_path / "elsewhere")
    for guard in (relative, FileGuard(tmp_path / "v1"), FileGuard("../current")):
        with pytest.raises(StaleToken):
            guard.replace(5, b"five")


def test_a_process_that_was_forked_inside_neither_keeps_others_out_nor_lets_them_in(
    tmp_path: Path,
) -> None:
    guard = FileGuard(tmp_path / "file")
    reading, writing = os.pipe()
    left, leaving = os.pipe()
    inside = guard.admit(1)
    with inside:
        pids = [os.fork()]
        if pids[0] == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        pids.append(os.fork())
        if pids[1] == 0:
            inside.__exit__(None, None, None)
            os.write(leaving, b"x")
            os._exit(0)
        assert os.read(left, 1) == b"x"
        fd = os.open(guard.token_path, os.O_RDWR)
        assert is_locked(fd)
    assert not is_locked(fd)
    for each in (fd, reading, writing, left, leaving):
        os.close(each)
    for pid in pids:
        os.waitpid(pid, 0)


def test_who_waited_at_a_token_file_that_was_removed_takes_the_new_one(tmp_path: Path) -> None:
    guard = FileGuard(tmp_path / "file")
    refused = threading.Event()

    def late() -> None:
        with pytest.raises(StaleToken), guard.admit(2):
            pass
        refused.set()

    with guard.admit(1):
        thread = threading.Thread(target=late, daemon=True)
        thread.start()
        until(lambda: stood_in_line_for(guard.token_path), "it waits")
        os.unlink(guard.token_path)
        with guard.admit(3):
            pass
    assert refused.wait(PATIENCE_S)
    thread.join(PATIENCE_S)


def test_the_names_of_what_remembers_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.samestat(os.fstat(fd), tmp_path.stat()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with FileGuard(tmp_path / "file").admit(1):
        assert synced == [False, True]
    Register(tmp_path / "tokens").enter("r", 1)
    assert synced == [False, True] * 2


# -- the register ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=40))
def test_inside_are_only_requests_of_one_token_and_it_never_falls(
    moves: list[tuple[bool, int]],
) -> None:
    register = Register()
    inside: list[int] = []
    entered: list[int] = []
    for leaving, token in moves:
        if leaving and inside:
            inside.pop()
            register.leave("r")
        elif not leaving:
            with suppress(StaleToken):
                if register.enter("r", token):
                    inside.append(token)
                    entered.append(token)
        assert len(set(inside)) <= 1
    assert entered == sorted(entered)


def test_a_register_outlives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    assert Register(path).enter("r", 7)
    again = Register(path)
    with pytest.raises(StaleToken):
        again.enter("r", 6)
    assert again.enter("r", 7)
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]
    path.write_text("[1]")
    with pytest.raises(BadState):
        Register(path)


# -- HTTP -----------------------------------------------------------------------------------------------


class Lock:
    """As far as `headers` needs it."""

    def __init__(self, token: int) -> None:
        self.token = token


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [environ["wsgi.input"].read()]


def wsgi(app: Any, method: str, path: str = "/", **more: str) -> tuple[int, dict[str, str], bytes]:
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, **more}
    environ["wsgi.input"] = io.BytesIO(b"done")
    setup_testing_defaults(environ)
    told: list[Any] = []
    body = app(environ, lambda *args: told.extend(args))
    try:
        text = b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()
    return int(told[0].split()[0]), dict(told[1]), text


def test_a_wsgi_server_refuses_older_tokens() -> None:
    app = WsgiGuard(application, Register(), resource=lambda path: path.split("/")[1])

    def put(token: str, path: str = "/a/x") -> int:
        status, answer, _ = wsgi(app, "PUT", path, HTTP_DLMFSTOKEN=token)
        check(status if status != 400 else 200, {} if status == 400 else answer)
        return status

    assert put("5") == put("5") == put("7") == 200
    with pytest.raises(StaleToken, match="larger token"):
        put("6")
    assert put("6", "/b/x") == 200
    for wrong in ("", "x", "-1", "0", "٣", "1" * 30):
        assert put(wrong) == 400
    status, answer, text = wsgi(app, "DELETE")
    assert (status, text) == (428, b"the header DlmfsToken is missing\n")
    with pytest.raises(UsageError, match="missing"):
        check(status, answer)
    assert wsgi(app, "GET")[0] == 200
    assert headers(Lock(8)) == {HEADER: "8"}
    check(412, {"Content-Type": "text/plain"})  # the application's own


def test_a_newer_request_waits_for_an_older_one_and_then_shuts_it_out() -> None:
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        token = environ["HTTP_DLMFSTOKEN"]
        if token == "1":
            begun.set()
            assert go_on.wait(PATIENCE_S)
        order.append(token)
        start_response("200 OK", [])
        return [b""]

    app = WsgiGuard(slow, Register())
    answers: list[int] = []

    def request(token: str) -> None:
        answers.append(wsgi(app, "POST", HTTP_DLMFSTOKEN=token)[0])

    old = threading.Thread(target=request, args=("1",))
    new = threading.Thread(target=request, args=("2",))
    old.start()
    assert begun.wait(PATIENCE_S)
    new.start()
    while app.register._seen.get("") != 2:
        pass
    request("1")
    assert answers == [412], "the newer token counts as soon as it is seen"
    assert order == []
    go_on.set()
    for thread in (old, new):
        thread.join(PATIENCE_S)
    assert order == ["1", "2"]
    assert answers[1:] == [200, 200]


def test_an_application_that_fails_leaves() -> None:
    def fail(_environ: dict[str, Any], _start: Any) -> Iterable[bytes]:
        raise ValueError("mine")

    register = Register()
    with pytest.raises(ValueError, match="mine"):
        wsgi(WsgiGuard(fail, register), "POST", HTTP_DLMFSTOKEN="1")
    assert wsgi(WsgiGuard(application, register), "POST", HTTP_DLMFSTOKEN="2")[0] == 200


def test_an_asgi_server_refuses_older_tokens() -> None:
    order: list[bytes] = []
    go_on = asyncio.Event()

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        token = dict(scope["headers"]).get(b"dlmfstoken", b"")
        if token == b"1":
            await go_on.wait()
        order.append(token)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guarded = AsgiGuard(app, Register())

    async def request(token: str, method: str = "PUT") -> int:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def receive() -> None: ...

        given = [(b"DlmfsToken".lower(), token.encode())] if token else []
        scope = {"type": "http", "method": method, "path": "/", "headers": given}
        await guarded(scope, receive, send)
        return int(sent[0]["status"])

    async def main() -> None:
        old = asyncio.create_task(request("1"))
        await asyncio.sleep(0)
        new = asyncio.create_task(request("2"))
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(request("2"))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert await request("1") == 412
        go_on.set()
        assert (await old, await new) == (200, 200)
        assert await request("") == 428
        assert await request("x") == 400
        assert await request("", "GET") == 200
        assert await request("3") == 200

    asyncio.run(main())
    assert order == [b"1", b"2", b"", b"3"]


async def nothing() -> None:
    """No part of a request comes."""


@pytest.mark.parametrize("method", ["post", "MKCOL", "PROPPATCH"])
def test_any_method_that_may_change_something_needs_a_token(method: str) -> None:
    called: list[str] = []

    def application(_environ: Any, _start: Any) -> list[bytes]:
        called.append("wsgi")
        return []

    async def asynchronous(*_: Any) -> None:
        called.append("asgi")

    async def send(_message: Any) -> None:
        pass

    statuses: list[str] = []
    WsgiGuard(application, Register())(
        {"REQUEST_METHOD": method}, lambda status, _headers: statuses.append(status)
    )
    scope = {"type": "http", "method": method, "path": "/", "headers": []}
    asyncio.run(AsgiGuard(asynchronous, Register())(scope, nothing, send))
    assert not called
    assert statuses[0].startswith("428")


@pytest.mark.parametrize("text", ["0" * 20 + "1" + "9" * 30, "0" * 21 + "9" * 5000])
def test_a_number_that_is_no_token_does_not_shut_all_others_out(text: str) -> None:
    register = Register()
    statuses: list[str] = []
    guard = WsgiGuard(lambda *_: [], register)
    environ = {"REQUEST_METHOD": "POST", "HTTP_DLMFSTOKEN": text}
    guard(environ, lambda status, _headers: statuses.append(status))
    assert statuses[0].startswith("400")
    assert register.enter("", 1)


def test_the_header_has_one_spelling() -> None:
    """WSGI makes the same name of a hyphen and of an underscore; the header has neither."""
    assert set("-_").isdisjoint(HEADER)
    statuses: list[str] = []
    for name in ("HTTP_DLMFS_TOKEN", "DLMFSTOKEN"):
        environ = {"REQUEST_METHOD": "POST", name: "5"}
        WsgiGuard(lambda *_: [], Register())(environ, lambda status, _: statuses.append(status))
    assert [status[:3] for status in statuses] == ["428"] * 2


def test_two_tokens_are_none() -> None:
    sent: list[Any] = []

    async def application(*_: Any) -> None:
        raise AssertionError("it was let in")

    async def send(message: Any) -> None:
        sent.append(message)

    lines = [(b"dlmfstoken", b"9"), (b"DlmfsToken", b"5")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": lines}
    asyncio.run(AsgiGuard(application, Register())(scope, nothing, send))
    assert sent[0]["status"] == 400
