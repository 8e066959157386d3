"""Names that are used once leave no key in etcd, whichever node used them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.etcd.mounts import EtcdNodes, put, until

pytestmark = pytest.mark.fuse


def test_names_that_are_used_once_leave_no_key(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()

    put(a / "dom/valued", b"kept")  # a plain file

    def use(where: Path, name: str) -> None:
        os.close(os.open(where / "dom" / name, os.O_RDWR | os.O_CREAT, 0o1644))

    for number in range(20):
        for where in (a, b):
            use(where, f"job-{number}")
    for where, left in ((a, ["valued"]), (b, [])):
        until(lambda where=where, left=left: os.listdir(where / "dom") == left)  # type: ignore[misc]
    until(lambda: not any("job-" in key for key in nodes.all_keys()))
