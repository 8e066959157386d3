"""Three real nodes, a domain of its own for each test, and programs that make system calls.

Nothing here sleeps for luck: a wait is seen in the lock's attributes, and what the nodes have told
each other is processed once another lock has gone round all of them (`Domain.settle`).
"""

from __future__ import annotations

import ast
import contextlib
import errno
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes

AGENT = Path(__file__).with_name("agent.py")
NAMES = "abc"
RO, RW, WO = os.O_RDONLY, os.O_RDWR, os.O_WRONLY
CREATE, TRY = os.O_CREAT, os.O_NONBLOCK
NOBODY = 65534
_numbers = itertools.count(1)

Target = str | bytes | os.PathLike[str]


def outcome(call: Callable[..., object], *args: object) -> str:
    """ "ok", or the name of the errno."""
    try:
        call(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that only looking can tell."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.002)


def told(path: Target, name: str) -> str:
    """What a lock file says of its lock, without taking it."""
    return os.getxattr(path, f"user.dlmfs.{name}").decode()


def rows(path: Target, name: str) -> list[dict[str, Any]]:
    """The holders or the waiters of a lock as this node knows them."""
    found: list[dict[str, Any]] = json.loads(told(path, name))
    return found


class Program:
    """A process that makes the system calls it is told to."""

    def __init__(self, wrapper: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-I", "-S", str(AGENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.process.pid

    def start(self, name: str, *args: Any) -> None:
        """Begin a call that may take its time."""
        plain = tuple(os.fsencode(a) if isinstance(a, Path) else a for a in args)
        assert self.process.stdin is not None
        self.process.stdin.write(repr((name, plain)).encode() + b"\n")
        self.process.stdin.flush()

    def answered(self, within_s: float = 0.0) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], within_s)[0])

    def result(self) -> Any:
        """The value of the call begun last. Raises its OSError."""
        assert self.answered(PATIENCE_S), "the system call did not return"
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the program is dead"
        kind, value = ast.literal_eval(line.decode())
        if kind == "error":
            raise OSError(value, os.strerror(value))
        return value

    def __call__(self, name: str, *args: Any) -> Any:
        self.start(name, *args)
        return self.result()

    def open(self, path: Target, flags: int, mode: int = 0o644) -> int:
        fd: int = self("open", os.fsencode(path), flags, mode)
        return fd

    def opening(self, path: Target, flags: int) -> None:
        """Begin an open that is expected to wait."""
        self.start("open", os.fsencode(path), flags, 0o644)

    def try_open(self, path: Target, flags: int) -> str:
        """Open and close: "ok", or the name of the errno."""
        return outcome(lambda: self("close", self.open(path, flags)))

    def close(self, fd: int) -> None:
        self("close", fd)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Programs:
    """Makes programs; all are gone at its end."""

    def __init__(self) -> None:
        self.made: list[Program] = []

    def __call__(self, *wrapper: str) -> Program:
        program = Program(wrapper)
        self.made.append(program)
        return program

    def close(self) -> None:
        for program in self.made:
            program.end()


class Domain:
    """One domain on three nodes: `a`, `b` and `c` are its folders there."""

    def __init__(self, nodes: Nodes, programs: Programs, name: str) -> None:
        self.nodes = nodes
        self.program = programs
        self.name = name
        self.a, self.b, self.c = (nodes.folder / node / name for node in NAMES)
        self.mounts = [nodes.folder / node for node in NAMES]
        for folder in self.folders:
            folder.mkdir()

    @property
    def folders(self) -> list[Path]:
        return [self.a, self.b, self.c]

    def settle(self, *folders: Path) -> None:
        """Take another lock through every node and back: what was told before is known by then."""
        for folder in (*(folders or self.folders), (folders or self.folders)[0]):
            os.close(os.open(folder / ".settle", RW | CREATE))

    def waits(self, program: Program, path: Path, *folders: Path) -> bool:
        """Whether the program's open has to wait, once every node knows of it."""

        def known() -> bool:
            pids = (row.get("pid") for row in rows(path, "waiters"))
            return program.answered() or program.pid in pids

        until(known, "an answer, or a place in the queue")
        self.settle(*folders)
        return not program.answered()

    def hold(self, path: Path, flags: int) -> tuple[Program, int]:
        """A new program that has the lock."""
        program = self.program()
        return program, program.open(path, flags | CREATE)

    def queue(self, path: Path, flags: int, *folders: Path) -> Program:
        """A new program that waits for the lock."""
        program = self.program()
        program.opening(path, flags | CREATE)
        until(path.exists, "the file of the lock")
        assert self.waits(program, path, *folders), "the open did not wait"
        return program

    def clear(self) -> None:
        """Leave the domain everywhere. A killed program's descriptors close a moment later."""
        for folder in self.folders:
            with contextlib.suppress(FileNotFoundError):
                for file in list(folder.iterdir()):
                    until(lambda file=file: outcome(os.unlink, file) != "EBUSY", f"end of {file}")  # type: ignore[misc]
                folder.rmdir()


@contextlib.contextmanager
def three_nodes(*options: str) -> Iterator[Nodes]:
    """Three nodes over one state, in a folder that other users may enter."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir=base))
    made = Nodes(folder)
    try:
        folder.chmod(0o755)
        for name in NAMES:
            made.mount(name, *options)
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def programs() -> Iterator[Programs]:
    made = Programs()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def trio() -> Iterator[Nodes]:
    """Three nodes for all tests of a module that leave them as they were."""
    with three_nodes() as nodes:
        yield nodes


@pytest.fixture
def dom(trio: Nodes, programs: Programs) -> Iterator[Domain]:
    """A domain of the test's own on the module's three nodes."""
    domain = Domain(trio, programs, f"d{next(_numbers)}")
    yield domain
    programs.close()
    domain.clear()


@pytest.fixture
def fresh(programs: Programs) -> Iterator[Domain]:
    """A domain on three nodes that the test may break."""
    with three_nodes() as nodes:
        yield Domain(nodes, programs, "dom")
        programs.close()
