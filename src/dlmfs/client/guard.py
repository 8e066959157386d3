"""Resources that refuse the past.

A program may be stopped between its last look at its lock and what it then does; meanwhile the lock
is lost and another works under it. No lock service can prevent that. The resource can: each grant
carries a larger token, so what has seen a token refuses all smaller ones.

Rules of this file
------------------
* The larger token is noted first and durably, then the work is done: a crash in between leaves a
  resource that refuses more, never less.
* Looking at the token and doing the work are one step for others: work of an older token that was
  let in is over before work of a newer one begins.
* Equal tokens are let in: one holder works more than once.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from dlmfs.errors import BadState, StaleToken, UsageError

TOKEN_MAX: Final = (1 << 64) - 1
TOKEN_DIGITS: Final = len(str(TOKEN_MAX))


class HasToken(Protocol):
    """A lock of either kind."""

    @property
    def token(self) -> int: ...


def _checked(token: int) -> int:
    if not 0 < token <= TOKEN_MAX:
        raise UsageError(f"{token} is no fencing token")
    return token


def _stale(what: str, token: int, seen: int) -> StaleToken:
    return StaleToken(
        f"{what} has seen the token {seen}: with {token} it is too late, the lock was lost"
    )


# -- files --------------------------------------------------------------------------------------------


def _sync_folder(path: str) -> None:
    """Make a name in the folder durable, or after a power failure the file may be the one before."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FileGuard:
    """Guards a file, or whatever its path stands for, against holders of the past.

    The largest token is kept in a file beside it, PATH.token, which is locked with flock(2) while
    somebody is let in: processes of one host, and whoever shares a file system that has flock(2).
    PATH is where symbolic links lead to from the present folder, so that all who name one file keep
    one token; a file that has several names (hard links) is to be guarded by one of them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.realpath(os.fspath(path))
        self.token_path = f"{self.path}.token"

    @contextlib.contextmanager
    def admit(self, token: int) -> Iterator[None]:
        """Let the work of this token in; nobody else's goes on beside it.

        Raises StaleToken, BadState if PATH.token is not what was written there, OSError."""
        _checked(token)
        fd, process = self._locked(), os.getpid()
        try:
            seen = self._read(fd)
            if token < seen:
                raise _stale(self.path, token, seen)
            if token > seen:
                os.pwrite(fd, f"{token:020d}\n".encode(), 0)
                os.fsync(fd)
            if not seen:
                _sync_folder(self.token_path)
            yield
        finally:
            if os.getpid() == process:
                # A child that was forked meanwhile has a copy: closing alone would leave it locked.
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _locked(self) -> int:
        """The open file, locked, and still the one of that name: it may have been removed by hand."""
        while True:
            fd = os.open(self.token_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self.token_path)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _read(self, fd: int) -> int:
        text = os.pread(fd, 64, 0)
        if text and not (len(text) == 21 and text.strip().isdigit()):
            raise BadState(f"{self.token_path} holds no token: see what wrote it, then remove it")
        return int(text or 0)

    def replace(self, token: int, data: bytes) -> None:
        """Replace the file's contents, whole. Raises as `admit`."""
        with self.admit(token):
            folder = os.path.dirname(self.path) or "."
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    with contextlib.suppress(FileNotFoundError):
                        os.fchmod(file.fileno(), os.stat(self.path).st_mode & 0o7777)
                    os.fsync(file.fileno())
                    os.replace(file.name, self.path)
                except BaseException:
                    os.unlink(file.name)
                    raise


# -- SQL ----------------------------------------------------------------------------------------------

_MARKS: Final = {
    "qmark": ("?", "?", "?", "?"),
    "format": ("%s", "%s", "%s", "%s"),
    "pyformat": ("%s", "%s", "%s", "%s"),
    "numeric": (":1", ":2", ":3", ":4"),
}


class SqlGuard:
    """Guards what is in a database, by a table with the largest token of each resource.

    For any DB-API (PEP 249) module: `paramstyle` is the module's. The row is locked by the
    transaction that let somebody in, until it commits. Who was let in is told from the stamp that it
    left: counts of rows differ between modules, and a transaction that has read before may be shown
    the row of that time (MySQL's REPEATABLE READ), but its own writes it does see.
    """

    def __init__(self, *, table: str = "dlmfs_guard", paramstyle: str = "qmark") -> None:
        if not table.replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"{table!r} is no name of a table")
        if paramstyle not in _MARKS:
            raise UsageError(f"paramstyle {paramstyle!r} is not one of {', '.join(_MARKS)}")
        one, two, three, four = _MARKS[paramstyle]
        self._create = (
            f"CREATE TABLE IF NOT EXISTS {table} "
            "(resource VARCHAR(128) PRIMARY KEY, token NUMERIC(20) NOT NULL, "
            "stamp VARCHAR(32) NOT NULL)"
        )
        # The table's name is checked above; values are never put into the text.
        self._raise = (
            f"UPDATE {table} SET token={one}, stamp={two} WHERE resource={three} AND token<={four}"  # noqa: S608
        )
        self._look = f"SELECT token, stamp FROM {table} WHERE resource={one}"  # noqa: S608
        self._insert = (
            f"INSERT INTO {table} (resource, token, stamp) VALUES ({one}, {two}, {three})"  # noqa: S608
        )

    def create(self, connection: Any) -> None:
        """Make the table, where it is missing, and commit."""
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(self._create)
        connection.commit()

    def admit(self, cursor: Any, resource: str, token: int) -> None:
        """Let the rest of this transaction in. Raises StaleToken: roll back then; UsageError if the
        connection commits each statement by itself. The first use of a resource by two transactions
        at once may fail in one of them with the module's IntegrityError: try that again."""
        _checked(token)
        stamp = secrets.token_hex(16)
        cursor.execute(self._raise, (token, stamp, resource, token))
        cursor.execute(self._look, (resource,))
        row = cursor.fetchone()
        if row is None:
            cursor.execute(self._insert, (resource, token, stamp))
        elif row[1] != stamp:
            if int(row[0]) > token:
                raise _stale(resource, token, int(row[0]))
            # The row is shown as it was when this transaction began to read.
            raise StaleToken(
                f"{resource} has seen a token larger than {token}: it is too late, the lock was lost"
            )
        connection = getattr(cursor, "connection", None)
        if getattr(connection, "in_transaction", True) is False:
            raise UsageError("the connection commits each statement by itself: turn that off")

    @contextlib.contextmanager
    def transaction(self, connection: Any, resource: str, token: int) -> Iterator[Any]:
        """A transaction that was let in: gives its cursor, commits at the end, rolls back when
        something is raised. Raises as `admit`."""
        try:
            with contextlib.closing(connection.cursor()) as cursor:
                self.admit(cursor, resource, token)
                yield cursor
        except BaseException:
            connection.rollback()
            raise
        connection.commit()


# -- HTTP: the server's side ---------------------------------------------------------------------------

HEADER: Final = "Dlmfs-Token"
REFUSED: Final = "Dlmfs-Refused"
"""In the answer, so that the client can tell our refusal from the application's."""

SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing (RFC 9110, section 9.2.1). Any other may, also one nobody has heard of."""


class Register:
    """The largest token of each resource, for the requests of one server process.

    `path`: a file that keeps them when the process ends. Without one, a server that was started
    anew has seen nothing yet, and would let in an old token until it sees a newer one.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else os.fspath(path)
        self._seen: dict[str, int] = {}
        self._inside: dict[str, tuple[int, int]] = {}
        """By resource: the token of those inside, and how many they are."""
        if self._path is not None and os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as file:
                self._load(file.read())

    def _load(self, text: str) -> None:
        try:
            self._seen = {str(name): int(token) for name, token in json.loads(text).items()}
        except (ValueError, AttributeError, TypeError):
            raise BadState(f"{self._path} holds no tokens: see what wrote it") from None

    def enter(self, resource: str, token: int) -> bool:
        """Whether the request is in; False: an older one's work is not over yet, ask again after the
        next `leave`. Raises StaleToken. From one thread at a time."""
        seen = self._seen.get(resource, 0)
        if token < seen:
            raise _stale(resource or "the server", token, seen)
        if token > seen:
            self._store({**self._seen, resource: token})
        current, count = self._inside.get(resource, (token, 0))
        if count and current != token:
            return False
        self._inside[resource] = token, count + 1
        return True

    def leave(self, resource: str) -> None:
        token, count = self._inside.pop(resource)
        if count > 1:
            self._inside[resource] = token, count - 1

    def _store(self, seen: dict[str, int]) -> None:
        if self._path is not None:
            with tempfile.NamedTemporaryFile(
                "w", dir=os.path.dirname(self._path) or ".", delete=False
            ) as file:
                json.dump(seen, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self._path)
            _sync_folder(self._path)
        self._seen = seen


def _one_resource(_path: str) -> str:
    return ""


class _Refusal(Exception):
    def __init__(self, status: int, reason: str, words: str) -> None:
        super().__init__(words)
        self.line = f"{status} {reason}"
        self.status = status
        self.body = f"{words}\n".encode()
        self.headers = [("Content-Type", "text/plain; charset=utf-8"), (REFUSED, reason)]


def _token_of(text: str | None) -> int:
    if text is None:
        raise _Refusal(428, "Precondition Required", f"the header {HEADER} is missing")
    is_number = text.isascii() and text.isdigit() and len(text) <= TOKEN_DIGITS
    if not (is_number and 0 < int(text) <= TOKEN_MAX):
        raise _Refusal(400, "Bad Request", f"the header {HEADER} is no fencing token")
    return int(text)


def _needs_token(method: str, methods: frozenset[str] | None) -> bool:
    """Applications may take `post` for POST."""
    method = method.upper()
    return method not in SAFE if methods is None else method in methods


def _too_late(error: StaleToken) -> _Refusal:
    return _Refusal(412, "Precondition Failed", str(error))


class WsgiGuard:
    """WSGI middleware: requests that change something need a token in `Dlmfs-Token`, not smaller
    than any seen before. 428 without one, 400 for no number, 412 for one of the past. `methods`:
    those that need one, in capitals; None: all but GET, HEAD, OPTIONS and TRACE.

    `resource`: of a request's path, where one server guards several, each with a lock of its own.
    What a client says of itself must not choose it.
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        register: Register,
        *,
        resource: Callable[[str], str] = _one_resource,
        methods: frozenset[str] | None = None,
    ) -> None:
        self.app, self.register = app, register
        self.resource, self.methods = resource, methods
        self._left = threading.Condition()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if not _needs_token(environ.get("REQUEST_METHOD", "GET"), self.methods):
            return self.app(environ, start_response)
        resource = self.resource(environ.get("PATH_INFO", ""))
        try:
            self._enter(resource, _token_of(environ.get("HTTP_DLMFS_TOKEN")))
        except _Refusal as refusal:
            headers = [*refusal.headers, ("Content-Length", str(len(refusal.body)))]
            start_response(refusal.line, headers)
            return [refusal.body]
        return self._inside(resource, environ, start_response)

    def _enter(self, resource: str, token: int) -> None:
        with self._left:
            try:
                while not self.register.enter(resource, token):
                    self._left.wait()
            except StaleToken as error:
                raise _too_late(error) from None

    def _inside(
        self, resource: str, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        try:
            parts = self.app(environ, start_response)
        except BaseException:
            self._leave(resource)
            raise
        return _Body(parts, lambda: self._leave(resource))

    def _leave(self, resource: str) -> None:
        with self._left:
            self.register.leave(resource)
            self._left.notify_all()


class _Body:
    """An answer on its way: the request's work is over when the server closes it (PEP 3333)."""

    def __init__(self, parts: Iterable[bytes], over: Callable[[], None]) -> None:
        self._parts, self._over, self._is_over = parts, over, False

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._parts)

    def close(self) -> None:
        try:
            if hasattr(self._parts, "close"):
                self._parts.close()
        finally:
            if not self._is_over:
                self._is_over = True
                self._over()


class AsgiGuard:
    """The same as ASGI middleware."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        register: Register,
        *,
        resource: Callable[[str], str] = _one_resource,
        methods: frozenset[str] | None = None,
    ) -> None:
        self.app, self.register = app, register
        self.resource, self.methods = resource, methods
        self._left = asyncio.Condition()

    async def __call__(
        self,
        scope: Mapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http" or not _needs_token(scope["method"], self.methods):
            await self.app(scope, receive, send)
            return
        name = HEADER.lower().encode()
        texts = [v.decode("latin-1") for k, v in scope["headers"] if k.lower() == name]
        # As RFC 9110 (5.2) joins lines of one name: two tokens are no token.
        text = ", ".join(texts) if texts else None
        try:
            async with self._admitted(self.resource(scope["path"]), _token_of(text)):
                await self.app(scope, receive, send)
        except _Refusal as refusal:
            headers = [(k.lower().encode(), v.encode()) for k, v in refusal.headers]
            start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
            await send(start)
            await send({"type": "http.response.body", "body": refusal.body})

    @contextlib.asynccontextmanager
    async def _admitted(self, resource: str, token: int) -> AsyncIterator[None]:
        async with self._left:
            try:
                while not self.register.enter(resource, token):
                    await self._left.wait()
            except StaleToken as error:
                raise _too_late(error) from None
        try:
            yield
        finally:
            self.register.leave(resource)
            # Shielded: a request that is cancelled must not leave others waiting.
            await asyncio.shield(self._notify())

    async def _notify(self) -> None:
        async with self._left:
            self._left.notify_all()


# -- HTTP: the client's side ---------------------------------------------------------------------------


def headers(lock: HasToken) -> dict[str, str]:
    """What to send along with a request that this lock protects."""
    return {HEADER: str(lock.token)}


def check(status: int, answer: Mapping[str, str]) -> None:
    """Raises StaleToken if the server refused the token (status 412 and our header in its answer),
    UsageError if it got none or no number. Anything else is the application's answer."""
    if not any(name.lower() == REFUSED.lower() for name in answer):
        return
    if status == 412:
        raise StaleToken("the server has seen a larger token: the lock was lost, stop")
    raise UsageError(f"the server refused the request: {HEADER} is missing or wrong ({status})")
