"""Two commands under `dlmfs lock` never overlap, however the daemon of the first one ends (embedded)."""

from __future__ import annotations

import json

import pytest

from tests.cli.ends import overlap_nowhere, ways
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import Nodes, dlmfs
from tests.robust.helpers import fusectl

nodes = _nodes
pytestmark = [pytest.mark.fuse, pytest.mark.root]


def test_promise_exclusion_of_commands_however_a_daemon_ends(nodes: Nodes) -> None:
    """With the defaults. Marked is what nobody saw closed."""
    safe = nodes.mount("safe")
    with fusectl() as connections:
        ends = ways(nodes, connections)
        overlap_nowhere(nodes, ends, safe)
    for name in ends:
        info = json.loads(dlmfs("info", "--json", str(safe / f"dom/{name}-x")).stdout)
        marked = info["abandoned"] is not None
        assert marked == name.startswith(("kill", "force", "abort", "frozen")), name
