"""The user that a mount was given, and the token by which etcd knows it.

Rules of this file
------------------
* One request for a token at a time: a check of a password costs the server some 60 ms of work. One that
  was refused is made again after `PAUSE_S`, with what the file says then, for as long as the node lives.
* A password is changed in two places, one after the other. So what was good last is tried as well, until
  something else is.
* A cluster whose users are not asked for yet may ask for them at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.refusals import NO_USER, NOT_ENABLED, OLD_REVISION, WRONG_USER, LoginRefused

if TYPE_CHECKING:
    from dlmfs.store.etcd.files import Files

log = logging.getLogger("dlmfs.etcd")

NO_TOKEN: Final = ""
"""There is no user, or the cluster does not ask for it."""
PAUSE_S: Final = 1.0

Ask = Callable[[pb.AuthenticateRequest, float], Awaitable[pb.AuthenticateResponse]]


class Login:
    """`ask`: the request for a token. Raises grpc's AioRpcError, OutcomeUnknown."""

    def __init__(self, files: Files, ask: Ask, clock: Callable[[], float]) -> None:
        self.unasked = False
        """There is a user, and the cluster does not ask for it."""
        self._files = files
        self._ask = ask
        self._clock = clock
        self._token: str | None = None
        self._good: tuple[str, str] | None = None
        self._lock = asyncio.Lock()
        self._refused_until = 0.0
        self._why = ""

    async def token(self, timeout_s: float) -> str:
        """To be sent along; NO_TOKEN: none. Raises LoginRefused, and as `ask`."""
        if self._files.access.user is None:
            return NO_TOKEN
        token = self._token
        if token is None:
            async with self._lock:
                token = self._token
                if token is None:
                    token = self._token = await self._log_in(timeout_s)
        return token

    def is_old(self, error: grpc.aio.AioRpcError, token: str | None = None) -> bool:
        """Whether another token than `token` (None: the present one) may mend it; if so that one is not
        used again. So may the first one of all, where users were not needed before."""
        details = error.details() or ""
        used = self._token if token is None else token
        first = used == NO_TOKEN and NO_USER in details
        old = error.code() is grpc.StatusCode.UNAUTHENTICATED or (
            error.code() is grpc.StatusCode.INVALID_ARGUMENT and (first or OLD_REVISION in details)
        )
        if old:
            self.forget(token)
        return old and self._files.access.user is not None

    def forget(self, token: str | None = None) -> None:
        """Use this token, or any, no more."""
        if token in (None, self._token):
            self._token = None

    async def _log_in(self, timeout_s: float) -> str:
        if self._clock() < self._refused_until:
            raise LoginRefused(self._why)
        await self._files.look()
        for user, password in self._candidates():
            try:
                answer = await self._ask(
                    pb.AuthenticateRequest(name=user, password=password), timeout_s
                )
            except grpc.aio.AioRpcError as error:
                details = error.details() or ""
                if NOT_ENABLED in details:
                    self._not_asked()
                    return NO_TOKEN
                if WRONG_USER not in details:
                    raise
            else:
                self._good = (user, password)
                self.unasked = False
                return answer.token
        self._refused_until = self._clock() + PAUSE_S
        self._why = (
            "etcd does not know this user and password: see -o credentials=FILE; it is read again, and "
            "they are tried again"
        )
        raise LoginRefused(self._why)

    def _candidates(self) -> Iterator[tuple[str, str]]:
        access = self._files.access
        assert access.user is not None
        now = (access.user, access.password)
        yield now
        if self._good is not None and self._good != now:
            yield self._good

    def _not_asked(self) -> None:
        if not self.unasked:
            self.unasked = True
            log.warning(
                "etcd does not ask for users: credentials= are kept until it does (`etcdctl auth enable`)"
            )
