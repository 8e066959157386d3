"""Who counts as a holder's own process (engine rule 11): not who holds a namesake on another mount.

Two mounts give their files the same inode numbers and the same names below the mount. A process that
has the one open was taken for a holder of the other, and so passed the writer that waited there
(promise 5).
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes

pytestmark = pytest.mark.fuse

READER = """
import os, sys
first = os.open(sys.argv[1], os.O_RDONLY)
print("first", flush=True)
sys.stdin.readline()
second = os.open(sys.argv[2], os.O_RDONLY)
print("second", flush=True)
sys.stdin.read()
"""


class Reader:
    """A process that opens one file, and a second one when told."""

    def __init__(self, nodes: Nodes, first: Path, second: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", READER, str(first), str(second)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        nodes.children.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin: IO[bytes] = process.stdin
        self.stdout: IO[bytes] = process.stdout

    def says(self, what: bytes, within_s: float) -> bool:
        if not select.select([self.stdout], [], [], within_s)[0]:
            return False
        return self.stdout.readline().strip() == what

    def go_on(self) -> None:
        self.stdin.write(b"\n")
        self.stdin.flush()


def make(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT))


def test_who_holds_a_namesake_on_another_mount_is_no_kin(nodes: Nodes) -> None:
    a, b = nodes.pair()
    c = nodes.mount("c")
    (c / "dom").mkdir()
    for node in (a, b):
        make(node / "dom/x")
    assert (a / "dom/x").stat().st_ino == (b / "dom/x").stat().st_ino

    holder = nodes.hold(b / "dom/x", os.O_RDONLY)
    assert holder.wait() == "held"
    reader = Reader(nodes, a / "dom/x", b / "dom/x")
    assert reader.says(b"first", PATIENCE_S)
    writer = nodes.hold(c / "dom/x")
    assert writer.waits
    reader.go_on()
    assert not reader.says(b"second", 1.0), "a later reader passed the waiting writer"
