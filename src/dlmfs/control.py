"""The asker's end of a daemon's control socket: one JSON line asks, one JSON line answers.

The socket's place follows from the mount table alone (user and device number), so a question
never touches the mount, and a dead daemon is told from a stopped one.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from dlmfs import proc, rundir
from dlmfs.errors import DlmfsError, NotPermitted, Unavailable, UsageError
from dlmfs.fuse.mount import MountEntry

LOOK_S: Final = 1.0
"""How often an asker looks whether the daemon is stopped: then it need not be waited for."""


def control_folders(uid: int) -> tuple[Path, ...]:
    """Where daemons of this user may listen, the best first."""
    return tuple(map(Path, rundir.places(uid)))


def control_path(entry: MountEntry) -> Path:
    """Where the daemon of this mount listens."""
    name = rundir.name(entry.dev, "sock")
    places = [folder / name for folder in control_folders(rundir.owner_of(entry))]
    return next((place for place in places if place.exists()), places[0])


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
    return ", stopped" if proc.is_stopped(pid) else ""


def _error(facts: dict[str, str]) -> DlmfsError:
    for kind in (NotPermitted, UsageError):
        if facts["class"] == kind.__name__:
            return kind(facts["message"])
    return Unavailable(facts["message"])
