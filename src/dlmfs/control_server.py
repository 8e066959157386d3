"""The daemon's end of the control socket: who may come in, how many at once, and what he is answered.

Rules of this file
------------------
* The kernel says who asks (SO_PEERCRED, SO_PEERGROUPS); every answer is made for him (`permission`).
* Each user has a share of the connections, and root and the owner of the mount have theirs apart, so
  nobody keeps them out. Who comes in and says nothing is dropped.
* A question that costs much waits for the same user's one before it. What the whole cluster
  must work for is rationed by the minute as well.
* Whatever is wrong with a question costs that question.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import json
import logging
import os
import socket
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from dlmfs import folders, pace, rundir
from dlmfs.errors import DlmfsError, NotPermitted, Unavailable, UsageError
from dlmfs.fuse.mount import MountEntry
from dlmfs.permission import Asker

log = logging.getLogger("dlmfs.control")

LINE_MAX: Final = 64 * 1024
TRUSTED_SHARE: Final = 64
"""Connections of root, and of the owner."""
SHARE: Final = 4
"""Of each other user."""
OTHERS_MAX: Final = 32
"""Of all other users together."""
REFUSED_MAX: Final = 4
"""Of each user beyond his share, who are told so; further ones are closed without a word."""
ASK_S: Final = 5.0
"""Within this an asker has put his question, or is dropped."""
TALK_S: Final = 10.0
"""Within this he has taken his answer."""
CROWDED_ASK_S: Final = 0.5
RATION: Final = 20
"""Questions of one user that the whole cluster works for, in `RATION_S`."""
RATION_S: Final = 60.0
CLUSTER_AT_ONCE: Final = 4
"""Such questions of ordinary users under way: a node takes eight, and some are for root."""
SO_PEERGROUPS: Final = 59
GROUPS_MAX: Final = 256
"""As many as socket.getsockopt can take. Of who is in more we know only the main one: he is told
less, never more."""

Facts = dict[str, Any]


class Cost(enum.Enum):
    """What a question costs to answer."""

    LITTLE = "what is at hand"
    MUCH = "a look at every lock, claim or record"
    CLUSTER = "work for other nodes, or many readings of the store"


class Handler(NamedTuple):
    """One kind of question. `admin`: only for root and the user who mounted."""

    answer: Callable[[Asker, Facts], object]
    cost: Cost = Cost.LITTLE
    admin: bool = False


class _Room(enum.Enum):
    SERVED = "served"
    REFUSED = "told that there is no room"
    NONE = "closed at once"


class _Door:
    """Who is inside."""

    def __init__(self) -> None:
        self._served: Counter[int] = Counter()
        self._refused: Counter[int] = Counter()
        self._others = 0

    def enter(self, asker: Asker) -> _Room:
        share = TRUSTED_SHARE if asker.trusted else SHARE
        full = not asker.trusted and self._others >= OTHERS_MAX
        if self._served[asker.uid] < share and not full:
            self._served[asker.uid] += 1
            self._others += not asker.trusted
            return _Room.SERVED
        if self._refused[asker.uid] < REFUSED_MAX:
            self._refused[asker.uid] += 1
            return _Room.REFUSED
        return _Room.NONE

    def leave(self, asker: Asker, room: _Room) -> None:
        count = self._served if room is _Room.SERVED else self._refused
        count[asker.uid] -= 1
        if not count[asker.uid]:
            del count[asker.uid]
        self._others -= room is _Room.SERVED and not asker.trusted
        assert self._others >= 0


class _Rations:
    """When each user has asked the whole cluster."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked: dict[int, list[float]] = {}

    def take(self, uid: int) -> None:
        """Raises Unavailable if the user has had his share."""
        now = self._clock()
        recent = {
            user: kept
            for user, times in self._asked.items()
            if (kept := [at for at in times if at > now - RATION_S])
        }
        mine = recent.setdefault(uid, [])
        self._asked = recent
        if len(mine) >= RATION:
            raise Unavailable(
                f"user {uid} has asked the whole cluster {RATION} times within {RATION_S:g} s: ask again "
                f"in {mine[0] + RATION_S - now:.0f} s"
            )
        mine.append(now)


class ControlServer:
    """Answers questions about one daemon; to other users than root and its own only where
    `allow_other`. `run`: the folder to listen in, see `rundir`."""

    path: Path

    def __init__(
        self,
        entry: MountEntry,
        handlers: Mapping[str, Handler],
        *,
        allow_other: bool,
        run: str | None = None,
    ) -> None:
        self._name = rundir.name(entry.dev, "sock")
        self._run = run
        self.handlers = handlers
        self.allow_other = allow_other
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._door = _Door()
        self._rations = _Rations(lambda: asyncio.get_running_loop().time())
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._cluster = asyncio.Semaphore(CLUSTER_AT_ONCE)

    async def start(self) -> None:
        """Raises MountFailed where no socket can be made."""
        sock, self.path = rundir.put(
            lambda folder: _bound(Path(folder, self._name)), "control socket", self._run
        )
        self._inode = self.path.lstat().st_ino
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=LINE_MAX)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            # After an umount from outside our device number may be another mount's by now.
            with contextlib.suppress(FileNotFoundError):
                if self.path.lstat().st_ino == self._inode:
                    self.path.unlink()

    # -- a connection ---------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asker = _asker(writer.get_extra_info("socket"))
        room = self._door.enter(asker)
        if room is _Room.NONE:
            writer.transport.abort()
            return
        try:
            # First of all read: closing with unread bytes would take the answer along.
            async with asyncio.timeout(ASK_S if room is _Room.SERVED else CROWDED_ASK_S):
                line = await reader.readline()
            answer = await self._answer(asker, line, room)
            async with asyncio.timeout(TALK_S):
                await _send(writer, answer)
        except (ConnectionError, ValueError, TimeoutError):
            pass  # the asker went away, or asks nothing
        finally:
            self._door.leave(asker, room)
            writer.close()

    async def _answer(self, asker: Asker, line: bytes, room: _Room) -> Facts:
        try:
            if not asker.trusted and not self.allow_other:
                raise NotPermitted("this mount belongs to another user")
            if room is not _Room.SERVED:
                raise Unavailable(
                    f"the daemon answers as many questions of user {asker.uid} now as it takes at "
                    "once: try again"
                )
            handler, request = self._understood(asker, line)
            return {"ok": await self._handled(asker, handler, request)}
        except DlmfsError as error:
            return {"error": {"class": type(error).__name__, "message": str(error)}}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return {"error": {"class": "UsageError", "message": f"malformed question: {error}"}}
        except Exception as error:
            # Left alone it would end as a broken invariant, and cost the node its locks.
            log.exception("a question could not be answered")
            what = f": {type(error).__name__}: {error}" if asker.trusted else ""
            message = f"internal error of the daemon{what}; see its log"
            return {"error": {"class": "Bug", "message": message}}

    def _understood(self, asker: Asker, line: bytes) -> tuple[Handler, Facts]:
        request = json.loads(line)
        handler = self.handlers.get(str(request["cmd"])) if isinstance(request, dict) else None
        if handler is None:
            raise UsageError("the daemon does not know this question: is it of another version?")
        if handler.admin and not asker.trusted:
            raise NotPermitted("only root and the user who mounted it may do that")
        return handler, request

    async def _handled(self, asker: Asker, handler: Handler, request: Facts) -> object:
        """The answer, when it is the asker's turn."""
        async with contextlib.AsyncExitStack() as turns:
            if not asker.trusted and handler.cost is not Cost.LITTLE:
                turn = self._turns.setdefault(asker.uid, asyncio.Lock())
                await turns.enter_async_context(turn)
            if not asker.trusted and handler.cost is Cost.CLUSTER:
                self._rations.take(asker.uid)
                await turns.enter_async_context(self._cluster)
            answer = handler.answer(asker, request)
            return await answer if inspect.isawaitable(answer) else answer


async def _send(writer: asyncio.StreamWriter, answer: Facts) -> None:
    for piece in pace.encoded(answer):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)


def _bound(path: Path) -> tuple[socket.socket, Path]:
    """A socket there that all may connect to; nobody listens yet. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of a dead daemon whose device number we got
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        folder = folders.enter(str(path.parent))
        try:
            folders.set_mode(folder, path.name, 0o666)
        finally:
            os.close(folder)
    except BaseException:
        sock.close()
        raise
    return sock, path


def _asker(sock: socket.socket) -> Asker:
    """Who connected, at the time when he did."""
    size = struct.calcsize("3i")
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, gid = struct.unpack("3I", credentials)
    groups = array("I")
    with contextlib.suppress(OSError):  # an older kernel, or more than GROUPS_MAX
        groups.frombytes(
            sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_MAX * groups.itemsize)
        )
    return Asker(uid, gid, frozenset(groups), trusted=uid in (0, os.getuid()))
