"""The asker's end of a daemon's control socket: one JSON line asks, one JSON line answers.

The socket's place follows from the mount table alone (user and device number), so a question
never touches the mount, and a dead daemon is told from a stopped one. Where no daemon is found at
the socket's place the mount itself is looked at (`fuse.glance`): only its answer is a proof of death.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from dlmfs import __version__, folders, proc, rundir, shapes
from dlmfs.errors import (
    DaemonDead,
    DlmfsError,
    NoAnswer,
    NotPermitted,
    Unavailable,
    Unseen,
    UsageError,
)
from dlmfs.fuse import glance
from dlmfs.fuse.glance import Life
from dlmfs.fuse.mount import MountEntry

LOOK_S: Final = 1.0
"""How often an asker looks whether the daemon is stopped: then it need not be waited for."""
CONNECT_S: Final = 5.0
ANSWER_MAX: Final = 16 << 20
"""Bytes of an answer; a daemon's own bounds keep it far below."""
OTHERS_ANSWER_MAX: Final = 1 << 20
"""The same of another user's daemon."""


def control_folders(uid: int) -> tuple[Path, ...]:
    """Where daemons of this user may listen, the best first."""
    return tuple(map(Path, rundir.places(uid)))


def control_path(entry: MountEntry) -> Path:
    """Where the daemon of this mount listens."""
    name = rundir.name(entry.dev, "sock")
    places = [folder / name for folder in control_folders(rundir.owner_of(entry))]
    return next((place for place in places if place.exists()), places[0])


def ask(entry: MountEntry, request: dict[str, object], timeout_s: float = 5.0) -> Any:
    """The answer of a mount's daemon, which has the shape that this question's has (`shapes`) and is here
    within `timeout_s`, whole. Raises DaemonDead, Unavailable if it is not understood, Unseen
    if it cannot be asked from here, NoAnswer if it does not answer (in time), or the DlmfsError that
    it answers."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        pid = _connect(sock, entry)
        try:
            sock.sendall(json.dumps(request).encode() + b"\n")
            sock.shutdown(socket.SHUT_WR)
            line = _received(sock, entry, pid, deadline)
        except OSError:
            line = b""
        if not line:
            raise NoAnswer(
                f"the daemon of {entry.mountpoint} (pid {pid}{_state(pid)}) does not answer"
            )
    return _understood(entry, str(request["cmd"]), line)


def _connect(sock: socket.socket, entry: MountEntry) -> int:
    """The process at the other end; 0 if it is of a pid namespace that is not seen here. Raises
    Unavailable, Unseen, NoAnswer, NotPermitted."""
    try:
        path = _reached(sock, entry)
    except PermissionError:
        raise NotPermitted(f"the daemon of {entry.mountpoint} is another user's") from None
    except OSError as error:  # too many wait to be let in: it is stopped, or overrun
        raise NoAnswer(
            f"the daemon of {entry.mountpoint} lets nobody in: {error.strerror or error}"
        ) from None
    if path is None:
        raise _not_found(entry)
    pid, uid = _peer(sock)
    if uid not in (0, rundir.owner_of(entry)):
        if uid == folders.outside():
            why = "who listens for it is of another user namespace"
            raise _unseen(entry, why, *_glance(entry))
        raise NotPermitted(
            f"what answers for {entry.mountpoint} is not its daemon: another user made {path}"
        )
    return pid


def _reached(sock: socket.socket, entry: MountEntry) -> str | None:
    """The first place where somebody listens, connected; None: there is none. Raises OSError."""
    name = rundir.name(entry.dev, "sock")
    for folder in rundir.places(rundir.owner_of(entry)):
        path = os.path.join(folder, name)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            continue  # left of a dead daemon, perhaps, and ours has found no room there
        return path
    return None


def _not_found(entry: MountEntry) -> Unavailable:
    """Nobody listens where the daemon's socket should be. It may be dead; or have its socket in a /run
    that is not this one, or had it removed."""
    places = " or ".join(map(str, control_folders(rundir.owner_of(entry))))
    life, told = _glance(entry)
    if life is Life.DEAD:
        return DaemonDead(
            f"the daemon of {entry.mountpoint} is gone: `dlmfs umount {entry.mountpoint}` "
            "clears the dead mount"
        )
    if life is Life.OVER:
        return Unavailable(f"{entry.mountpoint} has just been unmounted")
    return _unseen(entry, f"no socket of it in {places}", life, told)


_LIVES: Final = {
    Life.ALIVE: "it lives",
    Life.SILENT: "the mount does not answer, as that of a stopped daemon",
}


def _glance(entry: MountEntry) -> tuple[Life, Any]:
    """Whether it lives; and what it says of itself, if that is not another user's word."""
    life, told = glance.look(entry, {"status": rundir.is_trusted(entry)})
    try:
        status = json.loads(told.get("status") or "null")
    except ValueError:
        status = None
    return life, status if shapes.BRIEF(status) is None else None


def _unseen(entry: MountEntry, why: str, life: Life, told: Any) -> Unseen:
    lives = _LIVES.get(life, "whether it lives is not told to this user")
    if told is not None:
        state = f"node {told['node']}, {told['lease']['state']}"
        lives += f" ({state}; its socket is in {told['run']}/ctl where it runs)"
    error = Unseen(
        f"the daemon of {entry.mountpoint} cannot be asked from here (a container?): {why}, but "
        f"{lives}; ask where it was mounted, or bind that folder in, or name it in ${rundir.ENVIRONMENT} "
        "(docs/containers.md)"
    )
    error.told = told
    return error


def _received(sock: socket.socket, entry: MountEntry, pid: int, deadline: float) -> bytes:
    """A line, within bounds of size and of the whole time; empty if there is none. Raises OSError,
    Unavailable."""
    most = ANSWER_MAX if rundir.is_trusted(entry) else OTHERS_ANSWER_MAX
    line = bytearray()
    while not line.endswith(b"\n"):
        _await_some(sock, pid, deadline)
        some = sock.recv(1 << 16)
        if not some:
            break
        line += some
        if len(line) > most:
            raise _not_understood(entry, f"it is longer than {most} bytes")
    return bytes(line)


def _await_some(sock: socket.socket, pid: int, deadline: float) -> None:
    """Until something can be read. Raises TimeoutError, for a stopped daemon soon."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if poll.poll(1000 * min(LOOK_S, left_s)):
            return
        if _state(pid):
            raise TimeoutError


def _understood(entry: MountEntry, question: str, line: bytes) -> Any:
    """What a line answers. Raises Unavailable, or the DlmfsError that it tells of."""
    try:
        answer = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _not_understood(entry, "it is no JSON") from None
    if not isinstance(answer, dict):
        raise _not_understood(entry, "it is no object")
    if "error" in answer:
        facts = answer["error"]
        if shapes.misfit(facts, {"class": str, "message": str}) is not None:
            raise _not_understood(entry, "it tells an error in no words")
        raise _error(facts)
    told = answer.get("ok")
    wrong = shapes.ANSWERS[question](told)
    if wrong is not None:
        version = told.get("version") if isinstance(told, dict) else None
        if isinstance(version, str) and version != __version__:
            wrong = f"it is of version {version[:32]}, this program of {__version__}"
        else:
            wrong += " is not as it should be"
        raise _not_understood(entry, wrong)
    return told


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN, Infinity: Python's own, no JSON


def _not_understood(entry: MountEntry, why: str) -> Unavailable:
    return Unavailable(f"the answer of the daemon of {entry.mountpoint} is not understood: {why}")


def daemon_pid(entry: MountEntry) -> int | None:
    """The daemon's process, 0 if it is of a pid namespace that is not seen here, None if it is dead. Does
    not need it to answer. Raises NoAnswer if it cannot be told, since too many wait to be let in;
    Unseen if it cannot be asked from here, NotPermitted by this user; Unavailable: it is not
    mounted any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CONNECT_S)
        try:
            return _connect(sock, entry)
        except DaemonDead:
            return None


def _peer(sock: socket.socket) -> tuple[int, int]:
    """The process that listens, and its user."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return int(pid), int(uid)


def _state(pid: int) -> str:
    return ", stopped" if proc.is_stopped(pid) else ""


def _error(facts: dict[str, str]) -> DlmfsError:
    for kind in (NotPermitted, UsageError):
        if facts["class"] == kind.__name__:
            return kind(facts["message"])
    return Unavailable(facts["message"])
