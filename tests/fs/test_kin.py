"""Who counts as a holder's own process (engine rule 11): not who holds a namesake on another mount.

Two mounts give their files the same inode numbers and the same names below the mount. A process that
has the one open was taken for a holder of the other, and so passed the writer that waited there
(promise 5).
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from dlmfs import proc
from dlmfs.fs import kin
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


NESTED = """
import os, subprocess, sys
odd, path = os.fsencode(sys.argv[1]), sys.argv[2]
os.mkdir(odd)
subprocess.run([b"mount", b"-t", b"tmpfs", b"none", odd], check=True)
try:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.open(path, os.O_RDONLY | os.O_NONBLOCK)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.root
def test_a_mount_point_that_is_no_utf8_costs_nobody_anything(nodes: Nodes) -> None:
    """In the opener's own namespace, where anybody may mount what he likes. It was read as text, and the
    exception fenced the node."""
    where = nodes.mount("a", "holder=file")
    (where / "dom").mkdir()
    odd = str(nodes.folder / os.fsdecode(b"M\374ll"))
    command = ["unshare", "-m", sys.executable, "-I", "-c", NESTED, odd, str(where / "dom/x")]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
    assert int(done.stdout) == errno.ETXTBSY
    report = nodes.status(where)
    assert report["lease"]["state"] == "HEALTHY"
    assert report["faults"]["count"] == 0


PATH_ONLY = """
import os, sys
fd = os.open(sys.argv[1], os.O_PATH)
try:
    os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
    print(0)
except OSError as error:
    print(error.errno)
"""


def test_a_descriptor_of_a_path_alone_passes_no_waiting_writer(nodes: Nodes) -> None:
    """Readers that overlap, each with such a descriptor, kept a writer out for as long as they went on
    (promise 5)."""
    where = nodes.mount("a", "holder=file")
    (where / "dom").mkdir()
    reader = nodes.hold(where / "dom/x", os.O_RDONLY)
    assert reader.wait() == "held"
    writer = nodes.hold(where / "dom/x")
    assert writer.waits
    command = [sys.executable, "-I", "-c", PATH_ONLY, str(where / "dom/x")]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
    assert int(done.stdout) == errno.ETXTBSY


def test_a_file_counts_though_the_kernel_has_dropped_its_name(tmp_path: Path) -> None:
    """It drops the name of a forgotten file a little later, which may be the successor's by then."""
    me = os.getpid()
    with open(tmp_path / "lock", "w") as file:
        found = proc.open_file(me, file.fileno())
        assert found is not None
        device = proc.device_of(proc.mount_table(me), found.mount)
        assert device is not None
        (tmp_path / "lock").unlink()
        assert kin.has_open(me, found.ino, b"/lock", device)
        assert not kin.has_open(me, found.ino, b"/other", device)
