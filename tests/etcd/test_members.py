"""Which members are asked: what servers say of the cluster, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.errors import DlmfsError
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.about import About
from dlmfs.store.etcd.members import FOUND_MAX, Members
from dlmfs.store.etcd.rpc import Access, Rpc
from tests.etcd.mounts import EtcdNodes, put, value
from tests.etcd.relay import Relay
from tests.etcd.server import Etcd, loopback
from tests.fs.nodes import dlmfs

Start = Callable[..., EtcdNodes]
STATUS: Final = "/etcdserverpb.Maintenance/Status"
LIST: Final = "/etcdserverpb.Cluster/MemberList"
CLUSTER: Final = 7
REMOTE: Final = ("etcd1.example:2379",)
LOCAL: Final = ("127.0.0.1:2379", "localhost:2379")


def member(*urls: str, learner: bool = False) -> pb.Member:
    return pb.Member(client_urls=urls, is_learner=learner)


def found(*urls: str, given: tuple[str, ...] = REMOTE, encrypted: bool = True) -> tuple[str, ...]:
    members = Members(given, encrypted=encrypted)
    members.learn(CLUSTER, [member(url) for url in urls])
    return members.found


# -- what is made of a list ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["https://etcd2.example:2379", "https://10.1.2.3:2379", "https://[2001:db8::7]:4001"],
)
def test_another_members_address_is_kept(url: str) -> None:
    assert found(url) == (url.removeprefix("https://"),)
    assert found(f"{url}/") == (url.removeprefix("https://"),)


@pytest.mark.parametrize(
    "url",
    [
        *("http://10.1.2.3:2379", "unix://10.1.2.3:2379", "10.1.2.3:2379", "HTTPS://10.1.2.3:2379"),
        *("https://10.1.2.3", "https://10.1.2.3:0", "https://10.1.2.3:65536", "https://:2379"),
        *("https://u:p@10.1.2.3:2379", "https://10.1.2.3:2379/x", "https://a b:2379", ""),
        *("https://127.0.0.1:2379", "https://127.9.9.9:2379", "https://[::1]:2379"),
        *("https://[::ffff:127.0.0.1]:2379", "https://0.0.0.0:2379", "https://[::]:2379"),
        *("https://localhost:2379", "https://LOCALHOST.:2379", "https://a.localhost:2379"),
        *("https://127.1:2379", "https://2130706433:2379", "https://0x7f000001:2379"),
        *("https://0x7f.1:2379", "https://127.0.0.1.:2379", "https://169.254.169.254:2379"),
        *("https://224.0.0.1:2379", "https://[fe80::1]:2379", f"https://{'a.' * 127}com:2379"),
        "https://etcd1.example:2379",
    ],
)
def test_what_is_no_other_members_address_is_not(url: str) -> None:
    assert found(url) == ()


def test_on_one_host_its_own_addresses_count() -> None:
    assert found("https://127.0.0.9:2379", given=LOCAL) == ("127.0.0.9:2379",)
    assert found("https://127.0.0.9:2379", given=(*LOCAL, *REMOTE)) == ()
    assert found("https://0.0.0.0:2379", given=LOCAL) == ()
    assert found("https://10.1.2.3:2379", given=LOCAL) == ("10.1.2.3:2379",)


def test_in_clear_text_nothing_leaves_the_host_by_itself() -> None:
    """What is given on the loopback may be the end of a tunnel."""
    assert found("http://10.1.2.3:2379", given=LOCAL, encrypted=False) == ()
    assert found("http://10.1.2.3:2379", given=REMOTE, encrypted=False) == ("10.1.2.3:2379",)


def test_learners_are_not_asked_and_a_crowd_has_an_end() -> None:
    members = Members(REMOTE, encrypted=True)
    members.learn(CLUSTER, [member("https://10.0.0.1:1", learner=True), member()])
    assert not members.found
    members.learn(CLUSTER, [member(*(f"https://10.0.0.1:{p}" for p in range(1, 99)))])
    assert len(members.found) == FOUND_MAX
    members.learn(CLUSTER, [member("https://10.0.0.2:1")])
    assert members.found == ("10.0.0.2:1",), "what was said before counts no more"


def test_given_ones_come_first_and_stay() -> None:
    members = Members(("a:1", "b:1"), encrypted=False)
    members.learn(CLUSTER, [member("http://c:1", "http://b:1"), member("http://d:1")])
    asked = []
    for _ in range(5):
        asked.append(members.endpoint)
        members.next()
    assert asked == ["a:1", "b:1", "c:1", "d:1", "a:1"]
    members.next()
    members.next()
    assert members.endpoint == "d:1"
    members.learn(CLUSTER, [])
    assert members.endpoint == "d:1", "it may serve on"
    members.next()
    assert members.endpoint == "a:1"
    assert len(members) == 2


def test_who_was_found_must_be_of_the_cluster() -> None:
    members = Members(("a:1",), encrypted=False)
    members.learn(CLUSTER, [member("http://c:1")])
    assert members.are("c:1", CLUSTER)
    assert not members.are("c:1", CLUSTER + 1)
    assert members.are("a:1", CLUSTER + 1), "this is looked at elsewhere: the store was restored"


PART: Final = st.text() | st.sampled_from(
    ["10.0.0.1", ":2379", "http://", "etcd", "/", "localhost"]
)


@given(st.lists(st.lists(PART).map("".join)))
def test_no_list_harms(urls: list[str]) -> None:
    members = Members(REMOTE, encrypted=False)
    members.learn(CLUSTER, [member(*urls)])
    for _ in range(len(members) + 1):
        members.next()
        host, _, port = members.endpoint.rpartition(":")
        assert host
        assert 0 < int(port) < 65536
    assert len(members) <= 1 + FOUND_MAX


# -- real ones ------------------------------------------------------------------------------------------


@pytest.mark.fuse
@pytest.mark.allow_warnings
def test_a_server_that_tells_users_nothing_of_itself_serves(nodes: EtcdNodes) -> None:
    """Newer ones tell their status to administrators only."""
    with contextlib.closing(Relay(nodes.etcd.members[0].endpoint)) as relay:
        relay.forbidden = {STATUS, LIST}
        where = nodes.mount("a", source=f"etcd://{relay.endpoint}/{nodes.cluster}")
        (where / "dom").mkdir()
        put(where / "dom/x", b"untold")
        assert value(where / "dom/x") == b"untold"
        assert set(relay.told) == {STATUS, LIST}
        store = nodes.status(where)["store"]
        assert store["version"] == "unknown"
        assert store["warning"] is None
        assert store["trouble"] is None
        assert store["endpoint"] == relay.endpoint
        nodes.umount(where)


@pytest.mark.allow_warnings
def test_a_newer_server_may_not_tell_what_an_older_one_did(shared_etcd: Etcd) -> None:
    with contextlib.closing(Relay(shared_etcd.members[0].endpoint)) as relay:

        async def main() -> None:
            loop = asyncio.get_running_loop()
            rpc = Rpc(loop, Access((relay.endpoint,)), _never)
            about = About(rpc, loop.time)
            assert about.is_due()
            for forbidden, version in ((set(), "3.5.1"), ({STATUS}, "unknown"), (set(), "3.5.1")):
                relay.forbidden = forbidden
                await about.look()
                assert about.version == version
                assert (about.size_mb > 0) == (version == "3.5.1")
            assert not about.is_due()
            rpc.failed(rpc.generation, "a connection was lost")
            assert about.is_due()
            await rpc.close()

        asyncio.run(main())


def _never(error: DlmfsError) -> None:
    raise AssertionError(error)


@pytest.mark.fuse
def test_it_is_said_that_the_version_is_not_told(nodes: EtcdNodes) -> None:
    with contextlib.closing(Relay(nodes.etcd.members[0].endpoint)) as relay:
        relay.forbidden = {STATUS}
        where = nodes.folder / "a"
        where.mkdir()
        nodes.mounts.append(where)
        source = f"etcd://{relay.endpoint}/{nodes.cluster}"
        done = dlmfs("mount", source, str(where), "-o", "node=a,ttl=5")
        nodes.daemons[where] = nodes.pid(where)
        assert "tells its version and size to administrators only" in done.stderr
        nodes.umount(where)


@pytest.mark.fuse
def test_all_members_are_replaced_one_by_one(folder: Path, start: Start) -> None:
    """On addresses that the mount was not given; nobody notices. The last given one goes, too."""
    nodes = start(Etcd(folder, 3, options={"strict-reconfig-check": "false"}, known=True))
    etcd = nodes.etcd
    given = {member.endpoint for member in etcd.members}
    a, b = nodes.pair("ttl=15")
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"before", 0)
    waiter = nodes.queue(b / "dom/x")
    for old in list(etcd.members):
        new = etcd.add(loopback())
        etcd.remove(old)
        for where in (a, b):
            nodes.until_told(where, new.endpoint)
    assert not {member.endpoint for member in etcd.members} & given
    assert os.pwrite(fd, b"beyond", 0) == 6
    assert not waiter.poll(0)
    os.close(fd)
    assert waiter.wait() == "held"
    waiter.release()
    assert value(b / "dom/x") == b"beyond"
    assert [nodes.fences(where) for where in (a, b)] == [0, 0]
    for where in (a, b):
        nodes.umount(where)
    assert etcd.all_keys() == []
