"""Tokens: one request at a time, no hurry after a refusal, passwords that are changed in two places."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
import pytest

from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.files import Files
from dlmfs.store.etcd.login import NO_TOKEN, PAUSE_S, Login
from dlmfs.store.etcd.refusals import LoginRefused
from dlmfs.store.etcd.rpc import Access

pytestmark = pytest.mark.allow_warnings

INVALID: Final = grpc.StatusCode.INVALID_ARGUMENT
OFF: Final = "etcdserver: authentication is not enabled"
WRONG: Final = "etcdserver: authentication failed, invalid user ID or password"


def error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details)


class Server:
    """A server that knows `users`, and a node whose file says `line`."""

    def __init__(self, **users: str) -> None:
        self.users = users
        self.asks_for_users = True
        self.asked: list[str] = []
        self.line = ("dlm", "one")
        self.now = 0.0
        self.files = Files(asyncio.get_running_loop(), self._access(), self._access)
        self.login = Login(self.files, self._authenticate, lambda: self.now)

    def _access(self) -> Access:
        return Access(("h:1",), b"ca", user=self.line[0], password=self.line[1])

    async def _authenticate(
        self, request: pb.AuthenticateRequest, _timeout_s: float
    ) -> pb.AuthenticateResponse:
        self.asked.append(request.password)
        await asyncio.sleep(0)
        if not self.asks_for_users:
            raise error(grpc.StatusCode.FAILED_PRECONDITION, OFF)
        if self.users.get(request.name) != request.password:
            raise error(INVALID, WRONG)
        return pb.AuthenticateResponse(token=f"{request.password}.{len(self.asked)}")

    async def token(self) -> str:
        return await self.login.token(1.0)

    def refuses(self, token: str, details: str = "etcdserver: invalid auth token") -> bool:
        return self.login.is_old(error(grpc.StatusCode.UNAUTHENTICATED, details), token)


def run(test: Callable[[Server], Awaitable[Any]]) -> None:
    async def main() -> None:
        await test(Server(dlm="one"))

    asyncio.run(main())


def test_many_who_want_a_token_ask_once() -> None:
    async def test(server: Server) -> None:
        tokens = await asyncio.gather(*(server.token() for _ in range(100)))
        assert set(tokens) == {"one.1"}
        assert server.asked == ["one"]
        # All of them are refused, one after the other: the new token is not thrown away again.
        for token in tokens:
            assert server.refuses(token)
            assert await server.token() == "one.2"

    run(test)


def test_a_refusal_is_not_asked_for_again_at_once() -> None:
    async def test(server: Server) -> None:
        server.users["dlm"] = "two"
        for _ in range(5):
            with pytest.raises(LoginRefused, match="does not know this user and password"):
                await server.token()
        assert server.asked == ["one"]
        server.line = ("dlm", "two")
        server.now += PAUSE_S
        assert await server.token() == "two.2"

    run(test)


def test_what_was_good_is_tried_until_something_else_is() -> None:
    async def test(server: Server) -> None:
        assert server.refuses(await server.token())
        server.line = ("other", "two")
        assert server.refuses(await server.token())
        assert server.asked == ["one", "two", "one"]
        server.users = {"other": "two"}
        assert await server.token() == "two.4"
        assert server.refuses("two.4")
        server.users = {"dlm": "one"}
        with pytest.raises(LoginRefused):
            await server.token()
        assert server.asked == ["one", "two", "one", "two", "two"], "it is over"

    run(test)


def test_a_cluster_may_begin_to_ask_for_users() -> None:
    async def test(server: Server) -> None:
        server.asks_for_users = False
        assert await server.token() == NO_TOKEN
        assert server.login.unasked
        assert await server.token() == NO_TOKEN
        assert len(server.asked) == 1
        server.asks_for_users = True
        wanted = error(INVALID, "etcdserver: user name is empty")
        assert server.login.is_old(wanted, NO_TOKEN)
        assert not server.login.is_old(wanted, "a token")
        assert await server.token() == "one.2"
        assert not server.login.unasked

    run(test)


def test_other_errors_of_a_server_are_not_the_tokens() -> None:
    async def test(server: Server) -> None:
        token = await server.token()
        for code, details in (
            (grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied"),
            (INVALID, "etcdserver: key is not provided"),
            (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader"),
        ):
            assert not server.login.is_old(error(code, details), token)
        assert await server.token() == token
        assert server.login.is_old(error(INVALID, "revision of auth store is old"), token)
        assert await server.token() != token

    run(test)
