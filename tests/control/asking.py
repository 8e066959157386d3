"""Questions put to a control socket as any user, byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlmfs.control import control_path
from tests.fs.nodes import PATIENCE_S
from tests.robust.helpers import entry_of

STRANGER = 54321

Facts = dict[str, Any]


@contextlib.contextmanager
def acting(uid: int, groups: Sequence[int] = ()) -> Iterator[None]:
    """As another user for files and sockets; the process stays root's for the rest."""
    before = os.getgroups()
    os.setgroups(list(groups))
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@contextlib.contextmanager
def connected(
    where: Path, uid: int = STRANGER, groups: Sequence[int] = ()
) -> Iterator[socket.socket]:
    """A connection of that user to the daemon of a mount."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        with acting(uid, groups):
            sock.connect(str(control_path(entry_of(where))))
        yield sock


def said(sock: socket.socket) -> bytes:
    """All that comes until the end."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while some := sock.recv(1 << 20):
            answer += some
    return answer


def raw(where: Path, question: bytes, uid: int = STRANGER, groups: Sequence[int] = ()) -> bytes:
    """The answer to a line."""
    with connected(where, uid, groups) as sock:
        sock.sendall(question + b"\n")
        return said(sock)


def asked(
    where: Path, uid: int = STRANGER, groups: Sequence[int] = (), **question: object
) -> Facts:
    """The answer to a question: {"ok": ...} or {"error": ...}."""
    answer: Facts = json.loads(raw(where, json.dumps(question).encode(), uid, groups))
    return answer


def told(where: Path, uid: int = STRANGER, groups: Sequence[int] = (), **question: object) -> Any:
    """The same where it is answered."""
    answer = asked(where, uid, groups, **question)
    assert "ok" in answer, answer
    return answer["ok"]


def refused(where: Path, **question: object) -> str:
    """The class of the refusal that a stranger gets."""
    answer: Facts = json.loads(raw(where, json.dumps(question).encode()))
    assert "error" in answer, answer
    return str(answer["error"]["class"])
