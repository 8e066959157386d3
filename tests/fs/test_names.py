"""Names as long as on any Linux file system, on real mounts (the kernel's own rows: tests/kernel)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from pathlib import Path

import pytest

from tests.fs.nodes import Nodes, dlmfs
from tests.fs.test_limits import create, errno_of

pytestmark = pytest.mark.fuse

LONGEST = b"\xff" * 251 + b"a\n\x1b*"


def inside(mount: Path, name: bytes = LONGEST) -> bytes:
    return os.path.join(os.fsencode(mount), b"dom", name)


def test_the_longest_lock_is_held_handed_over_and_forgotten(nodes: Nodes) -> None:
    a, b = nodes.pair()
    fd = os.open(inside(a), os.O_RDWR | os.O_CREAT)
    os.write(fd, b"value")
    for command in ("why", "info"):
        told = dlmfs(command, "--json", os.fsdecode(inside(a)))
        assert json.loads(told.stdout)["lock"] == os.fsdecode(LONGEST)
    (domain,) = nodes.status(a)["domains"]
    assert [lock["name"] for lock in domain["locks"]] == [os.fsdecode(LONGEST)]
    for command in ("status", "top"):
        assert "\\xff" * 200 in dlmfs(command, str(a)).stdout
    taken = nodes.hold(Path(os.fsdecode(inside(b))))
    assert taken.waits
    os.close(fd)
    assert taken.wait() == "held"
    with open(f"/proc/{taken.process.pid}/fd/3", "rb") as file:
        assert file.read() == b"value".ljust(64, b"\0")
    taken.release()
    for mount in (a, b):
        assert os.listdir(os.fsencode(mount / "dom")) == [LONGEST]
        os.unlink(inside(mount))
        (mount / "dom").rmdir()


def test_names_that_are_too_long(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    assert os.statvfs(a).f_namemax == 255
    for name in (b"x" * 256, b"x" * 1000, b"$" * 256):
        assert errno_of(create, Path(os.fsdecode(inside(a, name)))) == errno.ENAMETOOLONG
        assert errno_of(os.stat, inside(a, name)) == errno.ENAMETOOLONG
        assert errno_of(os.unlink, inside(a, name)) == errno.ENAMETOOLONG
    assert errno_of(os.mkdir, a / ("d" * 256)) == errno.ENAMETOOLONG
    assert errno_of(os.mkdir, a / ("d" * 64)) == errno.EINVAL


def test_a_folder_full_of_long_names_is_read_whole(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    names = {(b"%d" % n).ljust(255, b"x") for n in range(100)}
    for name in names:
        os.mknod(inside(a, name))
    assert set(os.listdir(os.fsencode(a / "dom"))) == names


def test_what_people_name_locks_by(nodes: Nodes) -> None:
    a = nodes.mount("a")
    names = [
        str(uuid.uuid4()),
        hashlib.sha256(b"key").hexdigest(),
        "checkout-7d9f8c6b5-x2x9z.production.svc.cluster.local",
    ]
    for name in names:
        assert dlmfs("lock", f"{a}/jobs/{name}", "--", "true").returncode == 0
    assert set(os.listdir(a / "jobs")) == set(names)
    refused = dlmfs("lock", f"{a}/{'d' * 70}/x", "--", "true", check=False)
    assert refused.returncode == 64
    assert "the name of a domain has up to 63 bytes, this one has 70" in refused.stderr
