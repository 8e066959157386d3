#!/usr/bin/env python3
"""Two nodes, many locks, random load: what grows? Memory and descriptors of both daemons.

bench/soak.py [--locks 100000] [--seconds 600] [--workers 4]

Every lock is first opened once on each node, so that the nodes know them all. Then workers on both
nodes open, write, read, try, convert, unlink and make again at random. The slope is a line
fitted to the second half of the samples: the first half also fills caches and the heap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DLMFS = [sys.executable, str(Path(__file__).resolve().parent.parent / "scripts" / "dlmfs")]
SAMPLE_S = 5.0


def dlmfs(*args: str) -> str:
    return subprocess.run([*DLMFS, *args], check=True, capture_output=True, text=True).stdout


def work(folder: Path, locks: int, until: float, seed: int) -> int:
    """One worker's random load; how many operations it made."""
    rng = random.Random(seed)
    count = 0
    while time.monotonic() < until:
        path = folder / f"{rng.randrange(locks)}"
        kind = rng.random()
        flags = os.O_CREAT | (os.O_RDWR if kind < 0.5 else os.O_RDONLY)
        if kind > 0.9:
            flags |= os.O_NONBLOCK
        try:
            if 0.85 < kind < 0.9:
                path.unlink()
            else:
                fd = os.open(path, flags)
                if kind < 0.1:
                    os.pwrite(fd, b"%063d" % count, 0)
                elif kind < 0.2:
                    os.pread(fd, 64, 0)
                os.close(fd)
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.strerror != "Text file busy":
                raise
        count += 1
    return count


def fill(folder: Path, locks: int) -> None:
    for number in range(locks):
        os.close(os.open(folder / f"{number}", os.O_RDWR | os.O_CREAT))


def run_all(jobs: list[list[str]]) -> list[str]:
    """Run this program several times at once; what each printed."""
    command = [sys.executable, __file__]
    children = [subprocess.Popen([*command, *job], stdout=subprocess.PIPE) for job in jobs]
    out = [child.communicate()[0].decode() for child in children]
    assert not any(child.returncode for child in children), "a worker failed"
    return out


def sample(pid: int) -> tuple[int, int]:
    """Resident KiB and open descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4, len(os.listdir(f"/proc/{pid}/fd"))


def slope(times: list[float], values: list[float]) -> float:
    """Per hour, over the second half."""
    half = len(times) // 2
    return statistics.linear_regression(times[half:], values[half:]).slope * 3600


def soak(base: Path, locks: int, seconds: float, workers: int) -> None:
    pids, folders = [], []
    with contextlib.ExitStack() as undo:
        for name in ("a", "b"):
            where = base / name
            where.mkdir()
            dlmfs("mount", f"local:{base}/state.db", str(where), "-o", f"node={name}")
            undo.callback(dlmfs, "umount", "--lazy", str(where))
            (where / "soak").mkdir()
            folders.append(where / "soak")
            pids.append(json.loads(dlmfs("status", "--json", str(where)))[0]["pid"])
        start = time.monotonic()
        for folder in folders:
            run_all([["--fill", str(folder), "--locks", str(locks)]])
        print(f"{locks} locks known to both nodes after {time.monotonic() - start:.0f} s")
        command = [sys.executable, __file__, "--locks", str(locks), "--seconds", str(seconds)]
        children = [
            subprocess.Popen(
                [*command, "--work", str(folders[i % 2]), "--seed", str(i)], stdout=subprocess.PIPE
            )
            for i in range(workers)
        ]
        times: list[float] = []
        seen: list[list[tuple[int, int]]] = []
        start = time.monotonic()
        while any(child.poll() is None for child in children):
            times.append(time.monotonic() - start)
            seen.append([sample(pid) for pid in pids])
            time.sleep(SAMPLE_S)
        count = sum(int(child.communicate()[0]) for child in children)
        print(f"{count} operations by {workers} workers in {times[-1]:.0f} s")
        for i, name in enumerate("ab"):
            memory, files = ([float(s[i][k]) for s in seen] for k in (0, 1))
            print(
                f"node {name}: memory {memory[0] / 1024:.1f} -> {memory[-1] / 1024:.1f} MiB, slope "
                f"{slope(times, memory) / 1024:+.2f} MiB an hour; descriptors {files[0]:.0f} -> "
                f"{files[-1]:.0f}, slope {slope(times, files):+.2f} an hour"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--locks", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(args.fill, args.locks)
        return
    if args.work:
        print(work(args.work, args.locks, time.monotonic() + args.seconds, args.seed))
        return
    base = Path(tempfile.mkdtemp(prefix="dlmfs-soak-", dir="/dev/shm"))
    try:
        soak(base, args.locks, args.seconds, args.workers)
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
