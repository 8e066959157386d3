"""Whether an etcd cluster that need not be mounted can be: each endpoint by itself.

Nothing is left there: a lease is granted and revoked, and what is put is put under a condition that never
holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from dlmfs.cli.certificates import ending, told
from dlmfs.cli.checks.finding import Finding, fail, ok, warn
from dlmfs.cli.checks.mounted import latency
from dlmfs.config import EtcdSource, MountOptions
from dlmfs.errors import DlmfsError, NotPermitted
from dlmfs.store.etcd.certificate import lifetime
from dlmfs.store.etcd.trouble import CURES, Kind, Trouble, kind_of

if TYPE_CHECKING:
    from dlmfs.store.etcd.rpc import Access, Rpc

TIMEOUT_S: Final = 3.0
TIMES: Final = 3
"""How often each endpoint is asked: the slowest answer counts."""
PAGE: Final = 1000
"""Records read at once."""
SIZE_MB: Final = 1500.0
"""etcd refuses writes at 2 GB by default."""


def check(source: EtcdSource, options: MountOptions) -> Iterator[Finding]:
    try:
        from dlmfs.store.etcd.access import access, is_here
    except ImportError:
        return  # the host's checks say what is missing
    try:
        found = access(source, options)
    except DlmfsError as error:
        yield fail("etcd", str(error), "see `dlmfs mount --help`, ca= cert= key= credentials=")
        return
    if found.ca is None and not all(map(is_here, found.endpoints)):
        what = ", the password with it" if found.user is not None else ""
        yield warn(
            "etcd-plain",
            "etcd",
            f"what is said to etcd is not encrypted{what}",
            "-o ca=FILE, on a network you do not own",
        )
    from dlmfs.store.etcd.store import certificates

    for says, over in told(certificates(found)):
        mend = "renew it: a mount reads its file again by itself"
        yield fail("etcd", says, mend) if over else warn("certificate", "etcd", says, mend)
    if options.ca is not None:
        yield from _presented(found.endpoints, options)
    yield from asyncio.run(_Check(found, source.cluster, options.ttl_s).run())


def _presented(endpoints: Sequence[str], options: MountOptions) -> Iterator[Finding]:
    """The servers' own certificates. One that is not accepted the look itself tells of."""
    from dlmfs.store.etcd.access import host_of

    for endpoint in endpoints:
        with contextlib.suppress(OSError, ValueError, IndexError):
            context = ssl.create_default_context(cafile=options.ca)
            if options.cert is not None:
                context.load_cert_chain(options.cert, options.key)
            host = host_of(endpoint)
            address = host, int(endpoint.rpartition(":")[2])
            with (
                socket.create_connection(address, TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as connection,
            ):
                der = connection.getpeercert(binary_form=True)
            if der and (said := ending("the server", lifetime(der), time.time())) is not None:
                yield warn("certificate", f"etcd {endpoint}", said[0], "renew it on that server")


class _Check:
    """The look at one cluster, from member to member."""

    def __init__(self, access: Access, cluster: str, ttl_s: float) -> None:
        logging.getLogger("dlmfs.etcd").setLevel(logging.CRITICAL)
        self.access = access
        self.cluster = cluster
        self.root = f"dlmfs/{cluster}/".encode()
        self.ttl_s = ttl_s
        self.findings: list[Finding] = []

    async def run(self) -> list[Finding]:
        clusters: dict[int, str] = {}
        reached = []
        endpoints = self.access.endpoints
        for endpoint in endpoints:
            found = await self._endpoint(endpoint)
            if found is not None:
                clusters.setdefault(found, endpoint)
                reached.append(endpoint)
        if len(clusters) > 1:
            self.findings.append(
                fail(
                    "etcd",
                    f"{' and '.join(clusters.values())} are of different clusters",
                    "name the members of one cluster only",
                )
            )
        if not reached:
            return self.findings
        if len(reached) < len(endpoints) / 2 + 0.5 and len(endpoints) > 2:
            self.findings.append(
                fail("etcd", "a majority cannot be reached", "start the other members")
            )
        with contextlib.suppress(DlmfsError):
            await self._names(reached[0])
        return self.findings

    def _rpc(self, endpoint: str) -> Rpc:
        from dlmfs.store.etcd.rpc import Rpc

        access = dataclasses.replace(self.access, endpoints=(endpoint,))
        return Rpc(asyncio.get_running_loop(), access, _ignore)

    async def _endpoint(self, endpoint: str) -> int | None:
        """One member by itself; the id of its cluster if it answers."""
        about, rpc, told = f"etcd {endpoint}", self._rpc(endpoint), set[Kind]()
        cluster = None
        try:
            cluster = await self._status(rpc, about, told)
            slowest = await self._write(rpc)
        except DlmfsError as error:
            kind = kind_of(str(error))
            if kind not in told:
                self.findings.append(fail(about, str(error), CURES[kind]))
            return cluster
        finally:
            await rpc.close()
        self.findings.append(latency(about, slowest * 1000, self.ttl_s))
        return cluster

    async def _status(self, rpc: Rpc, about: str, told: set[Kind]) -> int:
        """What it says of itself, and what is wrong with it by that; the id of its cluster. Raises
        DlmfsError."""
        from dlmfs.store.etcd import etcd_pb2 as pb
        from dlmfs.store.etcd.about import unsound
        from dlmfs.store.etcd.rpc import RANGE, STATUS

        try:
            status = await rpc.call(STATUS, pb.StatusRequest(), TIMEOUT_S)
        except NotPermitted:
            answer = await rpc.call(RANGE, pb.RangeRequest(key=self.root), TIMEOUT_S)
            self.findings.append(
                ok(about, "tells its version and its alarms to administrators only")
            )
            return int(answer.header.cluster_id)
        say = self.findings.append
        say(ok(about, f"version {status.version}, {status.db_size / 1e6:.0f} MB"))
        if warning := unsound(status.version):
            say(
                warn("etcd-version", about, warning, "upgrade it to 3.4.38, 3.5.23, 3.6.5 or later")
            )
        if not status.leader:
            say(fail(about, "it has no leader", "start the other members"))
        for error in status.errors:
            trouble = Trouble(kind_of(error), error.strip())
            told.add(trouble.kind)
            cure = CURES[trouble.kind] if trouble.kind is not Kind.SILENT else "see its log"
            say(fail(about, trouble.words(), cure))
        if status.db_size > SIZE_MB * 1e6:
            say(
                warn("etcd-size", about, "its database is large", "etcdctl compact, etcdctl defrag")
            )
        return int(status.header.cluster_id)

    async def _write(self, rpc: Rpc) -> float:
        """Whether it takes our writes; the slowest answer, in seconds. Raises DlmfsError."""
        from dlmfs.store.etcd import etcd_pb2 as pb
        from dlmfs.store.etcd.codec import never
        from dlmfs.store.etcd.rpc import GRANT, REVOKE, TXN

        slowest = 0.0
        for _ in range(TIMES):
            start = time.monotonic()
            lease = await rpc.call(GRANT, pb.LeaseGrantRequest(ttl=int(self.ttl_s)), TIMEOUT_S)
            slowest = max(slowest, time.monotonic() - start)
            await rpc.call(REVOKE, pb.LeaseRevokeRequest(id=lease.id), TIMEOUT_S)
        await rpc.call(TXN, never(self.root), TIMEOUT_S)
        return slowest

    async def _names(self, endpoint: str) -> None:
        """The node names in use in this lock space. Raises DlmfsError."""
        from dlmfs.engine.records import NODES, node_of
        from dlmfs.store.base import KeyValue, Range
        from dlmfs.store.etcd.codec import Codec
        from dlmfs.store.etcd.rpc import RANGE

        rpc, codec = self._rpc(endpoint), Codec(self.root)
        names: list[str] = []
        behind: bytes | None = b""
        try:
            while behind is not None:
                page = Range(NODES, behind, PAGE)
                answer = await rpc.call(RANGE, codec.read(page), TIMEOUT_S)
                found = codec.found(page, answer.kvs)
                assert isinstance(found, tuple)
                records = [kv for kv in found if isinstance(kv, KeyValue)]
                names += [name for kv in records if (name := node_of(kv.key)) is not None]
                behind = records[-1].key if len(records) == PAGE else None
        finally:
            await rpc.close()
        self.findings.append(
            ok("nodes", f"names in use in {self.cluster}: {' '.join(names) or 'none'}")
        )


def _ignore(_error: DlmfsError) -> None:
    """One look at a store has no past to compare with."""
