"""`dlmfs doctor` on a real etcd: each endpoint by itself, leases, latency, names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dlmfs.cli.checks.finding import Finding
from tests.etcd.mounts import EtcdNodes, until
from tests.etcd.proxy import Proxy
from tests.etcd.server import Etcd
from tests.fs.nodes import DLMFS, dlmfs

pytestmark = pytest.mark.fuse


def doctor(*args: str | Path) -> list[Finding]:
    command = [*DLMFS, "doctor", "--json", *map(str, args)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.stderr == b""
    found = [Finding(**row) for row in json.loads(done.stdout)]
    levels = [f.level for f in found]
    assert done.returncode == (69 if "fail" in levels else 1 if "warn" in levels else 0)
    return found


def level(found: list[Finding], words: str) -> str:
    hits = [f for f in found if words in f.says]
    assert len(hits) == 1, (words, found)
    assert bool(hits[0].mend) == (hits[0].level != "ok")
    return hits[0].level


def test_a_sound_cluster_and_nothing_is_left(shared_etcd: Etcd, nodes: EtcdNodes) -> None:
    source = shared_etcd.source(nodes.cluster)
    leases = shared_etcd.leases()
    found = doctor(source)
    assert set(shared_etcd.leases()) <= set(leases)  # one of an earlier test's may have run out
    assert level(found, "version 3.") == "ok"
    assert level(found, "names in use") == "ok"
    assert level(found, "the store answers within") == "ok"
    a, _ = nodes.pair("ttl=30")
    assert level(doctor(source), f"names in use in {nodes.cluster}: a b") == "ok"
    found = doctor(a)
    assert level(found, "HEALTHY, lease time 30 s, good for") == "ok"
    assert level(found, "node b (") == "ok"
    keys = nodes.all_keys()
    doctor(a)
    assert nodes.all_keys() == keys


def test_nodes_that_differ_or_are_dead(nodes: EtcdNodes) -> None:
    a, b = nodes.mount("a", "ttl=60"), nodes.mount("b", "ttl=30")
    assert level(doctor(a), "node b has the lease time 30 s") == "warn"
    nodes.kill(b)
    found = doctor(a)
    assert level(found, "is dead; its locks are free in") == "fail"


def test_endpoints_that_are_down_far_or_of_another_cluster(shared_etcd: Etcd, start: Any) -> None:
    nodes: EtcdNodes = start(1)
    one = shared_etcd.members[0].endpoint
    two = nodes.etcd.members[0].endpoint
    assert level(doctor(f"etcd://{one},{two}/x"), "are of different clusters") == "fail"
    found = doctor(f"etcd://{one},127.0.0.1:9/x")
    assert [f.level for f in found if f.about == "etcd 127.0.0.1:9"] == ["fail"]
    assert level(found, "names in use in x: none") == "ok"


def test_a_slow_way_to_etcd(shared_etcd: Etcd) -> None:
    proxy = Proxy(shared_etcd.members[0].endpoint)
    try:
        proxy.delay(0.15)
        found = doctor("-o", "ttl=5", f"etcd://{proxy.endpoint}/x")
        assert level(found, "the store answers within") in ("warn", "fail")
    finally:
        proxy.close()


def test_a_mount_whose_etcd_is_silent(start: Any) -> None:
    nodes: EtcdNodes = start(1)
    a = nodes.mount("a", "ttl=60")
    nodes.etcd.members[0].kill()
    until(lambda: any("does not answer" in f.says for f in doctor(a)), "nobody sees that")


def test_a_known_warning_can_be_accepted(
    shared_etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.5.1 has lease bugs, and is the only one there: a monitor wants to hear of everything else."""
    source = shared_etcd.source("x")
    plain = dlmfs("doctor", "-q", source, check=False)
    assert "[etcd-version]" in plain.stdout
    done = dlmfs("doctor", "--json", "--accept", "clock,suspend,etcd-version", source, check=False)
    findings = [Finding(**row) for row in json.loads(done.stdout)]
    assert [f.accepted for f in findings if f.name == "etcd-version"] == [True]
    levels = {f.level for f in findings}
    assert done.returncode == (69 if "fail" in levels else 1 if "warn" in levels else 0)
    monkeypatch.setenv("DLMFS_DOCTOR_ACCEPT", "etcd-version")
    assert "[etcd-version]" not in dlmfs("doctor", "-q", source, check=False).stdout
    done = dlmfs("doctor", "--accept", "etcd-versoin", source, check=False)
    assert done.returncode == 2
    assert "did you mean 'etcd-version'?" in done.stderr
