#!/usr/bin/env python3
"""How long until a dead node's lock is somebody else's, on etcd; and what is left behind there.

bench/takeover.py [--trials 50] [--ttl 5]

Ten nodes at a time take a lock each and are killed with SIGKILL; one survivor waits for all ten.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from etcd import dlmfs, server  # noqa: E402

ROUND = 10


def take(path: Path, killed: float, took: list[float]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    took.append(time.monotonic() - killed)
    os.close(fd)


def one_round(endpoint: str, folder: Path, survivor: Path, ttl: int) -> list[float]:
    """Kill ten holders at random points of their renewal; the seconds until each lock was free."""
    with contextlib.ExitStack() as undo:
        victims = []
        for number in range(ROUND):
            where = folder / f"v{number}"
            where.mkdir(exist_ok=True)
            options = f"node=v{number},ttl={ttl}"
            dlmfs("mount", f"etcd://{endpoint}/takeover", str(where), "-o", options)
            undo.callback(dlmfs, "umount", str(where))
            (where / "d").mkdir()
            fd = os.open(where / "d" / f"l{number}", os.O_RDWR | os.O_CREAT)
            undo.callback(os.close, fd)
            (status,) = json.loads(dlmfs("status", "--json", str(where)))
            victims.append(int(status["pid"]))
        took: list[float] = []
        waiting = []
        for number, pid in enumerate(victims):
            os.kill(pid, signal.SIGKILL)
            path = survivor / "d" / f"l{number}"
            args = (path, time.monotonic(), took)
            waiting.append(threading.Thread(target=take, args=args))
            waiting[-1].start()
            time.sleep(0.1)
        for thread in waiting:
            thread.join()
    return took


def keys(endpoint: str) -> int:
    program = Path(sys.executable).with_name("etcdctl")
    command = [program, "--endpoints", endpoint, "get", "", "--prefix", "--keys-only"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return len(done.stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--ttl", type=int, default=5)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-bench-"))
    process = None
    try:
        process, endpoint = server(folder)
        before = keys(endpoint)
        survivor = folder / "survivor"
        survivor.mkdir()
        dlmfs("mount", f"etcd://{endpoint}/takeover", str(survivor), "-o", "node=s")
        (survivor / "d").mkdir()
        took: list[float] = []
        try:
            while len(took) < args.trials:
                took += one_round(endpoint, folder, survivor, args.ttl)
            for path in (survivor / "d").iterdir():
                with path.open("r+b", buffering=0) as file:
                    file.write(b"seen")  # the mark of the death is gone
                path.unlink()
            (survivor / "d").rmdir()
        finally:
            dlmfs("umount", "--lazy", str(survivor))
        took.sort()
        print(
            f"{len(took)} takeovers after SIGKILL, lease time {args.ttl} s: median "
            f"{statistics.median(took):.2f} s, least {took[0]:.2f} s, most {took[-1]:.2f} s"
        )
        print(f"keys in etcd: {before} before, {keys(endpoint)} after")
    finally:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
