"""Servers that refuse requests of the past, over HTTP; see `guard`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from dlmfs.client.tokens import TOKEN_DIGITS, TOKEN_MAX, furthest, stale, sync_folder, too_far
from dlmfs.errors import BadState, StaleToken, UsageError

# -- the server's side -----------------------------------------------------------------------------

HEADER: Final = "DlmfsToken"
"""Without a hyphen: WSGI does not tell that from an underscore, so a proxy that takes the one header out
of what comes from outside would let the other pass."""
_ENVIRON: Final = f"HTTP_{HEADER.upper()}"
REFUSED: Final = "Dlmfs-Refused"
"""In the answer, so that the client can tell our refusal from the application's."""

SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing (RFC 9110, section 9.2.1). Any other may, also one nobody has heard of."""


RESOURCES_MAX: Final = 1000
RESOURCE_MAX: Final = 1024


class Register:
    """The largest token of each resource, for the requests of one server process. Of so many `resources`,
    whose names are of up to 1,024 characters: each is kept in memory, and with each larger token all are
    written.

    `path`: a file that keeps them when the process ends. Without one, a server that was started
    anew has seen nothing yet, and would let in an old token until it sees a newer one.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, resources: int = RESOURCES_MAX
    ) -> None:
        self._resources = resources
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
        next `leave`. Raises StaleToken; UsageError for a token that cannot be yet, or a resource too
        many. From one thread at a time."""
        seen = self._seen.get(resource, 0)
        if token < seen:
            raise stale(resource or "the server", token, seen)
        if token > furthest(seen):
            raise too_far(resource or "the server", token, seen)
        if not seen and (len(self._seen) >= self._resources or len(resource) > RESOURCE_MAX):
            raise UsageError(
                f"the server guards {self._resources} resources at most, with names of {RESOURCE_MAX} "
                "characters"
            )
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
            sync_folder(self._path)
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


def _refused(error: StaleToken | UsageError) -> _Refusal:
    if isinstance(error, StaleToken):
        return _Refusal(412, "Precondition Failed", str(error))
    return _Refusal(400, "Bad Request", str(error))


class WsgiGuard:
    """WSGI middleware: requests that change something need a token in `DlmfsToken`, not smaller
    than any seen before. 428 without one, 400 for no number or one that cannot be yet, 412 for one of the
    past. `methods`:
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
            self._enter(resource, _token_of(environ.get(_ENVIRON)))
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
            except (StaleToken, UsageError) as error:
                raise _refused(error) from None

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
            except (StaleToken, UsageError) as error:
                raise _refused(error) from None
        try:
            yield
        finally:
            self.register.leave(resource)
            # Shielded: a request that is cancelled must not leave others waiting.
            await asyncio.shield(self._notify())

    async def _notify(self) -> None:
        async with self._left:
            self._left.notify_all()


# -- the client's side -----------------------------------------------------------------------------


class HasToken(Protocol):
    """A lock of either kind."""

    @property
    def token(self) -> int: ...


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
