"""A `dlmfs lock` that goes on while a test looks at it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fs.nodes import DLMFS, PATIENCE_S, dlmfs


class Job:
    """A `dlmfs lock` in a session of its own."""

    def __init__(self, *args: object) -> None:
        self.process = subprocess.Popen(
            [*DLMFS, "lock", *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._text = b""

    def behind(self) -> int:
        """Its process that waits for the lock, and then has it."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        until(lambda: children.read_text())
        return int(children.read_text())

    def line(self) -> str:
        """The next line of its output. Fails if none comes."""
        out = self.process.stdout
        assert out is not None
        while b"\n" not in self._text:
            assert select.select([out], [], [], PATIENCE_S)[0], "it says nothing"
            more = os.read(out.fileno(), 4096)
            assert more, "it has ended"
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def over(self) -> tuple[int, str]:
        """Its exit code and what it said on stderr, once it has ended by itself."""
        code = self.process.wait(PATIENCE_S)
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        os.set_blocking(fd, False)  # its children may have it open, too
        with contextlib.suppress(BlockingIOError):
            return code, os.read(fd, 65536).decode()
        return code, ""

    def let_go(self) -> None:
        """The command's input ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


Start = Callable[..., Job]


def locked(*args: object) -> subprocess.CompletedProcess[str]:
    return dlmfs("lock", *map(str, args), check=False)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `dlmfs lock`; whatever is left of its group is killed at the end."""
    begun: list[Job] = []

    def begin(*args: object) -> Job:
        begun.append(Job(*args))
        return begun[-1]

    yield begin
    for job in begun:
        job.close()


def ended(pid: int) -> bool:
    """Whether a process ends soon."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE_S)[0])
    finally:
        os.close(handle)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
