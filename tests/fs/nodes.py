"""Real daemons with real mounts, for tests. Everything is gone when the context ends."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DLMFS = [sys.executable, str(ROOT / "scripts" / "dlmfs")]
PATIENCE_S = 30.0


def dlmfs(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DLMFS, *args], capture_output=True, text=True, timeout=60, check=check)


class Nodes:
    """Mounts over one state file in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state.db"
        self.mounts: list[Path] = []
        self.children: list[subprocess.Popen[bytes]] = []

    def mount(self, name: str, *options: str) -> Path:
        where = self.folder / name
        where.mkdir(exist_ok=True)
        if where not in self.mounts:
            self.mounts.append(where)
        opts = ",".join([f"node={name}", *options])
        dlmfs("mount", f"local:{self.state}", str(where), "-o", opts)
        return where

    def pair(self, *options: str) -> tuple[Path, Path]:
        """Two nodes in the domain `dom`."""
        a, b = self.mount("a", *options), self.mount("b", *options)
        for node in (a, b):
            (node / "dom").mkdir()
        return a, b

    def status(self, where: Path) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(dlmfs("status", "--json", str(where)).stdout)[0]
        return report

    def pid(self, where: Path) -> int:
        return int(self.status(where)["pid"])

    def kill(self, where: Path) -> None:
        os.kill(self.pid(where), signal.SIGKILL)

    def hold(self, path: Path, flags: int = os.O_RDWR) -> Holder:
        """A process of its own that opens `path`, says "held", and holds it until told to end."""
        holder = Holder(path, flags)
        self.children.append(holder.process)
        return holder

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
        for where in self.mounts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                dlmfs("umount", "--lazy", str(where), check=False)
        for child in self.children:
            child.wait(PATIENCE_S)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


HOLDER = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
try:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.open(os.fsencode(sys.argv[1]), int(sys.argv[2]), 0o644)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open")
    token = os.getxattr(sys.argv[1], "user.dlmfs.token").decode()
    print("held", token, flush=True)
except OSError as error:
    print("error", error.errno, flush=True)
sys.stdin.read()
"""
"""open(2) by ctypes: Python's own would retry after EINTR."""


class Holder:
    def __init__(self, path: Path, flags: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", HOLDER, str(path), str(flags | os.O_CREAT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.said: list[str] = []

    def poll(self, within_s: float) -> bool:
        """Whether it has its lock, or an error, within that time."""
        out = self.process.stdout
        assert out is not None
        if not self.said and select.select([out], [], [], within_s)[0]:
            self.said = out.readline().decode().split()
        return bool(self.said)

    @property
    def waits(self) -> bool:
        return not self.poll(0.3)

    def wait(self) -> str:
        """ "held" or "error N". Fails if neither comes."""
        assert self.poll(PATIENCE_S), "the open did not return"
        return self.said[0] if self.said[:1] == ["held"] else " ".join(self.said)

    @property
    def token(self) -> int:
        return int(self.said[1])

    def release(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
