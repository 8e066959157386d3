"""Where a tool is tried: a lock on two nodes, which one of them may hold, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fs.nodes import PATIENCE_S, Holder, Nodes
from tests.tools.rows import Row

ENVIRONMENT = {**os.environ, "LC_ALL": "C"}


def attribute(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.dlmfs.{name}").decode()


def until(what: str, true: Callable[[], bool]) -> None:
    """Wait for something that tells nobody when it comes."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.01)


@dataclass
class Done:
    """What became of a tool."""

    code: int
    out: str
    err: str


class Tool:
    """One run of a tool under a shell, in a process group of its own, as from a terminal."""

    def __init__(self, command: str, folder: Path) -> None:
        # A parent that ignores SIGINT (nohup, a background job) must not hand that on.
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT", "sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=ENVIRONMENT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> Done:
        """Wait for it. It hangs? Then it is killed, and the test fails."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return Done(self.process.returncode, out, err)

    def kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


class Case:
    """One lock in one domain of two nodes, and a folder outside of them."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.domain, self.other = bench.a / "dom", bench.b / "dom"
        self.lock = self.domain / "lock"
        self.folder = folder
        self.folder.mkdir()
        (self.folder / "small").write_bytes(b"hello\n")
        (self.folder / "big").write_bytes(b"x" * 100)
        with tarfile.open(self.folder / "archive", "w") as archive:
            archive.add(self.folder / "small", "lock")
        for domain in (self.domain, self.other):
            domain.mkdir()
        os.mknod(self.lock, stat.S_IFREG | 0o644)  # makes the file, takes no lock

    def command(self, row: Row) -> str:
        places = {
            "LOCK": self.lock,
            "DOMAIN": self.domain,
            "MOUNT": self.bench.a,
            "SMALL": self.folder / "small",
            "BIG": self.folder / "big",
            "ARCHIVE": self.folder / "archive",
            "OUT": self.folder / "out",
        }
        text = row.command
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    @contextlib.contextmanager
    def run(self, row: Row) -> Iterator[Tool]:
        tool = Tool(self.command(row), self.folder)
        try:
            yield tool
        finally:
            tool.kill()

    def hold_elsewhere(self) -> Holder:
        """The other node holds the lock exclusively."""
        holder = self.bench.nodes.hold(self.other / "lock")
        assert holder.wait() == "held"
        return holder

    def level(self) -> str:
        """This node's level, in use or cached: what a tool took remains to be seen."""
        return attribute(self.lock, "mode")

    def waiters(self) -> list[dict[str, object]]:
        """Processes of this node that wait for the lock."""
        told: list[dict[str, object]] = json.loads(attribute(self.lock, "waiters"))
        return [waiter for waiter in told if "pid" in waiter]

    def clear(self) -> None:
        for domain in (self.domain, self.other):
            if domain.is_dir():
                for name in domain.iterdir():
                    name.unlink()
                domain.rmdir()
        shutil.rmtree(self.folder)


class Bench:
    """Two nodes, on which one tool after another is tried."""

    def __init__(self, nodes: Nodes, a: Path, b: Path) -> None:
        self.nodes = nodes
        self.a, self.b = a, b

    @contextlib.contextmanager
    def case(self) -> Iterator[Case]:
        case = Case(self, self.nodes.folder / "outside")
        try:
            yield case
        finally:
            for child in self.nodes.children:
                if child.poll() is None:
                    child.kill()
                    child.wait(PATIENCE_S)
            # A killed holder's files are released a moment after it is gone.
            until("the files of this tool are removed", lambda: self._cleared(case))

    @staticmethod
    def _cleared(case: Case) -> bool:
        try:
            case.clear()
        except OSError:
            return False
        return True
