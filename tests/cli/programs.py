"""Programs at locks for the tests of the commands that look at them, and a patient look."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes

OPENER = """
import os, sys
for number, path in enumerate(sys.argv[1:]):
    if number:
        sys.stdin.readline()
    mode, path = path[0], path[1:]
    flags = os.O_RDONLY if mode == "s" else os.O_RDWR
    fd = os.open(os.fsencode(path), flags | os.O_CREAT, 0o644)
    os.set_inheritable(fd, True)
    print("held", flush=True)
sys.stdin.read()
"""


class Opener:
    """A process that opens one lock after the other (`x`: exclusively, `s`: shared) and keeps all: the
    first at once, each further one when told to `go`."""

    def __init__(self, nodes: Nodes, *wanted: tuple[str, Path | bytes]) -> None:
        self.wanted = [mode.encode() + os.fsencode(path) for mode, path in wanted]
        command = [sys.executable.encode(), b"-I", b"-c", OPENER.encode(), *self.wanted]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.held = 0
        nodes.children.append(self.process)

    @property
    def pid(self) -> int:
        return self.process.pid

    def has(self, count: int) -> Opener:
        """Wait until it has so many of its locks."""
        assert self.process.stdout is not None
        while self.held < count:
            assert self.process.stdout.readline() == b"held\n"
            self.held += 1
        return self

    def go(self) -> Opener:
        """Begin the next open."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for what no event announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def run(*args: str | bytes | Path, code: int = 0) -> str:
    """A command's output; its names may be bytes."""
    command = [os.fsencode(arg) for arg in (*DLMFS, *args)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout.decode()


def why(path: Path | bytes, code: int = 0) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run("why", "--json", path, code=code))
    return report


def waiters(path: Path | bytes) -> int:
    """How many wait for a lock, on all nodes."""
    report = why(path)
    claims = report["locks"][0]["claims"].values()
    return sum(len(c["waiters"]) + int(c["more_waiters"]) for c in claims)


def queued(path: Path | bytes, count: int) -> None:
    until(lambda: waiters(path) == count, f"{count} waiters at {path!r}")


def letters(state: Path) -> list[bytes]:
    """Questions and answers that stand in the store."""
    conn = sqlite3.connect(state)
    try:
        keys = [bytes(key) for (key,) in conn.execute("SELECT key FROM kv")]
    finally:
        conn.close()
    return [key for key in keys if b"/ask/" in key or b"/answer/" in key]
