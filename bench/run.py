#!/usr/bin/env python3
"""The figures, in one run on one CPU, as ratios: see README.md.

bench/run.py [--quick]
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
DLMFS = [sys.executable, str(HERE.parent / "scripts" / "dlmfs")]
PINGPONG = """
import os, sys, time
path, seconds = sys.argv[1], float(sys.argv[2])
flags = os.O_RDWR | os.O_CREAT
os.close(os.open(path, flags))
print("ready", flush=True)
sys.stdin.readline()
tokens, end = set(), time.monotonic() + seconds
while time.monotonic() < end:
    fd = os.open(path, flags)
    tokens.add(os.getxattr(fd, "user.dlmfs.token"))
    os.close(fd)
print(len(tokens), flush=True)
"""
"""Counts tokens, so that an open of a lock that has not left the node meanwhile does not count."""


def dlmfs(*args: str) -> str:
    return subprocess.run([*DLMFS, *args], check=True, capture_output=True, text=True).stdout


class Bench:
    """Mounts and programs of one run; all gone at its end."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder = folder
        self.scale = 10 if quick else 1
        self.undo = contextlib.ExitStack()

    def mount(self, name: str) -> Path:
        where = self.folder / name
        where.mkdir()
        state = self.folder / "state.db"
        dlmfs("mount", f"local:{state}", str(where), "-o", f"node={name}")
        self.undo.callback(dlmfs, "umount", "--lazy", str(where))
        (where / "bench").mkdir()
        return where

    def build(self) -> tuple[Path, Path | None]:
        client, nullfs = self.folder / "openclose", self.folder / "nullfs"
        subprocess.run(["cc", "-O2", "-o", client, HERE / "openclose.c"], check=True)
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"],
            check=False,
            capture_output=True,
            text=True,
        )
        if flags.returncode:
            return client, None
        subprocess.run(
            ["cc", "-O2", "-o", nullfs, HERE / "nullfs.c", *flags.stdout.split()], check=True
        )
        return client, nullfs

    def open_close(self, a: Path) -> None:
        """Microseconds per open+close, in interleaved rounds."""
        client, nullfs = self.build()
        targets = {"tmpfs": self.folder / "plain", "dlmfs, cached lock": a / "bench/lock"}
        targets["tmpfs"].touch()
        targets["dlmfs, cached lock"].touch()
        if nullfs is not None:
            where = self.folder / "null"
            where.mkdir()
            server = subprocess.Popen([nullfs, where])
            self.undo.callback(server.wait)
            self.undo.callback(subprocess.run, ["umount", str(where)], check=True)
            while not os.path.ismount(where):
                time.sleep(0.01)
            targets["C libfuse, does nothing"] = where / "lock"
        times: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(7):
            for name, path in targets.items():
                pairs = 30_000 // self.scale
                start = time.monotonic()
                subprocess.run([client, path, str(pairs), "rdwr"], check=True, capture_output=True)
                times[name].append((time.monotonic() - start) / pairs * 1e6)
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, value in median.items():
            ratio = median["dlmfs, cached lock"] / value
            print(f"open+close  {name:26} {value:8.2f} us   dlmfs takes {ratio:5.2f} times that")

    def hand_over(self, a: Path, b: Path, cpus: str) -> None:
        seconds = 5.0 / self.scale
        children = [
            subprocess.Popen(
                [sys.executable, "-c", PINGPONG, str(where / "bench/ball"), str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for where in (a, b)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        count = sum(int(child.communicate()[0]) for child in children)
        print(f"hand-over   between two mounts, {cpus:12} {count / seconds:8.0f} a second")

    def memory(self, a: Path) -> None:
        pid = json.loads(dlmfs("status", "--json", str(a)))[0]["pid"]
        base = resident(pid)
        made = 0
        directory = os.open(a / "bench", os.O_RDONLY)
        for goal in (1000, 100_000 // self.scale):
            for number in range(made, goal):
                flags = os.O_RDWR | os.O_CREAT
                os.close(os.open(f"m{number}", flags, 0o600, dir_fd=directory))
            made = goal
            print(
                f"memory      {goal:7} cached locks      {(resident(pid) - base) / goal:8.0f} bytes each"
            )
        os.close(directory)


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    path = Path(tempfile.mkdtemp(prefix="dlmfs-bench-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    quick = "--quick" in sys.argv[1:]
    cpus = sorted(os.sched_getaffinity(0))
    with folder() as path:
        bench = Bench(path, quick=quick)
        with bench.undo:
            os.sched_setaffinity(0, {cpus[-1]})
            a, b = bench.mount("a"), bench.mount("b")
            bench.open_close(a)
            bench.hand_over(a, b, "one CPU")
            bench.memory(a)
        second = Bench(path / "two", quick=quick)
        second.folder.mkdir()
        with second.undo:
            os.sched_setaffinity(0, set(cpus))
            a, b = second.mount("a"), second.mount("b")
            second.hand_over(a, b, f"{len(cpus)} CPUs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
