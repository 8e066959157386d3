"""What a daemon leaves behind that dies, or ends: its locks, its name, its keys."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.etcd.mounts import TTL, EtcdNodes, errno_of, gone, is_lost, put, trylock, until, value
from tests.etcd.server import Etcd, scratch
from tests.fs.nodes import Holder, dlmfs

pytestmark = pytest.mark.fuse


class Aftermath(NamedTuple):
    """Of the death of node a, whose lease has run out; b and c are left."""

    nodes: EtcdNodes
    b: Path
    c: Path
    victim: Holder
    heir: Holder
    """Waited at b for the lock that a's process used."""
    reader: Holder
    """Waited at c behind a's wish for a lock that b only reads."""
    took_s: float


@pytest.fixture(scope="module")
def aftermath(shared_etcd: Etcd) -> Iterator[Aftermath]:
    """Made once: it takes a lease's time."""
    with scratch() as folder, closing(EtcdNodes(folder, shared_etcd, "aftermath")) as nodes:
        a, b = nodes.pair()
        c = nodes.mount("c")
        (c / "dom").mkdir()
        for lock in ("used", "cached", "read"):
            put(b / "dom" / lock, b"older")
            put(a / "dom" / lock, b"precious")
        victim = nodes.hold(a / "dom/used")
        assert victim.wait() == "held"
        assert nodes.hold(a / "dom/read", os.O_RDONLY).wait() == "held"
        assert value(b / "dom/read") == b"precious", "now a has it shared"
        heir = nodes.queue(b / "dom/used")
        assert nodes.hold(b / "dom/queued", os.O_RDONLY).wait() == "held"
        nodes.queue(a / "dom/queued")
        reader = nodes.queue(c / "dom/queued", os.O_RDONLY)
        died = time.monotonic()
        nodes.kill(a)
        assert heir.wait() == "held"
        took_s = time.monotonic() - died
        yield Aftermath(nodes, b, c, victim, heir, reader, took_s)


def mark(path: Path) -> str | None:
    """The node that died having the lock exclusively, if the lock says so."""
    said = os.getxattr(path, "user.dlmfs.abandoned")
    return str(json.loads(said)["node"]) if said else None


def test_promise_progress_a_dead_daemons_lock_comes_free_in_time(aftermath: Aftermath) -> None:
    assert aftermath.took_s < TTL + 2 + 3, "far beyond ttl + 2 s, also for a busy machine"
    assert aftermath.heir.token > aftermath.victim.token


def test_promise_value_survives_a_dead_daemon_and_says_so(aftermath: Aftermath) -> None:
    """In use or cached, nobody can tell; what was only shared cannot have been harmed."""
    b = aftermath.b
    info = aftermath.nodes.info(b / "dom/used")
    assert bytes.fromhex(info["lvb_hex"]).rstrip(b"\0") == b"precious"
    assert info["abandoned"]["node"] == "a"
    assert value(b / "dom/used") == b"precious"
    assert mark(b / "dom/used") == "a"
    assert value(b / "dom/cached") == b"precious"
    assert mark(b / "dom/cached") == "a"
    put(b / "dom/cached", b"mended")
    assert mark(b / "dom/cached") is None
    assert value(b / "dom/read") == b"precious"
    assert mark(b / "dom/read") is None


def test_the_wish_of_a_dead_node_blocks_nobody(aftermath: Aftermath) -> None:
    """protocol-traps 2 and 6: no head changes, the queue alone moves."""
    assert aftermath.reader.wait() == "held"
    keys = aftermath.nodes.all_keys()
    assert not [key for key in keys if "/w/" in key or "/g/a/" in key]
    assert not [key for key in keys if key.endswith(("/m/a", "/n/a"))]


def test_promise_progress_a_clean_leave_frees_at_once(nodes: EtcdNodes) -> None:
    """Not after the lease's time: it is an hour here. The cached lock carries no mark."""
    a, b = nodes.pair("ttl=3600")
    assert value(b / "dom/x") == b"", "with its file there, b keeps the value alive"
    put(a / "dom/x", b"left")
    put(a / "dom/y", b"left")
    nodes.umount(a)
    assert value(b / "dom/x") == b"left"
    assert trylock(b / "dom/y") == 0
    assert os.getxattr(b / "dom/x", "user.dlmfs.abandoned") == b""
    assert nodes.status(b)["domains"][0]["members"] == ["b"]


def test_sigterm_leaves_cleanly_what_is_closed_and_as_a_death_what_is_not(nodes: EtcdNodes) -> None:
    """Either at the latest when the grace is over, whatever the lease time."""
    a, b = nodes.pair("ttl=3600")
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    assert nodes.hold(a / "dom/y").wait() == "held"
    waiters = [nodes.queue(b / f"dom/{name}") for name in "xy"]
    os.kill(nodes.daemons.pop(a), signal.SIGTERM)
    assert gone(fd)
    assert is_lost(fd)
    assert not any(waiter.poll(0) for waiter in waiters)
    os.close(fd)
    for waiter in waiters:
        assert waiter.wait() == "held"
    assert os.getxattr(b / "dom/x", "user.dlmfs.abandoned") == b""
    assert json.loads(os.getxattr(b / "dom/y", "user.dlmfs.abandoned"))["node"] == "a"


def test_the_name_of_a_killed_daemon_is_free_soon_on_its_machine(nodes: EtcdNodes) -> None:
    """Its process provably exists no more, so its lease of an hour need not run out; and its locks
    come free with it, when its holders have had the grace."""
    a, b = nodes.pair("ttl=3600")
    victim = nodes.hold(a / "dom/x")
    assert victim.wait() == "held"
    waiter = nodes.queue(b / "dom/x")
    nodes.kill(a)
    nodes.mount("a", "ttl=3600")
    assert waiter.wait() == "held"
    (a / "dom").mkdir()
    assert errno_of(a / "dom/y") == 0
    assert len(nodes.ask(a, "nodes")) == 2


def test_the_name_of_a_living_or_stopped_daemon_is_refused(nodes: EtcdNodes) -> None:
    a = nodes.mount("a", "ttl=3600")
    other = nodes.folder / "other"
    other.mkdir()
    source = nodes.etcd.source(nodes.cluster)
    for stopped in (False, True):
        if stopped:
            nodes.stop(a)
        done = dlmfs("mount", source, str(other), "-o", "node=a", check=False)
        assert done.returncode == 32
        assert "a node named a is alive" in done.stderr
    nodes.cont(a)
    assert nodes.lease(a) == "HEALTHY"


def test_promise_fencing_a_stopped_daemon_serves_nothing_when_it_runs_on(nodes: EtcdNodes) -> None:
    """It slept beyond its lease: another has the lock, and not one read or write may slip through."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"before", 0)
    nodes.stop(a)
    taker = nodes.hold(b / "dom/x")
    assert taker.wait() == "held"
    put(b / "dom/x", b"after")
    nodes.cont(a)
    assert is_lost(fd)
    assert gone(fd)
    assert value(b / "dom/x") == b"after"
    until(lambda: nodes.lease(a) == "HEALTHY", "it does not come back")
    assert is_lost(fd), "an old descriptor works again"
    taker.release()
    until(lambda: errno_of(a / "dom/x") == 0)
    assert value(a / "dom/x") == b"after"
    assert is_lost(fd)
    os.close(fd)


def test_lock_delay_keeps_a_dead_nodes_lock_for_a_while(nodes: EtcdNodes) -> None:
    """Until then it can be seen dead and in the way; no mark yet, for nobody has taken it over."""
    a, b = nodes.pair("lock-delay=2")
    assert nodes.hold(a / "dom/x").wait() == "held"
    waiter = nodes.queue(b / "dom/x")
    nodes.kill(a)
    nodes.mount("a2", "lock-delay=2", "node=a")  # ends the old session at once
    until(lambda: nodes.status(b)["domains"][0]["members"] == ["b"])
    assert not waiter.poll(1.0)
    assert waiter.wait() == "held"


def test_a_clean_end_of_all_leaves_nothing(start: Callable[..., EtcdNodes]) -> None:
    nodes = start()
    a, b = nodes.pair()
    for where in (a, b):
        for lock in "xyz":
            put(where / "dom" / lock, b"v")
    assert nodes.etcd.all_keys() == sorted(nodes.all_keys()), "keys outside of our part"
    assert nodes.etcd.leases()
    for where in (a, b):
        nodes.umount(where)
    assert nodes.etcd.all_keys() == []
    assert nodes.etcd.leases() == []


def test_values_outlive_a_crash_of_all_until_the_domain_is_removed(nodes: EtcdNodes) -> None:
    """Promise 4 for a power cut; `dlmfs domain rm` is the broom."""
    a, b = nodes.pair()
    put(a / "dom/x", b"survivor")
    put(b / "dom/y", b"other")
    leases = [nodes.etcd.lease_of(f"dlmfs/{nodes.cluster}/n/{name}") for name in "ab"]
    nodes.kill(a)
    nodes.kill(b)
    c = nodes.mount("c", "ttl=3600")
    refused = dlmfs("domain", "rm", "dom", str(c), check=False)
    assert refused.returncode == 2
    assert "a node is in the domain" in refused.stderr
    for lease in leases:  # as if their time were over
        nodes.etcd.ctl("lease", "revoke", lease)
    assert [n["node"] for n in nodes.ask(c, "nodes")] == ["c"]
    (c / "dom").mkdir()
    assert value(c / "dom/x") == b"survivor"
    assert json.loads(os.getxattr(c / "dom/x", "user.dlmfs.abandoned"))["node"] == "a"
    (c / "dom/x").unlink()
    (c / "dom").rmdir()
    assert any("/dom/y" in key for key in nodes.all_keys()), (
        "a value was lost with nobody having seen it"
    )
    done = dlmfs("domain", "rm", "dom", str(c))
    assert "lock resources removed" in done.stdout
    assert dlmfs("domain", "rm", "dom", str(c), check=False).returncode == 2
    nodes.umount(c)
    assert nodes.all_keys() == []
