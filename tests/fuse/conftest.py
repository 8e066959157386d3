"""A real mount, served by a process of its own, and processes that use it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dlmfs
from dlmfs.errors import DlmfsError
from dlmfs.fuse import mount

DEADLINE_S = 30.0
"""For what takes milliseconds on an idle machine."""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dlmfs.__file__).parents[1])}

PREAMBLE = """
import ctypes, errno, json, os, select, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
def say(value): print(json.dumps(value), flush=True)
def attempt(function, *arguments):
    try: function(*arguments)
    except OSError as error: return errno.errorcode[error.errno]
mnt = sys.argv[1]
"""


class Child:
    """A process that is spoken to in lines, and that ends with the test."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, bufsize=0
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next line of its output; fails after a while."""
        assert self.process.stdout is not None
        end = time.monotonic() + DEADLINE_S
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            assert ready, "no answer from a child process"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, "a child process ended early"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def told(self) -> Any:
        return json.loads(self.line())

    def say(self, command: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        return self.told()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(DEADLINE_S)


def serve(mountpoint: Path) -> Child:
    """A server of tiny.py whose mount answers."""
    server = Child(sys.executable, str(Path(__file__).with_name("tiny.py")), str(mountpoint))
    assert server.line() == "ready"
    return server


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Processes to be ended with the test."""
    running: list[Child] = []
    yield running
    for child in running:
        child.kill()
    for child in running:
        child.close()


@pytest.fixture
def mountpoint(tmp_path: Path, children: list[Child]) -> Iterator[Path]:
    """An empty directory; what is mounted there goes with the test."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    # First the processes: a lazy unmount alone would leave a server without an end.
    for child in children:
        child.kill()
    while any(entry.mountpoint == str(path) for entry in mount.mounts()):
        try:
            mount.unmount(str(path), lazy=True)
        except DlmfsError:
            break


@pytest.fixture
def server(mountpoint: Path, children: list[Child]) -> Child:
    child = serve(mountpoint)
    children.append(child)
    return child


@pytest.fixture
def client(mountpoint: Path, children: list[Child]) -> Callable[..., Child]:
    """Start a Python script that uses the mount `mnt` and tells what it finds with `say`."""

    def start(code: str, *arguments: str) -> Child:
        child = Child(sys.executable, "-c", PREAMBLE + code, str(mountpoint), *arguments)
        children.append(child)
        return child

    return start
