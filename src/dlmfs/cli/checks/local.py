"""Whether a SOURCE of the embedded engine that need not be mounted can be: its state file, opened
for reading."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dlmfs.cli.checks import host
from dlmfs.cli.checks.finding import Finding, fail, ok, warn
from dlmfs.config import LocalSource
from dlmfs.proc import is_stopped
from dlmfs.store import schema, statefile
from dlmfs.store.lives import Lives


def check(source: LocalSource) -> Iterator[Finding]:
    path = source.path or statefile.default_path(source.name)
    folder = host.state_folder(path, default=source.path is None)
    yield folder
    if folder.level == "fail":
        return
    if not path.exists():
        yield ok("state", f"{path} is made by the first mount")
        return
    try:
        sessions = _sessions(path)
    except sqlite3.Error as error:
        yield fail("state", f"{path} cannot be read: {error}", "move it away, or name another file")
        return
    if sessions is None:
        yield fail(
            "state", f"{path} is no state file of this version of dlmfs", "name another file"
        )
        return
    info = path.stat()
    if info.st_mode & 0o077:
        yield warn(
            "state-mode", "state", f"{path} can be read or written by others", f"chmod 600 {path}"
        )
    yield ok("state", f"{path}: {info.st_size / 1e6:.1f} MB, {len(sessions)} nodes")
    yield from _nodes(path, sessions)


def _nodes(path: Path, sessions: list[tuple[int, str, int]]) -> Iterator[Finding]:
    try:
        lives = Lives.look(path)
    except OSError as error:
        if sessions:
            yield warn(
                "lives",
                "nodes",
                f"{path}.d, where {len(sessions)} nodes prove that they live: {error.strerror}",
                "nothing to do: the next mount makes it anew",
            )
        return
    with contextlib.closing(lives):
        for session in sessions:
            yield _node(lives, *session)


def _node(lives: Lives, lease: int, node: str, pid: int) -> Finding:
    if not lives.alive(lease, pid):
        return warn(
            "dead-node",
            "nodes",
            f"node {node} (pid {pid}) is dead, and no other node was there to see it",
            "nothing to do: the next mount ends it; the name may be taken at once",
        )
    if is_stopped(pid):
        return fail(
            "nodes",
            f"node {node} (pid {pid}) is stopped: it keeps its locks",
            f"kill -CONT {pid}",
        )
    return ok("nodes", f"the name {node} is in use by pid {pid}")


def _sessions(path: Path) -> list[tuple[int, str, int]] | None:
    """The sessions on record; None: not a file of ours. Raises sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(statefile.uri(path, "ro"), uri=True)) as conn:
        application = conn.execute("PRAGMA application_id").fetchone()[0]
        version = conn.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) != (schema.APPLICATION_ID, schema.FORMAT):
            return None
        return schema.sessions(conn)
