"""An etcd that renews leases and takes no writes: out of space, corrupt, or without the right."""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dlmfs.errors import NotPermitted, StoreRefuses
from dlmfs.store.base import Put, Txn
from dlmfs.store.etcd import watch as watch_module
from dlmfs.store.etcd.codec import Codec
from dlmfs.store.etcd.rpc import Access, Rpc
from dlmfs.store.etcd.store import EtcdStore
from dlmfs.store.etcd.watch import EtcdWatch
from tests.etcd.mounts import EtcdNodes, errno_of, put, take, until, value
from tests.etcd.server import Etcd
from tests.etcd.test_access import credentials, try_mount, with_users
from tests.etcd.test_doctor import doctor, level
from tests.fs.nodes import dlmfs

pytestmark = pytest.mark.fuse

Start = Callable[..., EtcdNodes]
NOSPACE, CORRUPT = 1, 2
ACTIVATE, DEACTIVATE = 1, 2


def alarm(etcd: Etcd, kind: int, action: int = ACTIVATE) -> None:
    """As a member raises it by itself; etcdctl can only disarm all of them."""
    body = {"action": action, "memberID": "4711", "alarm": kind}
    request = urllib.request.Request(
        f"http://{etcd.members[0].endpoint}/v3/maintenance/alarm", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def status_says(nodes: EtcdNodes, where: Path, words: str, *, told: bool = True) -> None:
    until(lambda: nodes.is_healthy(where))
    done = dlmfs("status", str(where))
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("  etcd")]  # no log's
    assert any(words in line for line in lines) is told, done.stdout


def commands_say(nodes: EtcdNodes, where: Path, words: str, cure: str) -> None:
    """What every command says of a store that refuses, while the lease is good. The lock is in a new
    domain: this etcd does not count what a transaction inside of another puts, as the takes are."""
    status_says(nodes, where, words)
    for how in (["-w", "1"], ["-n"]):
        done = dlmfs("lock", *how, str(where / "new/x"), "--", "true", check=False)
        assert done.returncode == 69, (how, done.stderr)
        assert words in done.stderr, how
    found = doctor(where)
    finding = next(f for f in found if words in f.says and f.level == "fail")
    assert cure in finding.mend
    done = dlmfs("why", str(where / "dom/other"), check=False)
    assert done.returncode == 69
    assert "it is free" not in done.stdout
    assert words in done.stdout


def test_out_of_space(start: Start) -> None:
    nodes = start()
    a, _ = nodes.pair("ttl=60")
    put(a / "dom/cached", b"before")
    alarm(nodes.etcd, NOSPACE)
    commands_say(nodes, a, "out of space", "etcdctl alarm list")
    assert errno_of(a / "dom/cached") == 0
    found = doctor(nodes.etcd.source())
    assert level(found, "alarm:NOSPACE") == "fail"
    assert not [f for f in found if "firewall" in f.mend]
    nodes.etcd.ctl("alarm", "disarm")
    nodes.until_told(a, "out of space", told=False)
    put(a / "dom/new", b"after")
    status_says(nodes, a, "out of space", told=False)
    assert not nodes.etcd.all_keys("dlmfs/test/probe")


def test_a_lock_that_somebody_has_is_busy_however_full_the_store_is(start: Start) -> None:
    nodes = start()
    a = nodes.mount("a", "ttl=60", "holder=file")
    (a / "dom").mkdir()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    alarm(nodes.etcd, NOSPACE)
    for how in (["-w", "0.5"], ["-n"]):
        done = dlmfs("lock", *how, str(a / "dom/x"), "--", "true", check=False)
        assert done.returncode == 1, done.stderr
    os.close(fd)


def test_space_that_is_really_used_up(folder: Path, start: Start) -> None:
    nodes = start(Etcd(folder, options={"quota-backend-bytes": str(4 << 20)}))
    a = nodes.mount("a", "ttl=60")
    (a / "dom").mkdir()
    big = "x" * 100_000
    until(lambda: nodes.etcd.try_ctl("put", "other", big) is None, "it takes all of that")
    status_says(nodes, a, "out of space")
    nodes.etcd.ctl("del", "other")
    nodes.etcd.compact()
    nodes.etcd.ctl("defrag")
    nodes.etcd.ctl("alarm", "disarm")
    take(a / "dom/new")
    nodes.until_told(a, "out of space", told=False)


def test_corrupt_data(start: Start) -> None:
    nodes = start()
    a = nodes.mount("a", "ttl=60")
    (a / "dom").mkdir()
    alarm(nodes.etcd, CORRUPT)
    status_says(nodes, a, "data corrupt")
    assert level(doctor(nodes.etcd.source()), "alarm:CORRUPT") == "fail"
    alarm(nodes.etcd, CORRUPT, DEACTIVATE)
    take(a / "dom/new")


def test_a_role_that_may_not_write_any_more(folder: Path, start: Start) -> None:
    """It costs the requests of that time, and no lock: an operator's slip is no fault of ours."""
    nodes = start()
    with_users(nodes.etcd)
    good = credentials(folder, "dlm")
    a, b = nodes.pair(good, "ttl=60")
    put(a / "dom/held", b"before")
    fd = os.open(a / "dom/held", os.O_RDWR)
    nodes.etcd.ctl("role", "grant-permission", "locks", "read", "--prefix=true", "dlmfs/")
    status_says(nodes, a, "not let this user write")
    with pytest.raises(OSError, match="No locks available"):
        (a / "meanwhile").mkdir()
    assert level(doctor("-o", good, nodes.etcd.source()), "refuses this user") == "fail"
    done = try_mount(folder, nodes.etcd.source("other"), good)
    assert "role grant-permission ROLE readwrite --prefix=true dlmfs/" in done.stderr
    nodes.etcd.ctl("role", "grant-permission", "locks", "readwrite", "--prefix=true", "dlmfs/")
    assert os.pwrite(fd, b"after ", 0) == 6
    os.close(fd)
    assert value(b / "dom/held") == b"after "
    (a / "meanwhile").mkdir()
    status = nodes.status(a)
    assert status["faults"]["count"] == 0
    assert status["lease"]["fences"] == 0
    assert status["store"]["trouble"] is None


def test_a_silent_store_is_no_busy_lock_either(start: Start) -> None:
    nodes = start()
    a = nodes.mount("a", "ttl=60")
    (a / "dom").mkdir()
    nodes.etcd.members[0].kill()
    command = ["lock", "-w", "2", str(a / "dom/x"), "--", "true"]
    done = dlmfs(*command, check=False)
    assert done.returncode == 69
    assert "Connection refused" in done.stderr or "did not answer" in done.stderr


def test_w_is_for_the_whole_command(start: Start) -> None:
    """A lock that is had at once, and whose value cannot be written: not busy, and not for ever."""
    nodes = start()
    a = nodes.mount("a", "ttl=60")
    (a / "dom").mkdir()
    put(a / "dom/x", b"before")
    nodes.etcd.members[0].stop()
    try:
        done = dlmfs("value", "set", "-w", "2", str(a / "dom/x"), "after", check=False)
        assert done.returncode == 69, done.stderr
        assert "may still be written" in done.stderr
        done = dlmfs("value", "get", "-w", "2", str(a / "dom/new"), check=False)
        assert done.returncode in (
            1,
            69,
        )  # 1: it has not been silent for long enough to be known for it
    finally:
        nodes.etcd.members[0].cont()
    take(a / "dom/x")


def test_a_word_that_comes_before_the_question_returned_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else an idle watch gives its connection up every few seconds, and the store must be proved anew."""

    class Stream:
        cancelled = False

        def cancel(self) -> bool:
            self.cancelled = True
            return True

    async def never() -> None:
        await asyncio.Event().wait()

    async def listen() -> Stream:
        rpc = Rpc(asyncio.get_running_loop(), Access(("127.0.0.1:9",)), lambda _error: None)
        watch = EtcdWatch(rpc, Codec(b"x/"), [b"m/"], 1, sink=print, trusted=never)
        asked, enough = 0, asyncio.Event()

        async def ask() -> None:
            nonlocal asked
            asked += 1
            watch._heard = True
            if asked == 5:
                enough.set()

        monkeypatch.setattr(watch, "ask", ask)
        monkeypatch.setattr(watch_module, "SILENCE_S", 0.001)
        stream = Stream()
        listening = asyncio.ensure_future(watch._listen(stream))  # type: ignore[arg-type]
        done, _ = await asyncio.wait(
            {listening, asyncio.ensure_future(enough.wait())},
            timeout=60,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert listening not in done
        listening.cancel()
        watch.cancel()
        return stream

    assert not asyncio.run(listen()).cancelled


def test_a_refusal_is_definite_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine breaks the lock for whatever is not `Unavailable`."""

    async def refused(*_args: object) -> object:
        raise NotPermitted("etcdserver: permission denied")

    async def ask() -> object:
        loop = asyncio.get_running_loop()
        store = EtcdStore(Access(("127.0.0.1:9",)), "x", loop, time.monotonic, 3.0)
        monkeypatch.setattr(store.rpc, "call", refused)
        answer: asyncio.Future[object] = loop.create_future()
        store.txn(Txn((), (Put(b"k", b"v", 0),)), answer.set_result)
        return await answer

    assert isinstance(asyncio.run(ask()), StoreRefuses)
