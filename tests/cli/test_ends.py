"""Two commands under `dlmfs lock` never overlap, however the daemon of the first one ends (embedded)."""

from __future__ import annotations

import json
import threading

import pytest

from tests.cli.ends import cases, ways
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import Nodes, dlmfs
from tests.robust.helpers import fusectl

nodes = _nodes
pytestmark = [pytest.mark.fuse, pytest.mark.root]


def test_promise_exclusion_of_commands_however_a_daemon_ends(nodes: Nodes) -> None:
    """With the defaults. Marked is what nobody saw closed."""
    with fusectl() as connections:
        ends = ways(nodes, connections)
        safe = nodes.mount("safe")
        victims = {name: nodes.mount(name) for name in ends}
        with cases(nodes, victims, safe) as made:
            threads = [
                threading.Thread(target=end, args=(victims[name], safe))
                for name, end in ends.items()
            ]
            for thread in threads:
                thread.start()
            for case in made:
                case.check()
                assert case.worker.over()[0] == 75
            for thread in threads:
                thread.join()
        for name in ends:
            info = json.loads(dlmfs("info", "--json", str(safe / f"dom/{name}-x")).stdout)
            marked = info["abandoned"] is not None
            assert marked == (name in ("kill", "force", "abort")), name
