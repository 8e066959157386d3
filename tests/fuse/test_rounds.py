"""Mounting and unmounting again and again: what a round takes it gives back.

`DLMFS_LONG=1` makes more rounds of those that take longer.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from dlmfs import privileges, rundir, takedown
from dlmfs.config import MountConfig, parse_options, parse_source
from dlmfs.control import control_path
from dlmfs.control_server import ControlServer
from dlmfs.fuse import mount
from dlmfs.fuse.device import Device
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.node import Node
from tests.fs.nodes import Nodes, dlmfs
from tests.fuse.tiny import Tiny

pytestmark = [pytest.mark.fuse, pytest.mark.root]

LONG = bool(os.environ.get("DLMFS_LONG"))
WARM = 10
"""Rounds before the first look: what is made once, such as caches and pools, is no leak."""
GROWTH_KB = 8192
"""What the process may grow by over all rounds: 8 KiB in each would show."""
DEADLINE_S = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for state, mount point and temporary files; nothing stays mounted in it."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir=base))
    (path / "mnt").mkdir()
    try:
        yield path
    finally:
        for entry in mounted(path):
            mount.unmount(entry, lazy=True)
        shutil.rmtree(path, ignore_errors=True)


def mounted(folder: Path) -> list[str]:
    """The mounts below the folder, by the kernel's own list."""
    inside = (e.mountpoint for e in mount.mounts())
    return [m for m in inside if m.startswith(f"{folder}/")]


class Holdings:
    """What this process has of everything that a round could leave behind."""

    def __init__(self, folder: Path) -> None:
        gc.collect()
        self.fds = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors())
        self.threads = sorted(thread.name for thread in threading.enumerate())
        self.children = sorted(
            child
            for task in os.listdir("/proc/self/task")
            for child in Path(f"/proc/self/task/{task}/children").read_text().split()
        )
        self.mounts = mounted(folder)
        self.files = sorted(str(path) for path in folder.rglob("*"))
        self.objects = len(gc.get_objects())
        status = Path("/proc/self/status").read_text()
        self.rss_kb = int(status.split("VmRSS:")[1].split()[0])

    def counted(self) -> dict[str, object]:
        """All that must be the same after as before."""
        return {
            "descriptors": [kind_of(name) for name in self.fds],
            "threads": self.threads,
            "children": self.children,
            "mounts": self.mounts,
            "files": self.files,
        }


def descriptors() -> list[str]:
    """Those that are open, without the one that lists them."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def kind_of(name: str) -> str:
    """What a descriptor is, without a number that differs each time: socket:[123]."""
    return name.partition("[")[0]


def rounds(folder: Path, count: int, one: Callable[[], Awaitable[object]]) -> None:
    """Make `count` rounds; fail if anything is left of them."""

    def turn() -> None:
        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await one()

        asyncio.run(bounded())

    for _ in range(WARM):
        turn()
    before = Holdings(folder)
    for _ in range(count):
        turn()
    after = Holdings(folder)
    assert after.counted() == before.counted()
    assert after.objects - before.objects < count // 2
    assert after.rss_kb - before.rss_kb < GROWTH_KB


def test_a_thousand_mounts(folder: Path) -> None:
    """The mount and the device loop alone, with the thread that notifications have."""
    where = str(folder / "mnt")
    served = 0

    async def one() -> None:
        nonlocal served
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()
        ready: asyncio.Future[None] = loop.create_future()
        tiny = Tiny()
        device = Device(mount.mount("rounds", where, mount.MountFlags()), tiny, loop)
        tiny.device = device
        device.on_ready = lambda: ready.set_result(None)
        device.on_end = ended.set_result
        try:
            device.start()
            await ready
            if served % 10 == 0:  # a thread each time makes a round twice as long
                assert await asyncio.to_thread(use, where + "/now") == b"v" * 8
                device.invalidate_entry(1, b"now")
            served += 1
            mount.unmount(where)
            assert await ended == "unmounted"
        finally:
            device.close()
            for thread in threading.enumerate():
                if thread.name == "fuse-invalidate":
                    await asyncio.to_thread(thread.join, DEADLINE_S)

    rounds(folder, 1000, one)
    assert served == 1000 + WARM


def use(path: str) -> bytes:
    fd = os.open(path, os.O_RDWR)
    try:
        return os.read(fd, 8)
    finally:
        os.close(fd)


def test_whole_nodes_in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store, membership, file system, control socket: a domain is joined, a lock written."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    # The daemon is this very process, and other tests need root's rights.
    monkeypatch.setattr(privileges, "confine", lambda _kept: None)
    monkeypatch.setattr(takedown, "begin", lambda: None)  # nor is its process to end
    where = str(folder / "mnt")
    source = f"local:{folder}/state.db"
    config = MountConfig(source, parse_source(source), where, parse_options(["node=x"]))

    async def one() -> None:
        node = Node(config)
        using: list[asyncio.Future[None]] = []
        sockets: list[tuple[Path, object]] = []

        def ready() -> None:
            entry = mount.find(where)
            assert entry is not None
            path = control_path(entry)
            sockets.append((path, identity_of(path)))
            using.append(asyncio.ensure_future(asyncio.to_thread(lock_and_unmount, where)))

        await node.run(ready)
        await using[0]
        ((path, socket),) = sockets
        assert socket is not None
        assert identity_of(path) != socket

    rounds(folder, 1000 if LONG else 300, one)


def identity_of(path: Path) -> object:
    """Which file it is, or None: the name of a control socket soon belongs to another mount."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def lock_and_unmount(where: str) -> None:
    try:
        os.mkdir(where + "/dom")
        fd = os.open(where + "/dom/lock", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"value")
        os.close(fd)
    finally:
        mount.unmount(where, lazy=True)


def test_whole_daemons(folder: Path) -> None:
    """`dlmfs mount` and `dlmfs umount`: after each the daemon's process is gone."""
    nodes = Nodes(folder)
    before: dict[str, object] = {}
    try:
        for turn in range(50 if LONG else 5):
            where = nodes.mount("a")
            pid = nodes.pid(where)
            (where / "dom").mkdir()
            (where / "dom" / "lock").touch()
            entry = mount.find(str(where))
            assert entry is not None
            socket = identity_of(control_path(entry))
            assert socket is not None
            dlmfs("umount", str(where))
            assert not lives(pid)
            assert identity_of(control_path(entry)) != socket
            assert list(where.iterdir()) == []
            held = Holdings(folder).counted()
            before = held if turn == 0 else before
            assert held == before
    finally:
        nodes.close()


def lives(pid: int) -> bool:
    """Whether it runs: a process that nobody has waited for yet has ended all the same."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_the_next_mounts_control_socket_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device number is free as soon as the mount is gone, which is before its daemon has ended:
    by then the socket of that name may be the next daemon's."""
    monkeypatch.setattr(rundir, "make_folder", lambda *_, **_settle: str(tmp_path))
    entry = MountEntry(1, 0, "/mnt", "local", "fuse.dlmfs", "0:40", (), ())

    async def overlap() -> bool:
        old = ControlServer(entry, {}, allow_other=False)
        new = ControlServer(entry, {}, allow_other=False)
        await old.start()
        await new.start()
        await old.close()
        try:
            return new.path.exists()
        finally:
            await new.close()

    assert asyncio.run(overlap())
