"""Programs at work on three nodes and three members, all of which are being killed, stopped and cut
off; in the end nothing that was acknowledged is lost, and everybody goes on.

DLMFS_LONG=1: for ten minutes. DLMFS_SEED: another order of faults.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.etcd import history
from tests.etcd.mounts import EtcdNodes, errno_of, until
from tests.etcd.net import Net, Wire
from tests.etcd.server import PATIENCE_S, Etcd
from tests.etcd.worker import parse

pytestmark = [pytest.mark.fuse, pytest.mark.root]

WORK_S = 600.0 if os.environ.get("DLMFS_LONG") else 15.0
SEED = os.environ.get("DLMFS_SEED", "1")
WORKERS = {"a": ("file", 2), "b": ("node", 1), "c": ("file", 2)}
"""The nodes, whose locks are the node's or a file's, with so many programs."""


def join(where: Path) -> bool:
    """A cluster that has just begun may not answer in time (ENOLCK)."""
    try:
        (where / "dom").mkdir(exist_ok=True)
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
        return False
    return True


class Site:
    """The cluster at work."""

    def __init__(self, nodes: EtcdNodes, net: Net, folder: Path) -> None:
        self.nodes = nodes
        self.etcd = nodes.etcd
        self.net = net
        self.folder = folder
        self.wires: dict[str, Wire] = {name: net.wire() for name in WORKERS}
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.random = random.Random(SEED)
        self.told: list[str] = []
        for name in WORKERS:
            self.mount(name)
        for name, (_, count) in WORKERS.items():
            for _ in range(count):
                self.employ(name, len(self.workers))

    def mount(self, name: str) -> None:
        owner = f"holder={WORKERS[name][0]}"
        where = self.nodes.mount(name, owner, enter=self.wires[name].node.enter)
        until(lambda: join(where), "the domain is joined")

    def employ(self, name: str, number: int) -> None:
        lock = self.nodes.folder / name / "dom/n"
        program = str(Path(__file__).with_name("worker.py"))
        worker = subprocess.Popen(
            [sys.executable, "-I", program, str(lock), str(self.folder), str(number)]
        )
        self.workers[number] = worker
        self.nodes.children.append(worker)

    def node_of(self, number: int) -> str:
        return [name for name, (_, count) in WORKERS.items() for _ in range(count)][number]

    # -- faults: each a context, in which it stands -------------------------------------------------

    @contextlib.contextmanager
    def member_killed(self) -> Iterator[None]:
        member = self.random.choice(self.etcd.members)
        self.told.append(member.name)
        member.kill()
        yield
        self.etcd.start()

    @contextlib.contextmanager
    def leader_killed(self) -> Iterator[None]:
        self.etcd.leader().kill()
        yield
        self.etcd.start()

    @contextlib.contextmanager
    def leader_stopped(self) -> Iterator[None]:
        leader = self.etcd.leader()
        leader.stop()
        yield
        leader.cont()

    @contextlib.contextmanager
    def all_members_stopped(self) -> Iterator[None]:
        for member in self.etcd.members:
            member.stop()
        yield
        for member in self.etcd.members:
            member.cont()

    @contextlib.contextmanager
    def node_cut_off(self) -> Iterator[None]:
        name = self.random.choice(list(WORKERS))
        way = self.random.choice(({}, {"to_server": False}, {"from_server": False}))
        self.told.append(f"{name} {way}")
        self.wires[name].cut(**way)
        yield
        self.wires[name].heal()

    @contextlib.contextmanager
    def daemon_stopped(self) -> Iterator[None]:
        where = self.nodes.folder / self.random.choice(list(WORKERS))
        self.told.append(where.name)
        self.nodes.stop(where)
        yield
        self.nodes.cont(where)

    @contextlib.contextmanager
    def daemon_killed(self) -> Iterator[None]:
        name = self.random.choice(list(WORKERS))
        self.told.append(name)
        self.nodes.kill(self.nodes.folder / name)
        yield
        self.mount(name)

    @contextlib.contextmanager
    def worker_killed(self) -> Iterator[None]:
        number = self.random.choice(list(self.workers))
        self.told.append(str(number))
        self.workers[number].kill()
        self.workers[number].wait(PATIENCE_S)
        yield
        self.employ(self.node_of(number), number)

    @contextlib.contextmanager
    def compacted(self) -> Iterator[None]:
        self.etcd.try_ctl("compact", str(self.etcd.revision()))
        yield

    def disturb(self) -> None:
        """One fault after the other until the time is over, now and then two at once."""
        faults: list[Callable[[], contextlib.AbstractContextManager[None]]] = [
            *(self.member_killed, self.leader_killed, self.leader_stopped),
            *(self.all_members_stopped, self.node_cut_off, self.daemon_stopped),
            *(self.daemon_killed, self.worker_killed, self.compacted),
        ]
        store = faults[:4]
        end = time.monotonic() + WORK_S
        while time.monotonic() < end:
            self.random.shuffle(faults)
            for fault in faults:
                if time.monotonic() > end:
                    return
                with contextlib.ExitStack() as stack:
                    self.told.append(fault.__name__)
                    stack.enter_context(fault())
                    second = self.random.choice((self.node_cut_off, self.daemon_stopped))
                    if fault in store and self.random.random() < 0.3:
                        self.told.append(second.__name__)
                        stack.enter_context(second())
                    time.sleep(self.random.choice((0.3, 1.0, 2.0, 4.5)))

    # -- the end ------------------------------------------------------------------------------------

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def everybody_counts_again(self) -> None:
        """All waiters are granted: each worker has counted since now."""
        now = time.monotonic()

        def counted() -> bool:
            found = history.load(self.logs()).acknowledged
            return len({a.worker for a in found if a.granted > now}) == len(self.workers)

        until(counted, f"not everybody goes on after {self.told}")

    def end(self) -> None:
        (self.folder / "stop").touch()
        for worker in self.workers.values():
            assert worker.wait(PATIENCE_S) == 0

    def final(self) -> tuple[int, int]:
        """Every node says the same."""
        found = set()
        for name in WORKERS:
            where = self.nodes.folder / name
            fd = os.open(where / "dom/n", os.O_RDONLY)
            found.add(parse(os.pread(fd, 64, 0)))
            os.close(fd)
        (one,) = found
        return one


@pytest.mark.timeout(WORK_S + 150)
def test_a_counter_under_faults(net: Net, folder: Path, start: Callable[..., EtcdNodes]) -> None:
    hosts = [net.address(number) for number in range(3)]
    etcd = Etcd(folder, hosts=hosts, enter=net.hub.enter)
    work = folder / "work"
    work.mkdir()
    site = Site(start(etcd), net, work)
    site.everybody_counts_again()
    site.disturb()
    site.everybody_counts_again()
    site.end()
    final = site.final()
    told = history.load(site.logs())
    accepted = [
        (int(token), int(count))
        for token, count in (line.split() for line in (work / "register").read_text().splitlines())
    ]
    faults = history.faults(told, accepted, final)
    assert not faults, (faults[:10], site.told)
    assert len(told.acknowledged) > 20, "hardly anything was done"
    for name in WORKERS:
        assert errno_of(site.nodes.folder / name / "dom/other") == 0
