#!/usr/bin/env python3
"""How long each question stops a daemon's event loop, at many locks: see README.md.

PYTHONPATH=src bench/stalls.py [--locks N]

A node in this process, with a real mount and store; a tick of its event loop, each millisecond, tells
the longest time for which it did not come round: in CPU time of the loop's thread, so that it does not
matter what else the machine does. The garbage collector's time is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlmfs.config import MountConfig, parse_options, parse_source
from dlmfs.control import control_path
from dlmfs.core.events import Claim, Stage
from dlmfs.fs.tree import Directory
from dlmfs.fuse import mount
from dlmfs.model import Mode
from dlmfs.node import Node

ASKER = 54321
QUESTIONS: tuple[dict[str, object], ...] = (
    {"cmd": "status"},
    {"cmd": "top"},
    {"cmd": "top", "idle": True, "filter": "k09"},
    {"cmd": "info", "domain": "dom", "lock": "crowd"},
    {"cmd": "why", "domain": "dom", "lock": "crowd"},
    {"cmd": "nodes"},
    {"cmd": "health"},
    {"cmd": "remove-domain", "domain": "gone"},
)
TICK_S = 0.001


class Ticks:
    """The most that the event loop's thread worked between two ticks, without the garbage collector."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.longest = self.collecting = 0.0
        self._collected = self._began = 0.0
        self._thread = threading.get_ident()
        gc.callbacks.append(self._collect)
        self._last = time.thread_time()
        self._tick()

    def _collect(self, phase: str, _info: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._began = time.thread_time()
        else:
            took = time.thread_time() - self._began
            self._collected += took
            self.collecting = max(self.collecting, took)

    def _tick(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._last - self._collected)
        self._last, self._collected = now, 0.0
        self.loop.call_later(TICK_S, self._tick)

    def reset(self) -> None:
        self.longest = self.collecting = 0.0


def fill(node: Node, locks: int) -> None:
    """So many locks, a tenth of them held; one that a tenth as many hold."""
    (space,) = node.membership.spaces.values()
    folder = node.fs.tree.root.children[b"dom"]
    assert isinstance(folder, Directory)
    for number in range(locks):
        name = b"k%07d" % number
        node.fs.tree.add(folder, name, stat.S_IFREG | 0o644, ASKER, 0)
        lock = space.lock(name)
        if number % 10 == 0:
            lock.res.holders[number] = holder(number)
    node.fs.tree.add(folder, b"crowd", stat.S_IFREG | 0o644, 0, 0)
    space.lock(b"crowd").res.holders.update((n, holder(n)) for n in range(locks // 10))
    gc.collect()


def records(state: Path, locks: int) -> None:
    import sqlite3

    conn = sqlite3.connect(state)
    value = b'{"v":1,"m":{"x":[1,2,1]},"lvb":"","ab":["x",1]}'
    with conn:
        for domain, count in (("dom", locks), ("gone", 5000)):
            rows = [(f"h/{domain}/k{n:07}".encode(), value) for n in range(count)]
            conn.executemany("INSERT INTO kv VALUES (?, ?, 1, 1, 0)", rows)
    conn.close()


def holder(number: int) -> Claim:
    claim = Claim(number, Mode.PR, pid=os.getpid())
    claim.stage, claim.token = Stage.HELD, 7
    return claim


def ask(path: Path, question: dict[str, object], uid: int) -> tuple[float, int]:
    """In a thread: seconds and bytes of the answer."""
    begun = time.perf_counter()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path)) if uid == 0 else connect_as(sock, path, uid)
        sock.sendall(json.dumps(question).encode() + b"\n")
        size = 0
        while some := sock.recv(1 << 20):
            if not size and some.startswith(b'{"error"'):
                print(some.decode().rstrip())
            size += len(some)
    return time.perf_counter() - begun, size


def connect_as(sock: socket.socket, path: Path, uid: int) -> None:
    os.seteuid(uid)
    try:
        sock.connect(str(path))
    finally:
        os.seteuid(0)


async def measure(node: Node, where: str, locks: int) -> None:
    await asyncio.to_thread(os.mkdir, f"{where}/dom")
    fill(node, locks)
    records(Path(where).parent / "state.db", locks)
    entry = mount.find(where)
    assert entry is not None
    path = control_path(entry)
    ticks = Ticks(asyncio.get_running_loop())
    await asyncio.sleep(1)
    print(
        f"{locks} locks, {locks // 10} of them held; the loop at rest: {ticks.longest * 1e3:.1f} ms"
    )
    print(f"{'question':44} {'asker':6} {'stall ms':>9} {'gc ms':>7} {'whole s':>8} {'bytes':>9}")
    for question in QUESTIONS:
        for who, uid in (("root", 0), ("user", ASKER)):
            stalls, collects, wholes, size = [], [], [], 0
            for _ in range(3):
                ticks.reset()
                took, size = await asyncio.to_thread(ask, path, question, uid)
                stalls.append(ticks.longest)
                collects.append(ticks.collecting)
                wholes.append(took)
            print(
                f"{json.dumps(question):44} {who:6} {max(stalls) * 1e3:9.1f} {max(collects) * 1e3:7.1f} "
                f"{min(wholes):8.2f} {size:9}"
            )
    for space in node.membership.spaces.values():
        space.locks.clear()


@contextlib.contextmanager
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-bench-", dir="/dev/shm"))
    (folder / "mnt").mkdir()
    try:
        yield folder
    finally:
        for entry in mount.mounts():
            if entry.mountpoint == str(folder / "mnt"):
                mount.unmount(entry.mountpoint, lazy=True)
        shutil.rmtree(folder, ignore_errors=True)


async def life(folder: Path, locks: int) -> None:
    source, where = f"local:{folder}/state.db", str(folder / "mnt")
    node = Node(MountConfig(source, parse_source(source), where, parse_options(["node=x"])))
    told: list[asyncio.Future[Any]] = []

    async def tell() -> None:
        try:
            await measure(node, where, locks)
        finally:
            await asyncio.to_thread(mount.unmount, where, lazy=True)

    await node.run(lambda: told.append(asyncio.ensure_future(tell())))
    await told[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--locks", type=int, default=100_000)
    parsed = parser.parse_args()
    threading.current_thread().name = "bench"
    with place() as folder:
        asyncio.run(life(folder, parsed.locks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
