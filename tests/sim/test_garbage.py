"""A record that no node has put costs what it belongs to, while it stands; then all is as before."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Final

import pytest

from dlmfs.core.lease import LeaseState
from dlmfs.engine.eviction import mark_key
from dlmfs.engine.lockspace import Lockspace
from dlmfs.engine.records import Keys
from dlmfs.errors import Unavailable
from dlmfs.model import Mode
from dlmfs.sim import garbage
from dlmfs.sim.cluster import Cluster
from dlmfs.sim.node import SimNode
from dlmfs.sim.oracle import OPERATOR
from dlmfs.sim.programs import Process
from dlmfs.sim.run import quiet
from dlmfs.sim.scenario import Scenario, draw
from dlmfs.sim.spoiling import mend
from dlmfs.store.base import Bounds, KeyValue, Put, Txn
from dlmfs.store.memory_store import Faults
from tests.engine.test_records import REAL

DOMAIN: Final = b"dom0"
LOCK, OTHER = b"lock0", b"lock1"
KEYS: Final = Keys(DOMAIN, "n0")
HEAD: Final = KEYS.head(LOCK)
OWN: Final = (KEYS.mine, b"n/n0")
"""To overwrite one of these ends that life of n0, as an eviction would."""
RECORDS: Final = {
    HEAD: 0,
    KEYS.mine: 1,
    KEYS.member("n9"): 1,
    KEYS.wish(LOCK, "n1"): 2,
    KEYS.wish(LOCK, "n9"): 2,
    KEYS.mail("n1", LOCK): 3,
    b"n/n0": 4,
    b"n/n9": 4,
    mark_key("n0"): 5,
    b"n/n0/ask/n1/4d.1": 6,
    b"n/n0/answer/4d.1/n1": 7,
    KEYS.my_news: 8,
}
"""Keys where nodes look or watch, and which of the real records stands at such a one."""
ROOM: Final = Bounds(128, 8 << 20)


def scenario(*, leased: bool) -> Scenario:
    return replace(
        draw(0),
        rules=("node",) * 3,
        rates=(1.0,) * 3,
        domains=1,
        locks=2,
        ttl_s=15.0,
        leased=leased,
        lock_delay_s=0.0,
        provable=False,
        lenient=False,
        fitful=0.0,
        faults=Faults(),
        steps=(),
        bounds=ROOM,
    )


class Stage:
    """Three nodes: n0 has a lock exclusively, and n1 waits for it."""

    def __init__(self, *, leased: bool = True) -> None:
        self.cluster = cluster = Cluster(scenario(leased=leased))
        for node in cluster.nodes:
            node.start()
        cluster.loop.run_for(1.0)
        for node in cluster.nodes:
            self.take(node, OTHER)
        self.holder = self.begin(cluster.nodes[0], LOCK)
        self.waiter = self.begin(cluster.nodes[1], LOCK)
        cluster.loop.run_for(0.1)
        assert self.holder.files
        assert self.waiter.program is not None

    def begin(self, node: SimNode, name: bytes) -> Process:
        process = node.new_process()
        process.deaf = True
        process.run(process.open(DOMAIN, name, Mode.EX, trying=False, again=0))
        return process

    def take(self, node: SimNode, name: bytes) -> None:
        """Have the lock, as soon as the node may, and give it back."""
        for _ in range(60):
            process = self.begin(node, name)
            assert self.cluster.loop.run_until(lambda p=process: p.program is None, 60.0)  # type: ignore[misc]
            got = bool(process.files)
            process.kill(unheard=False)
            if got:
                return
            self.cluster.loop.run_for(1.0)
        raise AssertionError(f"{node.name} cannot get {name!r}")

    def put(self, key: bytes, value: bytes) -> None:
        arbiter = self.cluster.arbiter
        arbiter.author = OPERATOR
        arbiter.apply(Txn((), (Put(key, value),)))
        arbiter.author = None
        self.cluster.spoilt[key] = self.written = arbiter.revision

    def mend(self, key: bytes) -> None:
        mend(self.cluster, key)
        assert self.cluster.loop.run_until(lambda: key not in self.cluster.spoilt, 60.0)

    def told(self) -> list[str]:
        """What the nodes say of records that cannot be read."""
        members = [node.membership for node in self.cluster.nodes]
        bad = [member.bad for member in members]
        bad += [space.bad for member in members for space in member.spaces.values()]
        return [what for some in bad for what in some.told()]

    def undisturbed(self, key: bytes) -> None:
        """Nobody suffers whom the record does not belong to."""
        for node in self.cluster.nodes:
            if node.name == "n0" and key in OWN:
                continue
            assert node.membership.state is LeaseState.HEALTHY
            assert node.membership.fences == 0
            assert node.membership.spaces[DOMAIN].live
        if key not in (*OWN, HEAD):
            assert self.cluster.nodes[0].serves((DOMAIN, LOCK)) is Mode.EX
        for node in reversed(self.cluster.nodes):
            self.take(node, OTHER)

    def comes_back(self, key: bytes) -> None:
        """That life of n0 is over, and the next needs nobody's help."""
        member, loop = self.cluster.nodes[0].membership, self.cluster.loop
        assert loop.run_until(
            lambda: self.cluster.arbiter.data[key].mod_revision > self.written, 60.0
        )
        assert loop.run_until(lambda: member.up and member.spaces[DOMAIN].live, 60.0)
        assert member.fences == (key == b"n/n0")
        assert member.spaces[DOMAIN].incarnation > self.written
        assert not self.holder.files or self.holder.files[0].noticed

    def as_before(self) -> None:
        for process in (self.holder, self.waiter):
            process.kill(unheard=False)
        for node in self.cluster.nodes:
            self.take(node, LOCK)
            assert node.membership.state is LeaseState.HEALTHY
        assert not self.told()


def play(key: bytes, value: bytes, *, leased: bool = True) -> None:
    with quiet():
        stage = Stage(leased=leased)
        stage.put(key, value)
        stage.cluster.loop.run_for(3.0)
        stage.undisturbed(key)
        if key in OWN:
            stage.comes_back(key)
        stage.mend(key)
        stage.as_before()


@pytest.mark.parametrize("kind", garbage.KINDS)
@pytest.mark.parametrize("key", RECORDS)
def test_a_record_that_cannot_be_read(key: bytes, kind: str) -> None:
    rng = Random(f"{key!r} {kind}")
    real = KeyValue(key, REAL[RECORDS[key]][1], 1000, 1 << 40)
    play(key, garbage.spoilt(rng, real, (kind,)), leased=rng.random() < 0.5)


@pytest.mark.parametrize("key", garbage.ODD_KEYS)
def test_a_key_of_no_shape(key: bytes) -> None:
    play(key, REAL[garbage.ODD_KEYS.index(key) % len(REAL)][1])


def test_a_head_that_cannot_be_read_is_named_and_asked_for_again() -> None:
    with quiet():
        stage = Stage()
        cluster, waiter = stage.cluster, stage.waiter
        stage.put(HEAD, b'{"v":1}')
        asker = stage.begin(cluster.nodes[2], LOCK)
        cluster.loop.run_for(3.0)
        assert not asker.files
        assert any(repr(HEAD) in what for what in stage.told())
        # Who uses it may go on, since nobody else can have it; it is lost when it would be given away.
        assert cluster.nodes[0].serves((DOMAIN, LOCK)) is Mode.EX
        stage.holder.kill(unheard=False)
        cluster.loop.run_for(3.0)
        assert cluster.nodes[0].serves((DOMAIN, LOCK)) is Mode.NL
        assert not waiter.files
        commits = cluster.arbiter.commits
        cluster.loop.run_for(600.0)
        assert cluster.arbiter.commits == commits
        stage.mend(HEAD)
        stage.as_before()


def test_a_domain_is_left_beside_a_head_that_cannot_be_read() -> None:
    """As by a death: whoever can read it again takes the node out of it."""
    with quiet():
        stage = Stage()
        cluster = stage.cluster
        stage.put(HEAD, b"garbage")
        for process in (stage.holder, stage.waiter):
            process.kill(unheard=False)
        cluster.loop.run_for(1.0)
        over = [node.machine for node in cluster.nodes]
        for node in cluster.nodes:
            assert node.unmount()
        assert cluster.loop.run_until(lambda: all(machine.dead for machine in over), 60.0)


def test_a_lost_domain_is_not_joined_before_its_holders_had_their_time() -> None:
    """Its directory removed and made again or not: to join takes away what stands there of us."""
    with quiet():
        stage = Stage()
        node, loop = stage.cluster.nodes[0], stage.cluster.loop
        member = node.membership
        stage.put(KEYS.mine, b"garbage")
        assert loop.run_until(lambda: not member.spaces[DOMAIN].live, 10.0)
        member.leave(member.spaces[DOMAIN], lambda _error: None)
        answers: list[object] = []
        member.join(DOMAIN, answers.append)
        assert loop.run_until(lambda: bool(answers), 1.0)
        assert isinstance(answers[0], Unavailable)
        assert not stage.waiter.files
        loop.run_for(member.config.grace_s)
        member.join(DOMAIN, answers.append)
        assert loop.run_until(lambda: len(answers) == 2, 10.0)
        assert isinstance(answers[1], Lockspace)
