"""What an operator does, with our commands and with etcdctl."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.etcd.mounts import EtcdNodes, errno_of, gone, is_lost, put, take, trylock, until, value
from tests.etcd.server import CONTROL
from tests.fs.nodes import dlmfs

pytestmark = pytest.mark.fuse


def test_evict_a_living_node(nodes: EtcdNodes) -> None:
    """It leaves at once, says why, and stays out until it is mounted anew."""
    a, b = nodes.pair("ttl=3600")
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    taker = nodes.queue(b / "dom/x")
    done = dlmfs("evict", "a", str(b))
    assert done.stdout.startswith("a left after")
    assert gone(fd)
    assert is_lost(fd)
    os.close(fd)
    assert taker.wait() == "held"
    taker.release()
    assert nodes.lease(a) == "FENCED"
    assert "evicted by b" in nodes.reason(a)
    assert errno_of(a / "dom/x") == errno.ENOLCK
    assert [row["node"] for row in json.loads(dlmfs("nodes", "--json", str(b)).stdout)] == ["b"]
    assert not [key for key in nodes.all_keys() if key.endswith("/evict")], "the mark stays"
    nodes.umount(a)
    nodes.mount("a", "ttl=3600")
    (a / "dom").mkdir()
    take(a / "dom/x")


def test_evict_somebody_who_is_not_there(nodes: EtcdNodes) -> None:
    done = dlmfs("evict", "nobody", str(nodes.mount("a")), check=False)
    assert done.returncode == 2
    assert "there is no node 'nobody'" in done.stderr


def test_an_evicted_daemon_that_stood_still_stays_out_when_it_runs_on(nodes: EtcdNodes) -> None:
    """`dlmfs evict --help`: until it is mounted anew, whether or not it heard of it in time."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    nodes.stop(a)
    nodes.ask(b, "evict", node="a")
    assert trylock(b / "dom/x") == 0, "evicted, and its lock is not free"
    nodes.cont(a)
    assert gone(fd)
    assert is_lost(fd)
    os.close(fd)
    time.sleep(1.0)  # twice the time after which a node that comes back does so
    assert nodes.lease(a) == "FENCED", "it came back"
    assert "evicted by b" in nodes.reason(a)


@contextmanager
def ghost(nodes: EtcdNodes) -> Iterator[None]:
    """A node that renews its lease and hears nothing: no daemon of ours can be brought to that."""
    lease = nodes.etcd.ctl("lease", "grant", "2").split()[1]
    record = json.dumps({"v": 1, "ttl": 0.5})
    nodes.etcd.ctl("put", f"--lease={lease}", f"dlmfs/{nodes.cluster}/n/ghost", record)
    endpoint = nodes.etcd.members[0].endpoint
    alive = subprocess.Popen(
        [CONTROL, f"--endpoints={endpoint}", "lease", "keep-alive", lease],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        alive.kill()
        alive.wait()


def test_evict_ends_the_lease_of_a_node_that_renews_it_and_hears_nothing(nodes: EtcdNodes) -> None:
    a = nodes.mount("a")
    with ghost(nodes):
        assert "ghost" in [row["node"] for row in nodes.ask(a, "nodes")]
        done = dlmfs("evict", "ghost", str(a))
        assert done.stdout.startswith("ghost did not answer: its lease was ended")
        assert [row["node"] for row in nodes.ask(a, "nodes")] == ["a"]


def test_a_revoked_lease_fences_the_node_which_comes_back(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    put(a / "dom/x", b"kept")
    taker = nodes.queue(b / "dom/x")
    nodes.etcd.ctl("lease", "revoke", nodes.etcd.lease_of(f"dlmfs/{nodes.cluster}/n/a"))
    assert gone(fd)
    assert is_lost(fd)
    assert taker.wait() == "held"
    assert value(b / "dom/x") == b"kept"
    until(lambda: nodes.lease(a) == "HEALTHY", "it does not come back")
    take(a / "dom/z")
    assert trylock(a / "dom/x") == errno.ETXTBSY
    assert is_lost(fd)
    os.close(fd)


def test_a_node_record_deleted_by_hand_fences_the_node(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    taker = nodes.queue(b / "dom/x")
    nodes.etcd.ctl("del", f"dlmfs/{nodes.cluster}/n/a")
    assert gone(fd)
    assert is_lost(fd)
    assert taker.wait() == "held"
    until(lambda: nodes.lease(a) == "HEALTHY")
    take(a / "dom/z")
    assert is_lost(fd)
    os.close(fd)


def test_a_membership_deleted_by_hand_loses_that_domain_only(nodes: EtcdNodes) -> None:
    a, b = nodes.pair()
    (a / "other").mkdir()
    lost = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    kept = os.open(a / "other/x", os.O_RDWR | os.O_CREAT)
    taker = nodes.queue(b / "dom/x")
    nodes.etcd.ctl("del", f"dlmfs/{nodes.cluster}/d/dom/m/a")
    assert gone(lost)
    assert is_lost(lost)
    assert taker.wait() == "held"
    assert not is_lost(kept)
    take(a / "dom/z")
    assert is_lost(lost)
    assert nodes.fences(a) == 0
    os.close(lost)
    os.close(kept)


def test_a_trylock_on_an_idle_lock_of_a_stopped_daemon_does_not_wait_for_its_lease(
    nodes: EtcdNodes,
) -> None:
    """protocol-traps 13: refused when the try's own time is over, and again free for all later."""
    a, b = nodes.pair("ttl=60")
    put(a / "dom/x", b"")
    nodes.stop(a)
    assert trylock(b / "dom/x") == errno.ETXTBSY
    nodes.cont(a)
    until(lambda: trylock(b / "dom/x") == 0)


def test_a_lock_of_another_format_is_refused_by_name(nodes: EtcdNodes) -> None:
    """A later dlmfs may write what this one cannot read: better no lock than a wrong one."""
    a = nodes.mount("a")
    (a / "dom").mkdir()
    key = f"dlmfs/{nodes.cluster}/h/dom/x"
    nodes.etcd.ctl("put", key, '{"v":99,"m":{}}')
    assert errno_of(a / "dom/x") in (errno.ENOLCK, errno.EIO)
    assert "format 99" in json.dumps(nodes.status(a)), "it does not say why"
    nodes.etcd.ctl("del", key)
    take(a / "dom/x")


def test_a_wish_of_another_format_is_skipped_and_named(nodes: EtcdNodes) -> None:
    """Met while joined, and when joining."""
    a, b = nodes.mount("a"), nodes.mount("b")
    (a / "dom").mkdir()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    key = f"dlmfs/{nodes.cluster}/d/dom/w/x/z"
    nodes.etcd.ctl("put", key, '{"v":99}')
    (b / "dom").mkdir()
    for where in (a, b):
        nodes.until_told(where, "format 99")
        assert nodes.lease(where) == "HEALTHY", nodes.reason(where)
    assert "format 99" in dlmfs("doctor", str(a), check=False).stdout
    assert not is_lost(fd)
    os.close(fd)
    take(b / "dom/x")
    nodes.etcd.ctl("del", key)
    for where in (a, b):
        nodes.until_told(where, "format 99", told=False)


def test_two_nodes_evict_each_other_at_once(nodes: EtcdNodes) -> None:
    """Both may go, one may stay; nobody hangs, and what stays works."""
    a, b = nodes.pair()
    results: dict[str, int] = {}

    def evict(name: str, by: str) -> None:
        done = dlmfs("evict", name, str(nodes.folder / by), check=False)
        results[name] = done.returncode

    threads = [threading.Thread(target=evict, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    fenced = [where for where in (a, b) if nodes.lease(where) == "FENCED"]
    assert fenced
    for where in fenced:
        assert "evicted by" in nodes.reason(where)
        nodes.umount(where)
        nodes.mount(where.name)
        (where / "dom").mkdir()
    assert nodes.hold(a / "dom/x").wait() == "held"
    assert trylock(b / "dom/x") == errno.ETXTBSY
    assert not [key for key in nodes.all_keys() if key.endswith("/evict")], "a mark stays"
