"""Whether a SOURCE that need not be mounted can be: its state file, or its etcd cluster.

Nothing is left there: a state file is opened for reading, and in etcd a lease is granted and revoked.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dlmfs.cli.checks import host
from dlmfs.cli.checks.finding import Finding, fail, ok, warn
from dlmfs.cli.checks.mounted import latency
from dlmfs.config import EtcdSource, LocalSource, MountOptions
from dlmfs.errors import DlmfsError
from dlmfs.proc import is_stopped
from dlmfs.store import schema, statefile
from dlmfs.store.lives import Lives

if TYPE_CHECKING:
    from dlmfs.store.etcd.rpc import Access

TIMEOUT_S: Final = 3.0
TIMES: Final = 3
"""How often each endpoint is asked: the slowest answer counts."""
PAGE: Final = 1000
"""Records read at once."""
SIZE_MB: Final = 1500.0
"""etcd refuses writes at 2 GB by default."""


# -- the embedded engine ---------------------------------------------------------------------------


def check_local(source: LocalSource) -> Iterator[Finding]:
    path = source.path or statefile.default_path(source.name)
    folder = host.state_folder(path, default=source.path is None)
    yield folder
    if folder.level == "fail":
        return
    if not path.exists():
        yield ok("state", f"{path} is made by the first mount")
        return
    try:
        sessions = _sessions(path)
    except sqlite3.Error as error:
        yield fail("state", f"{path} cannot be read: {error}", "move it away, or name another file")
        return
    if sessions is None:
        yield fail(
            "state", f"{path} is no state file of this version of dlmfs", "name another file"
        )
        return
    info = path.stat()
    if info.st_mode & 0o077:
        yield warn("state", f"{path} can be read or written by others", f"chmod 600 {path}")
    yield ok("state", f"{path}: {info.st_size / 1e6:.1f} MB, {len(sessions)} nodes")
    yield from _nodes(path, sessions)


def _nodes(path: Path, sessions: list[tuple[int, str, int]]) -> Iterator[Finding]:
    try:
        lives = Lives.look(path)
    except OSError as error:
        if sessions:
            yield warn(
                "nodes",
                f"{path}.d, where {len(sessions)} nodes prove that they live: {error.strerror}",
                "nothing to do: the next mount makes it anew",
            )
        return
    with contextlib.closing(lives):
        for session in sessions:
            yield _node(lives, *session)


def _node(lives: Lives, lease: int, node: str, pid: int) -> Finding:
    if not lives.alive(lease, pid):
        return warn(
            "nodes",
            f"node {node} (pid {pid}) is dead, and no other node was there to see it",
            "nothing to do: the next mount ends it; the name may be taken at once",
        )
    if is_stopped(pid):
        return fail(
            "nodes",
            f"node {node} (pid {pid}) is stopped: it keeps its locks",
            f"kill -CONT {pid}",
        )
    return ok("nodes", f"the name {node} is in use by pid {pid}")


def _sessions(path: Path) -> list[tuple[int, str, int]] | None:
    """The sessions on record; None: not a file of ours. Raises sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(statefile.uri(path, "ro"), uri=True)) as conn:
        application = conn.execute("PRAGMA application_id").fetchone()[0]
        version = conn.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) != (schema.APPLICATION_ID, schema.FORMAT):
            return None
        return schema.sessions(conn)


# -- etcd ------------------------------------------------------------------------------------------


def check_etcd(source: EtcdSource, options: MountOptions) -> Iterator[Finding]:
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
            "etcd",
            f"what is said to etcd is not encrypted{what}",
            "-o ca=FILE, on a network you do not own",
        )
    yield from asyncio.run(_etcd(found, source.cluster, options.ttl_s))


async def _etcd(access: Access, cluster: str, ttl_s: float) -> list[Finding]:
    findings: list[Finding] = []
    clusters: dict[int, str] = {}
    reached = []
    for endpoint in access.endpoints:
        status = await _endpoint(access, endpoint, ttl_s, findings)
        if status is not None:
            clusters.setdefault(status.header.cluster_id, endpoint)
            reached.append(endpoint)
    if len(clusters) > 1:
        findings.append(
            fail(
                "etcd",
                f"{' and '.join(clusters.values())} are of different clusters",
                "name the members of one cluster only",
            )
        )
    if not reached:
        return findings
    if len(reached) < len(access.endpoints) / 2 + 0.5 and len(access.endpoints) > 2:
        findings.append(fail("etcd", "a majority cannot be reached", "start the other members"))
    with contextlib.suppress(DlmfsError):
        findings += await _names(access, reached[0], cluster)
    return findings


async def _endpoint(access: Access, endpoint: str, ttl_s: float, findings: list[Finding]) -> Any:
    """One member by itself; its status if it can be reached."""
    import dataclasses
    import logging

    from dlmfs.store.etcd import etcd_pb2 as pb
    from dlmfs.store.etcd.about import unsound
    from dlmfs.store.etcd.rpc import GRANT, REVOKE, STATUS, Rpc

    logging.getLogger("dlmfs.etcd").setLevel(logging.CRITICAL)
    about = f"etcd {endpoint}"
    rpc = Rpc(
        asyncio.get_running_loop(), dataclasses.replace(access, endpoints=(endpoint,)), _ignore
    )
    slowest = 0.0
    try:
        status = await rpc.call(STATUS, pb.StatusRequest(), TIMEOUT_S)
        for _ in range(TIMES):
            start = time.monotonic()
            lease = await rpc.call(GRANT, pb.LeaseGrantRequest(ttl=int(ttl_s)), TIMEOUT_S)
            slowest = max(slowest, time.monotonic() - start)
            await rpc.call(REVOKE, pb.LeaseRevokeRequest(id=lease.id), TIMEOUT_S)
    except DlmfsError as error:
        mend = "start it, or see its log, its listen-client-urls and the firewall"
        findings.append(fail(about, str(error), mend))
        return None
    finally:
        await rpc.close()
    findings.append(ok(about, f"version {status.version}, {status.db_size / 1e6:.0f} MB"))
    if warning := unsound(status.version):
        findings.append(warn(about, warning, "upgrade it to 3.4.38, 3.5.23, 3.6.5 or later"))
    if not status.leader:
        findings.append(fail(about, "it has no leader", "start the other members"))
    findings += [
        fail(about, error, "etcdctl alarm list; compact and defragment") for error in status.errors
    ]
    if status.db_size > SIZE_MB * 1e6:
        findings.append(warn(about, "its database is large", "etcdctl compact, etcdctl defrag"))
    findings.append(latency(about, slowest * 1000, ttl_s))
    return status


async def _names(access: Access, endpoint: str, cluster: str) -> list[Finding]:
    """The node names in use in this lock space."""
    import dataclasses

    from dlmfs.engine.records import NODES, node_of
    from dlmfs.store.base import KeyValue, Range
    from dlmfs.store.etcd.codec import Codec
    from dlmfs.store.etcd.rpc import RANGE, Rpc

    rpc = Rpc(
        asyncio.get_running_loop(), dataclasses.replace(access, endpoints=(endpoint,)), _ignore
    )
    codec = Codec(f"dlmfs/{cluster}/".encode())
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
    return [ok("nodes", f"names in use in {cluster}: {' '.join(names) or 'none'}")]


def _ignore(_error: DlmfsError) -> None:
    """One look at a store has no past to compare with."""
