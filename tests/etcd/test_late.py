"""Mounting while the store is not there yet: at boot, after a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from dlmfs import proc
from tests.etcd.mounts import EtcdNodes, errno_of, take, until
from tests.etcd.server import Etcd, running, scratch
from tests.fs.nodes import DLMFS, dlmfs

pytestmark = pytest.mark.fuse

PATIENCE_S: Final = 60


class Mounting:
    """`dlmfs mount` at work, and what it has said."""

    def __init__(self, source: str, where: Path, *options: str) -> None:
        where.mkdir(exist_ok=True)
        command = [*DLMFS, "mount", source, str(where), "-o", ",".join(["ttl=5", *options])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said = ""

    def until_it_waits(self) -> None:
        assert self.process.stderr is not None
        while "waiting for the store" not in self.said:
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line

    def children(self) -> list[int]:
        return list(proc.children(self.process.pid, self.process.pid) or ())

    def end(self) -> int:
        self.said += self.process.communicate(timeout=PATIENCE_S)[1]
        return self.process.returncode


@pytest.fixture
def late(folder: Path) -> Iterator[EtcdNodes]:
    """Nodes of an etcd that is not started yet."""
    etcd = Etcd(folder)
    with scratch() as path, closing(EtcdNodes(path, etcd)) as nodes:
        try:
            yield nodes
        finally:
            etcd.close()


def test_mounting_waits_for_the_store_and_says_so_once(late: EtcdNodes) -> None:
    where = late.folder / "a"
    late.mounts.append(where)
    mounting = Mounting(late.etcd.source(), where, "retry=600")
    mounting.until_it_waits()
    assert not where.is_mount()
    with running(late.etcd):
        assert mounting.end() == 0
        late.daemons[where] = late.pid(where)
        assert mounting.said.count("waiting for the store") == 1
        assert late.etcd.members[0].endpoint in mounting.said
        (where / "dom").mkdir()
        take(where / "dom/x")


def test_the_wait_is_as_long_as_asked_for(folder: Path) -> None:
    """A name that cannot be resolved yet is waited for, too."""
    mounting = Mounting("etcd://etcd.invalid:2379/x", folder / "a", "retry=1")
    assert mounting.end() == 32
    assert "waiting for the store, up to 1 s" in mounting.said
    assert not (folder / "a").is_mount()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 8), (signal.SIGTERM, -15)])
def test_who_gives_the_wait_up_gets_no_mount(
    late: EtcdNodes, number: signal.Signals, code: int
) -> None:
    where = late.folder / "a"
    mounting = Mounting(late.etcd.source(), where, "retry=600")
    mounting.until_it_waits()
    (child,) = mounting.children()
    handle = os.pidfd_open(child)
    try:
        mounting.process.send_signal(number)
        assert mounting.process.wait(PATIENCE_S) == code
        assert select.select([handle], [], [], PATIENCE_S)[0], "the daemon goes on"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
        mounting.end()
    assert not where.is_mount()


def test_bg_mounts_at_once_and_has_locks_when_the_store_is_there(late: EtcdNodes) -> None:
    """Not the folder below: a program that takes its lock too early is told so."""
    where = late.folder / "a"
    late.mounts.append(where)
    mounting = Mounting(late.etcd.source(), where, "bg")
    assert mounting.end() == 0
    assert "no lock can be had before it is there" in mounting.said
    assert where.is_mount()
    late.daemons[where] = late.pid(where)
    assert late.lease(where) == "REJOINING"
    assert "did not answer" in dlmfs("status", str(where)).stdout
    with pytest.raises(OSError, match="No locks available") as caught:
        (where / "dom").mkdir()
    assert caught.value.errno == errno.ENOLCK
    assert dlmfs("lock", "-n", str(where / "dom/x"), "--", "true", check=False).returncode == 69
    with running(late.etcd):
        until(lambda: late.is_healthy(where))
        (where / "dom").mkdir()
        assert errno_of(where / "dom/x") == 0
        late.umount(where)
        assert late.all_keys() == []


def test_bg_can_be_unmounted_before_the_store_is_there(late: EtcdNodes) -> None:
    where = late.folder / "a"
    late.mounts.append(where)
    assert Mounting(late.etcd.source(), where, "bg").end() == 0
    late.daemons[where] = late.pid(where)
    late.umount(where)
    assert not where.is_mount()
