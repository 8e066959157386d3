#!/usr/bin/env python3
"""Names that are used once, by `dlmfs lock`'s way through the library: what they leave.

bench/names.py [--names 100000] [--rounds 2] [--source etcd://...]

One process takes and drops locks of ever new names on one mount, in two rounds. After each, when the
names are gone: memory of the daemon, records of locks in the store, size of the state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DLMFS = [sys.executable, str(HERE.parent / "scripts" / "dlmfs")]
sys.path.insert(0, str(HERE.parent / "src"))

from dlmfs.client import calls, logic  # noqa: E402
from dlmfs.client.place import place  # noqa: E402

SETTLED_S = 5.0
"""For how long memory must not have changed."""


def dlmfs(*args: str) -> str:
    return subprocess.run([*DLMFS, *args], check=True, capture_output=True, text=True).stdout


def do(step: logic.Step) -> object:
    """A step of taking a lock, as `dlmfs lock` does it."""
    match step:
        case logic.Open(path, flags):
            return os.open(path, flags)
        case logic.MakeLock(path):
            os.mknod(path, logic.MODE)
        case logic.MakeDomain(path):
            os.mkdir(path)
        case logic.Device(fd):
            return os.fstat(fd).st_dev
        case logic.Token(fd):
            return calls.token(fd)
        case logic.Close(fd):
            os.close(fd)
    return 0


def use(where: Path, first: int, count: int) -> None:
    base = place(where / "dom/base")
    for number in range(first, first + count):
        request = logic.Request(base._replace(name=f"job-{number}"))
        os.close(logic.drive(logic.taking(request), do))


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the daemon is gone")


class Bench:
    def __init__(self, folder: Path, source: str | None) -> None:
        self.state = folder / "state.db"
        self.where = folder / "mnt"
        self.where.mkdir()
        dlmfs(
            "mount",
            source or f"local:{self.state}",
            str(self.where),
            "-o",
            "node=names,holder=file",
        )
        (self.where / "dom").mkdir()
        (self.where / "dom/there-before").touch()
        self.pid = json.loads(dlmfs("status", "--json", str(self.where)))[0]["pid"]

    def heads(self) -> int:
        if not self.state.exists():
            return -1
        with contextlib.closing(sqlite3.connect(f"file:{self.state}?mode=ro", uri=True)) as state:
            found = state.execute(
                "SELECT count(*) FROM kv WHERE key >= ? AND key < ?", (b"h/", b"h0")
            )
            return int(found.fetchone()[0])

    def settle(self) -> float:
        """Wait until the names are gone and the memory stands."""
        least, since = float("inf"), time.monotonic()
        while time.monotonic() < since + SETTLED_S:
            now = resident_mb(self.pid)
            if len(os.listdir(self.where / "dom")) > 1 or abs(now - least) > 0.1:
                least, since = now, time.monotonic()
            time.sleep(0.2)
        return resident_mb(self.pid)

    def tell(self, what: str) -> None:
        memory = self.settle()
        size = sum(f.stat().st_size for f in self.state.parent.glob("state.db*") if f.is_file())
        print(
            f"{what:<24} memory {memory:6.1f} MB  files {len(os.listdir(self.where / 'dom'))}  "
            f"heads {self.heads()}  state {size / 1e6:5.1f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--names", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--source")
    parsed = parser.parse_args()
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(dir=base))
    try:
        bench = Bench(folder, parsed.source)
        bench.tell("before")
        for number in range(parsed.rounds):
            begun = time.monotonic()
            use(bench.where, number * parsed.names, parsed.names)
            rate = parsed.names / (time.monotonic() - begun)
            most = resident_mb(bench.pid)
            bench.tell(f"after {(number + 1) * parsed.names} names")
            print(f"  {rate:.0f} names a second; {most:.1f} MB at the end of them", flush=True)
    finally:
        dlmfs("umount", "--lazy", str(folder / "mnt"))
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
