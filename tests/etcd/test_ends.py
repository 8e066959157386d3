"""Two commands under `dlmfs lock` never overlap, however the daemon of the first one ends (etcd)."""

from __future__ import annotations

import pytest

from tests.cli.ends import STOPPED, overlap_nowhere, ways
from tests.etcd.mounts import EtcdNodes
from tests.robust.helpers import fusectl

pytestmark = [pytest.mark.fuse, pytest.mark.root]


def test_promise_exclusion_of_commands_however_a_daemon_ends(nodes: EtcdNodes) -> None:
    """The shortest lease time; all else as by default. SIGINT and SIGHUP are SIGTERM, and a mount torn
    away is an aborted connection, on either engine."""
    safe = nodes.mount("safe")
    with fusectl() as connections:
        every = ways(nodes, connections)
        ends = {
            name: every[name] for name in ("term", "abort", "evict", "frozen", f"kill-{STOPPED}")
        }
        overlap_nowhere(nodes, ends, safe)
