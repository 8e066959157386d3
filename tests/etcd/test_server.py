"""The server's troubles: members that are killed, stopped, compacted."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.etcd.mounts import EtcdNodes, errno_of, gone, is_lost, put, take, trylock, until, value
from tests.etcd.proxy import Proxy
from tests.etcd.server import PATIENCE_S, Etcd, state_of
from tests.fs.nodes import DLMFS, dlmfs

pytestmark = pytest.mark.fuse

Start = Callable[..., EtcdNodes]
LONG = "ttl=15"
"""The default: long enough for a server's restart, also on a busy machine."""

COUNT = """
import os, sys
for _ in range(int(sys.argv[2])):
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0")
    os.pwrite(fd, b"%d" % (n + 1), 0)
    os.close(fd)
    print(n + 1, flush=True)
sys.stdin.read()
"""


def test_a_restart_of_the_server_loses_nothing(start: Start) -> None:
    nodes = start()
    a, b = nodes.pair(LONG)
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"before", 0)
    waiter = nodes.queue(b / "dom/x")
    nodes.etcd.restart(nodes.etcd.members[0])
    assert os.pwrite(fd, b"beyond", 0) == 6
    assert not waiter.poll(0)
    os.close(fd)
    assert waiter.wait() == "held"
    assert value(b / "dom/x") == b"beyond"
    assert [nodes.fences(where) for where in (a, b)] == [0, 0]


def test_killed_leaders_and_a_stopped_one_lose_nothing(start: Start) -> None:
    """A counter on two nodes goes on through each; a paused leader that runs on does no harm."""
    nodes = start(3)
    etcd = nodes.etcd
    a, b = nodes.pair(LONG)
    held = os.open(a / "dom/held", os.O_RDWR | os.O_CREAT)
    waiter = nodes.hold(b / "dom/held")
    rounds = 1000
    counters = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT, str(where / "dom/n"), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for where in (a, b)
    ]
    nodes.children += counters
    said = [0, 0]

    def both_go_on() -> None:
        """Each has counted since."""
        before = list(said)
        for number, counter in enumerate(counters):
            assert counter.stdout is not None
            for _ in range(3):
                assert select.select([counter.stdout], [], [], PATIENCE_S)[0], "it hangs"
                said[number] = int(counter.stdout.readline())
        assert said > before

    both_go_on()
    killed = etcd.leader()
    killed.kill()
    both_go_on()
    etcd.restart(killed)
    both_go_on()
    stopped = etcd.leader()
    stopped.stop()
    both_go_on()
    stopped.cont()
    both_go_on()
    for counter in counters:
        counter.kill()
        counter.wait()
    assert int(value(a / "dom/n")) >= max(said), "an increment that was told is lost"
    assert not waiter.poll(0)
    os.close(held)
    assert waiter.wait() == "held"
    assert [nodes.fences(where) for where in (a, b)] == [0, 0]


def test_a_mount_needs_any_member_not_the_first(start: Start) -> None:
    nodes = start(3)
    nodes.etcd.members[0].kill()
    a = nodes.mount("a")
    (a / "dom").mkdir()
    assert errno_of(a / "dom/x") == 0


def test_a_mount_without_a_server_fails_and_says_so(folder: Path) -> None:
    where = folder / "a"
    where.mkdir()
    done = dlmfs("mount", Etcd(folder).source(), str(where), "-o", "ttl=5,retry=0", check=False)
    assert done.returncode == 32
    assert "etcd at 127." in done.stderr
    assert not where.is_mount()


def test_calls_answer_while_the_server_is_silent(start: Start) -> None:
    """fuse-notes, Critical 1: what holds the kernel's directory lock may not wait for the store. All
    is answered before the lease's deadline, which is 10 s away here."""
    nodes = start()
    a, b = nodes.pair(LONG)
    (b / "empty").mkdir()
    put(a / "dom/theirs", b"")
    put(b / "dom/mine", b"")
    put(b / "dom/file", b"")
    fd = os.open(b / "dom/mine", os.O_RDWR)
    nodes.etcd.members[0].stop()
    answers: dict[str, int] = {}

    def call(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            answers[name] = error.errno or -1
        else:
            answers[name] = 0

    calls: dict[str, Callable[[], object]] = {
        "trylock": lambda: os.open(b / "dom/theirs", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK),
        "mkdir": (b / "new").mkdir,
        "rmdir": (b / "empty").rmdir,
        "unlink": (b / "dom/file").unlink,
    }
    threads = [threading.Thread(target=call, args=pair) for pair in calls.items()]
    for thread in threads:
        thread.start()
    # Nothing of these needs the store, and not one may queue behind those that do.
    assert os.path.exists(b / "dom/mine")
    assert os.statvfs(b).f_namemax == 255
    os.close(os.open(b / "dom/mine", os.O_RDWR))
    assert os.getxattr(b / "dom/mine", "user.dlmfs.mode") == b"EX"
    assert nodes.fences(b) == 0
    for thread in threads:
        thread.join(PATIENCE_S)
    assert nodes.fences(b) == 0, "the answers came no sooner than the end of the lease"
    assert answers == dict.fromkeys(calls, errno.ENOLCK)
    assert sorted(os.listdir(b / "dom")) == ["file", "mine", "theirs"]
    cached = nodes.hold(b / "dom/mine")
    assert cached.waits, "served before the store is known to be the one that it was"
    nodes.etcd.members[0].cont()
    assert cached.wait() == "held"
    assert os.pread(fd, 64, 0) == bytes(64)
    os.close(fd)
    until(lambda: nodes.lease(b) == "HEALTHY")
    # What was answered with ENOLCK is finished when the store is back.
    until(lambda: not (b / "dom/file").exists() and not (b / "empty").exists())
    assert trylock(b / "dom/theirs") == 0
    assert nodes.fences(b) == 0


def test_a_silent_server_fences_at_the_deadline_and_ends_do_not_wait(start: Start) -> None:
    """umount, SIGTERM, and a waiting open."""
    nodes = start()
    a, b = nodes.pair()
    c = nodes.mount("c", LONG)
    d = nodes.mount("d", LONG)
    for where in (c, d):
        (where / "dom").mkdir()
        put(where / f"dom/{where.name}", b"")
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    waiter = nodes.queue(b / "dom/x")
    nodes.etcd.members[0].stop()
    pid = nodes.daemons.pop(c)
    end = os.pidfd_open(pid)
    signal.pidfd_send_signal(end, signal.SIGTERM)
    leaving = subprocess.Popen([*DLMFS, "umount", str(d)], stderr=subprocess.PIPE)
    nodes.children.append(leaving)
    assert gone(fd)
    assert is_lost(fd)
    assert waiter.wait() == f"error {errno.ENOLCK}"
    os.close(fd)
    assert select.select([end], [], [], PATIENCE_S)[0], "SIGTERM does not end it"
    os.close(end)
    assert leaving.communicate(timeout=PATIENCE_S)[1] == b""
    assert leaving.returncode == 0
    assert state_of(nodes.daemons.pop(d)) in ("", "Z")
    nodes.umount(b)
    nodes.etcd.members[0].cont()
    until(lambda: nodes.lease(a) == "HEALTHY")
    take(a / "dom/x")
    nodes.umount(a)


def test_a_watch_that_fell_behind_a_compaction_lists_anew(start: Start) -> None:
    """What was missed is known all the same: who came, who went, who waits."""
    nodes = start()
    with closing(Proxy(nodes.etcd.members[0].endpoint)) as proxy:
        a = nodes.mount("a", LONG, source=f"etcd://{proxy.endpoint}/test")
        b, c = nodes.mount("b", LONG), nodes.mount("c", LONG)
        for where in (a, c):
            (where / "dom").mkdir()
        fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
        other = nodes.hold(c / "dom/y")
        assert other.wait() == "held"
        inside = nodes.queue(a / "dom/y")
        proxy.cut()
        (b / "dom").mkdir()
        waiter = nodes.hold(b / "dom/x")
        other.release()
        nodes.umount(c)
        assert waiter.waits
        nodes.etcd.compact()
        proxy.heal()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000) == [(fd, select.POLLIN)]
        assert inside.wait() == "held"
        assert os.pwrite(fd, b"still", 0) == 5
        os.close(fd)
        assert waiter.wait() == "held"
        assert value(b / "dom/x") == b"still"
        until(lambda: nodes.status(a)["domains"][0]["members"] == ["a", "b"])
        assert nodes.fences(a) == 0


def test_without_a_quorum_nothing_new_and_with_it_all_again(start: Start) -> None:
    nodes = start(3)
    etcd = nodes.etcd
    a, b = nodes.pair(LONG)
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    waiter = nodes.queue(b / "dom/x")
    for member in etcd.members[:2]:
        member.kill()
    with pytest.raises(OSError, match="No locks available"):
        (b / "new").mkdir()
    cached = nodes.hold(a / "dom/x")
    assert cached.waits, "served before the store is known to be the one that it was"
    etcd.start()
    assert os.pread(fd, 64, 0) == bytes(64)
    assert cached.wait() == "held"
    cached.release()
    os.close(fd)
    assert waiter.wait() == "held"
    (b / "new").mkdir()
    assert [nodes.fences(where) for where in (a, b)] == [0, 0]
