"""A store that was restored from a copy: every node is fenced, none serves beside another, each says why
and comes back by itself, and tokens grow. Whatever its revisions say.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.etcd.mounts import EtcdNodes, gone, is_lost, put, take, until
from tests.etcd.server import Etcd
from tests.fs.nodes import ROOT, dlmfs

pytestmark = pytest.mark.fuse

Start = Callable[..., EtcdNodes]

LONG = "ttl=15"


@pytest.fixture(scope="session")
def etcdutl() -> Path:
    """One that can restore with larger revisions."""
    done = subprocess.run(
        [ROOT / "scripts" / "etcdutl"], capture_output=True, text=True, timeout=110, check=False
    )
    if done.returncode:
        if os.environ.get("DLMFS_NO_SKIP"):
            pytest.fail(done.stderr)
        pytest.skip(done.stderr.strip())
    return Path(done.stdout.strip())


def tenant_writes(etcd: Etcd, until_above: int) -> None:
    """Somebody else's puts, until the revision is larger than one of before."""
    member = etcd.members[0]
    body = json.dumps({"key": base64.b64encode(b"tenant").decode(), "value": ""}).encode()
    revision = 0
    while revision <= until_above:
        request = urllib.request.Request(f"http://{member.endpoint}/v3/kv/put", body)
        with urllib.request.urlopen(request, timeout=10) as answer:
            revision = int(json.load(answer)["header"]["revision"])


def token(path: Path) -> int:
    return int(os.getxattr(path, "user.dlmfs.token"))


class Story:
    """Two nodes, or more; a copy of the store; then a lock and a value that the copy has not."""

    def __init__(self, nodes: EtcdNodes, *, others: int = 1) -> None:
        self.nodes, self.etcd = nodes, nodes.etcd
        self.a = nodes.mount("a")
        self.others = [nodes.mount(f"b{number}") for number in range(others)]
        self.all = [self.a, *self.others]
        for where in self.all:
            (where / "dom").mkdir()
            put(where / "dom" / where.name, b"")
        put(self.a / "dom/x", b"old")
        take(self.others[0] / "dom/x")
        self.copy = self.etcd.snapshot()
        self.fd = os.open(self.a / "dom/x", os.O_RDWR)
        assert os.pwrite(self.fd, b"precious", 0) == 8
        self.token = token(self.a / "dom/x")

    def until_all_know(self) -> None:
        """Until every node has seen a stamp that is younger than all this."""
        until(lambda: all(self._knows(where) for where in self.all))

    def _knows(self, where: Path) -> bool:
        status = self.nodes.status(where)
        return bool(status["lease"]["stamped"] > self.token >> 16)

    def each(self, true: Callable[[Path], bool], what: str) -> None:
        for where in self.all:
            until(lambda where=where: true(where), f"{where}: {what}")  # type: ignore[misc]

    def tells(self) -> None:
        """Who has the lock is told, and every node says why."""
        assert gone(self.fd)
        assert is_lost(self.fd)
        os.close(self.fd)
        self.each(lambda where: self.nodes.fences(where) == 1, "it is not fenced")
        for where in self.all:
            reason = str(self.nodes.status(where)["lease"]["reason"])
            assert "went back" in reason or "restored" in reason, reason
            assert reason in dlmfs("status", str(where)).stdout

    def ends_well(self, left: bytes) -> None:
        """All come back, and go on with what the copy has (`left`) and larger tokens."""
        self.each(self.nodes.is_healthy, "it stays away")
        last = self.token
        for where in reversed(self.all):
            take(where / "dom/x")
            fd = os.open(where / "dom/x", os.O_RDWR)
            assert os.pread(fd, 64, 0).rstrip(b"\0") == left
            assert token(where / "dom/x") > last, "a token went back"
            last = token(where / "dom/x")
            os.close(fd)
        self.each(lambda where: self.nodes.fences(where) == 1, "it was fenced again")
        assert self.etcd.leases()
        assert not [key for key in self.nodes.all_keys() if key.endswith("/t/quarantine")]


def test_restored_in_every_way(start: Start, folder: Path, etcdutl: Path) -> None:
    """All at once, for the sake of time: idle; written to by somebody else before any node can look, so
    that the revision is larger than any that they knew; with larger revisions, as etcd's documents
    advise, one member and three; and wiped."""
    ways = {"idle": 1, "written": 1, "bumped": 1, "three": 3, "wiped": 1}
    for way in ways:
        (folder / way).mkdir()
    stories = {
        way: Story(start(Etcd(folder / way, size)), others=2 if size > 1 else 1)
        for way, size in ways.items()
    }
    for story in stories.values():
        story.until_all_know()
    waiter = stories["idle"].nodes.hold(stories["idle"].others[0] / "dom/x")
    assert waiter.waits
    for way, story in stories.items():
        if way == "written":
            known = story.etcd.revision()
            for where in story.all:
                story.nodes.stop(where)
        story.etcd.restore(
            None if way == "wiped" else story.copy,
            bumped_by=etcdutl if way in ("bumped", "three") else None,
        )
        if way == "written":
            tenant_writes(story.etcd, until_above=known + 100)
            for where in story.all:
                story.nodes.cont(where)
    for story in stories.values():
        story.tells()
    assert waiter.wait() == f"error {errno.ENOLCK}"
    for way, story in stories.items():
        story.ends_well(b"" if way == "wiped" else b"old")
