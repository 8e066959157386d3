"""Daemons killed at random points of their work: nobody else notices more than a hand-over.

Both nodes work all the time: a counter in a lock's value, domains and files that come and go. The
kill comes after a random number of increments, while those go on, so at no particular point.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from tests.fs.nodes import Nodes
from tests.robust.helpers import GONE, LONG, Worker, kill, remount, sound, wanted

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600 if LONG else 120)]

KILLS = 100 if LONG else 7
"""For each of the two holder rules."""

COUNT = """
import os, sys
try:
    while True:
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        token = os.getxattr(fd, "user.dlmfs.token").decode()
        n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0") + 1
        os.pwrite(fd, b"%d" % n, 0)
        os.write(1, f"{n} {token}\\n".encode())
        os.close(fd)
except OSError as error:
    os.write(1, f"error {error.errno}\\n".encode())
"""
"""A line means: this increment was acknowledged under this token."""

CHURN = """
import errno, os, sys
def take(path, flags):
    try:
        fd = os.open(path, flags | os.O_CREAT)
    except OSError as error:
        if error.errno != errno.ETXTBSY:
            raise
        return
    if flags & os.O_RDWR:
        os.pwrite(fd, b"churn", 3)
    else:
        os.pread(fd, 64, 0)
    os.close(fd)
try:
    n = 0
    while True:
        n += 1
        domain = f"{sys.argv[1]}/churn{n % 3}"
        os.mkdir(domain)
        for flags in (os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_NONBLOCK):
            take(domain + "/x", flags)
            take(f"{sys.argv[1]}/dom/shared{n % 5}", flags)
        os.unlink(domain + "/x")
        os.rmdir(domain)
        os.write(1, b"round\\n")
except OSError as error:
    os.write(1, f"error {error.errno} {error.filename}\\n".encode())
"""


class Load:
    """What goes on at one node from its mount to its death."""

    def __init__(self, where: Path, rule: str) -> None:
        self.counters = [Worker(COUNT, where / "dom/n") for _ in range(2 if rule == "file" else 1)]
        self.churn = Worker(CHURN, where)
        self.stopped = False

    @property
    def workers(self) -> list[Worker]:
        return [*self.counters, self.churn]

    def acknowledged(self) -> list[tuple[int, int]]:
        """Value and token of each increment; fails if a worker met an error while all was well."""
        rows = []
        for worker in self.counters:
            for line in worker.lines:
                words = line.split()
                if words[0] != "error":
                    rows.append((int(words[0]), int(words[1])))
        return rows

    def died(self) -> None:
        """After the daemon's death: each worker has ended, with the error of a dead mount."""
        for worker in self.workers:
            last = worker.wait_until_over()[-1].split()
            assert last[0] == "error", last
            assert int(last[1]) in GONE, last

    def stop(self) -> None:
        for worker in self.workers:
            lines = worker.stop()
            assert not lines or not lines[-1].startswith("error"), lines[-1]


class Cluster:
    """Two nodes under load, of which one is killed now and then."""

    def __init__(self, nodes: Nodes, rule: str, rng: random.Random) -> None:
        self.nodes = nodes
        self.rule = rule
        self.rng = rng
        self.past: list[Load] = []
        self.loads: dict[Path, Load] = {}
        for name in "ab":
            self.start(self.nodes.mount(name, f"holder={rule}", "lock-delay=0"))

    def start(self, where: Path) -> None:
        (where / "dom").mkdir()
        self.loads[where] = Load(where, self.rule)

    def kill_one(self) -> None:
        victim, survivor = self.rng.sample(sorted(self.loads), 2)
        load = self.loads.pop(victim)
        fd = os.open(victim / "dom/wanted", os.O_RDWR | os.O_CREAT)
        try:
            waiter = self.nodes.hold(survivor / "dom/wanted")
            wanted(fd)
            load.counters[0].wait_for(self.rng.randint(1, 40))
            load.churn.wait_for(self.rng.randint(0, 1))
            kill(victim)
            assert waiter.wait() == "held", "the lock of the dead node did not come free"
            self._says_who_died(survivor / "dom/wanted", victim.name)
            waiter.release()
        finally:
            os.close(fd)
        load.died()
        self.past.append(load)
        for worker in self.loads[survivor].workers:
            worker.wait_for(3)
        assert sound(self.nodes.state)
        self.start(remount(self.nodes, victim.name, f"holder={self.rule}", "lock-delay=0"))

    @staticmethod
    def _says_who_died(path: Path, name: str) -> None:
        assert json.loads(os.getxattr(path, "user.dlmfs.abandoned"))["node"] == name

    def end(self) -> None:
        for load in [*self.loads.values(), *self.past]:
            for worker in load.workers:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()
                worker.wait_until_over()

    def check(self) -> None:
        """No acknowledged increment was lost or made twice, and tokens tell their order."""
        for load in self.loads.values():
            load.stop()
        everything = [*self.past, *self.loads.values()]
        rows = sorted(row for load in everything for row in load.acknowledged())
        values = [value for value, _ in rows]
        assert len(set(values)) == len(values), "two nodes made the same increment"
        for (value, token), (later, following) in itertools.pairwise(rows):
            larger = following > token if self.rule == "file" else following >= token
            assert larger, f"increment {later} has an older token than {value}"
        fd = os.open(min(self.loads) / "dom/n", os.O_RDONLY | os.O_CREAT)
        last = int(os.pread(fd, 64, 0).rstrip(b"\0"))
        os.close(fd)
        unsure = sum(len(load.counters) for load in everything)
        assert values[-1] <= last <= len(values) + unsure


@pytest.mark.parametrize("rule", ["node", "file"])
def test_killed_daemons_under_load(nodes: Nodes, rule: str) -> None:
    cluster = Cluster(nodes, rule, random.Random(f"kill {rule}"))
    try:
        for _ in range(KILLS):
            cluster.kill_one()
        cluster.check()
    finally:
        cluster.end()
    assert sound(nodes.state)
