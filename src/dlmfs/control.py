"""The daemon's control socket: one JSON line asks, one JSON line answers. Both ends of it.

The socket's place follows from the mount table alone (user and device number), so a question
never touches the mount, and a dead daemon is told from a stopped one.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from dlmfs import rundir
from dlmfs.errors import DlmfsError, NotPermitted, Unavailable, UsageError
from dlmfs.fuse.mount import MountEntry

log = logging.getLogger("dlmfs.control")

LINE_MAX: Final = 64 * 1024
CONNECTIONS_MAX: Final = 32
"""Questions under way at once; one user must not use up the daemon's descriptors."""
TALK_S: Final = 10.0
"""An asker who does not talk or listen for this long is dropped."""
CROWDED_TALK_S: Final = 0.5
LOOK_S: Final = 1.0
"""How often an asker looks whether the daemon is stopped: then it need not be waited for."""

Handler = Callable[[dict[str, object]], object]


def control_folders(uid: int) -> tuple[Path, ...]:
    """Where daemons of this user may listen, the best first."""
    return tuple(map(Path, rundir.folders(uid)))


def control_path(entry: MountEntry) -> Path:
    """Where the daemon of this mount listens."""
    name = rundir.name(entry.dev, "sock")
    places = [folder / name for folder in control_folders(rundir.owner_of(entry))]
    return next((place for place in places if place.exists()), places[0])


class ControlServer:
    """Answers questions about one daemon. `allow_other`: to every local user, but for `admin`, which
    only root and the daemon's own user may ask. Raises NotPermitted."""

    def __init__(
        self,
        entry: MountEntry,
        handlers: Mapping[str, Handler],
        admin: Mapping[str, Handler],
        *,
        allow_other: bool,
    ) -> None:
        self.path = Path(rundir.make_folder(os.getuid()), rundir.name(entry.dev, "sock"))
        self.handlers = handlers
        self.admin = admin
        self.allow_other = allow_other
        self._server: asyncio.Server | None = None
        self._connections = 0
        self._inode = 0

    async def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()  # of a dead daemon whose device number we got
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=LINE_MAX)
        self.path.chmod(0o666)
        self._inode = self.path.lstat().st_ino

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            # After an umount from outside our device number may be another mount's by now.
            with contextlib.suppress(FileNotFoundError):
                if self.path.lstat().st_ino == self._inode:
                    self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            answer = await self._answer(reader, writer)
            async with asyncio.timeout(TALK_S):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, TimeoutError):
            pass  # the asker went away, or asks nothing
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, object]:
        try:
            crowded = self._connections > CONNECTIONS_MAX
            # First of all read: closing with unread bytes would take the answer along.
            async with asyncio.timeout(TALK_S if not crowded else CROWDED_TALK_S):
                line = await reader.readline()
            credentials = writer.get_extra_info("socket").getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
            _, uid, _ = struct.unpack("3i", credentials)
            if uid not in (0, os.getuid()) and not self.allow_other:
                raise NotPermitted("this mount belongs to another user")
            if crowded:
                raise Unavailable(f"the daemon answers {CONNECTIONS_MAX} others now: try again")
            request = json.loads(line)
            command = str(request["cmd"]) if isinstance(request, dict) else ""
            handler = self.handlers.get(command)
            if handler is None and command in self.admin:
                if uid not in (0, os.getuid()):
                    raise NotPermitted("only root and the user who mounted it may do that")
                handler = self.admin[command]
            if handler is None:
                raise UsageError(
                    "the daemon does not know this question: is it of another version?"
                )
            answer = handler(request)
            return {"ok": await answer if inspect.isawaitable(answer) else answer}
        except DlmfsError as error:
            return {"error": {"class": type(error).__name__, "message": str(error)}}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": {"class": "UsageError", "message": f"malformed question: {error}"}}
        except Exception as error:
            # Left alone it would end as a broken invariant, and cost the node its locks.
            log.exception("a question could not be answered")
            message = f"internal error of the daemon: {type(error).__name__}: {error}; see its log"
            return {"error": {"class": "Bug", "message": message}}


def ask(entry: MountEntry, request: dict[str, object], timeout_s: float = 5.0) -> Any:
    """Ask the daemon of a mount. Raises Unavailable if it is dead or does not answer, or the
    DlmfsError that it answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(control_path(entry)))
        except (FileNotFoundError, ConnectionRefusedError):
            raise Unavailable(
                f"the daemon of {entry.mountpoint} is gone: `dlmfs umount {entry.mountpoint}` "
                "clears the dead mount"
            ) from None
        except PermissionError:
            raise NotPermitted(f"the daemon of {entry.mountpoint} is another user's") from None
        pid = _peer(sock, entry)
        if pid is None:
            raise NotPermitted(
                f"what answers for {entry.mountpoint} is not its daemon: another user made "
                f"{control_path(entry)}"
            )
        try:
            sock.sendall(json.dumps(request).encode() + b"\n")
            sock.shutdown(socket.SHUT_WR)
            _await_answer(sock, pid, timeout_s)
            with sock.makefile("rb") as file:
                line = file.readline()
            answer = json.loads(line)
        except (OSError, ValueError):
            raise Unavailable(
                f"the daemon of {entry.mountpoint} (pid {pid}{_state(pid)}) does not answer"
            ) from None
    if "error" in answer:
        raise _error(answer["error"])
    return answer["ok"]


def _await_answer(sock: socket.socket, pid: int, timeout_s: float) -> None:
    """Until something can be read. Raises TimeoutError, for a stopped daemon soon."""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not poll.poll(1000 * min(LOOK_S, timeout_s)):
        if _state(pid) or time.monotonic() >= deadline:
            raise TimeoutError


def daemon_pid(entry: MountEntry) -> int | None:
    """The daemon's process, or None if it is gone. Does not need it to answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5.0)
        try:
            sock.connect(str(control_path(entry)))
        except OSError:
            return None
        return _peer(sock, entry)


def _peer(sock: socket.socket, entry: MountEntry) -> int | None:
    """The daemon's process; None for another user's, who is not to be believed."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return int(pid) if uid in (0, rundir.owner_of(entry)) else None


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return ", stopped" if state in "Tt" else ""


def _error(facts: dict[str, str]) -> DlmfsError:
    for kind in (NotPermitted, UsageError):
        if facts["class"] == kind.__name__:
            return kind(facts["message"])
    return Unavailable(facts["message"])
