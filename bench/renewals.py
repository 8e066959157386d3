"""What renewals cost an etcd: 1,000 sessions that only read to confirm, or write as well.

    bench/renewals.py [--sessions N] [--ttl SECONDS] [--rounds N]

Every session renews each fifth of its lease time, as a node does: a keep-alive, then the reads that
confirm it; with `write`, a put of its own record after that. `stamp` is what dlmfs does: of all the
sessions together one put in that time (`engine/timeline.py`). Prints, for each way, commits and requests
a second, the server's share of a CPU, the latency of a renewal, and what a day of it adds to a database
that nobody compacts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

from dlmfs.errors import DlmfsError  # noqa: E402
from dlmfs.store.base import TIMELINE, Range  # noqa: E402
from dlmfs.store.etcd import etcd_pb2 as pb  # noqa: E402
from dlmfs.store.etcd.codec import Codec  # noqa: E402
from dlmfs.store.etcd.rpc import GRANT, KEEP_ALIVE, RANGE, STATUS, TXN, Access, Rpc  # noqa: E402
from etcd import server  # noqa: E402

CONNECTIONS = 20
WAYS = ("read", "stamp", "write")


@contextlib.contextmanager
def etcd() -> Iterator[tuple[str, int]]:
    """The endpoint and the process of a server whose data is in memory."""
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-bench-", dir="/dev/shm"))
    process, endpoint = server(folder)
    time.sleep(1.0)  # until it has elected itself
    try:
        yield endpoint, process.pid
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Session:
    def __init__(self, rpc: Rpc, number: int) -> None:
        self.rpc = rpc
        self.lease = number + 1
        self.key = b"bench!/%d" % number
        self.codec = Codec(b"bench/")

    async def begin(self, ttl_s: float) -> None:
        await self.rpc.call(GRANT, pb.LeaseGrantRequest(id=self.lease, ttl=int(ttl_s)), 10)
        await self.put(self.key)

    async def put(self, key: bytes) -> None:
        put = pb.PutRequest(key=key, value=b"{}", lease=self.lease)
        await self.rpc.call(TXN, pb.TxnRequest(success=[pb.RequestOp(request_put=put)]), 10)

    async def renew(self, *, write: bytes | None) -> None:
        stream = await self.rpc.stream(KEEP_ALIVE, 10)
        await stream.write(pb.LeaseKeepAliveRequest(id=self.lease))
        await stream.read()
        stream.cancel()
        await self.rpc.call(RANGE, pb.RangeRequest(key=self.key), 10)
        await self.rpc.call(RANGE, self.codec.read(Range(TIMELINE)), 10)
        if write is not None:
            await self.put(write)


async def measure(way: str, sessions: list[Session], every_s: float, rounds: int, pid: int) -> None:
    took: list[float] = []

    async def one(number: int, session: Session) -> None:
        await asyncio.sleep(every_s * number / len(sessions))
        due = time.monotonic()
        for _ in range(rounds):
            write = {"read": None, "write": session.key, "stamp": b"bench/t/stamp"}[way]
            if way == "stamp" and number:
                write = None
            begun = time.monotonic()
            await session.renew(write=write)
            took.append(time.monotonic() - begun)
            due += every_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    rpc = sessions[0].rpc
    before = await rpc.call(STATUS, pb.StatusRequest(), 10)
    begun, used = time.monotonic(), cpu_s(pid)
    await asyncio.gather(*(one(n, s) for n, s in enumerate(sessions)))
    wall, used = time.monotonic() - begun, cpu_s(pid) - used
    after = await rpc.call(STATUS, pb.StatusRequest(), 10)
    commits = after.header.revision - before.header.revision
    grown = max(after.db_size - before.db_size, 0)
    took.sort()
    print(
        f"{way:6} {commits / wall:7.1f} commits/s  {len(took) / wall:6.0f} renewals/s  "
        f"server {100 * used / wall:5.1f} % of a CPU  renewal p50 {1000 * took[len(took) // 2]:5.1f} ms  "
        f"p99 {1000 * took[len(took) * 99 // 100]:6.1f} ms  {grown / wall * 86400 / 1e6:7.0f} MB a day",
        flush=True,
    )


async def run(args: argparse.Namespace) -> None:
    with etcd() as (endpoint, pid):
        loop = asyncio.get_running_loop()

        def lost(error: DlmfsError) -> None:
            raise error

        rpcs = [Rpc(loop, Access((endpoint,)), lost) for _ in range(CONNECTIONS)]
        sessions = [Session(rpcs[n % CONNECTIONS], n) for n in range(args.sessions)]
        for start in range(0, len(sessions), 100):
            await asyncio.gather(
                *(s.begin(max(args.ttl, 3600)) for s in sessions[start : start + 100])
            )
        for way in WAYS:
            await measure(way, sessions, args.ttl / 5, args.rounds, pid)
        for rpc in rpcs:
            await rpc.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--ttl", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=8)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
