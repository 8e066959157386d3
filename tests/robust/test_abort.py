"""Mounts that are torn away with locks open and awaited, and daemons and programs that run out of
descriptors.

Whatever way a mount ends: its programs get errors and none hangs, its daemon leaves cleanly, and
the other nodes get the locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs.control import control_path
from tests.fs.nodes import PATIENCE_S, Holder, Nodes, dlmfs
from tests.robust.helpers import (
    GONE,
    LONG,
    Worker,
    below,
    daemon_of,
    daemon_pid,
    ended,
    entry_of,
    error_of,
    fusectl,
    remount,
    sound,
    use,
    wanted,
)

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(600 if LONG else 120)]

EX = os.O_RDWR | os.O_CREAT


@pytest.fixture
def connections() -> Iterator[Path]:
    with fusectl() as folder:
        yield folder


class Scene:
    """a holds x, which b awaits; b holds y, which two programs on a await."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.a, self.b = nodes.pair("grace=0.5", "lock-delay=0.2")
        self.fd = os.open(self.a / "dom/x", EX)
        os.pwrite(self.fd, b"kept", 0)
        self.y = os.open(self.b / "dom/y", EX)
        self.wants_x = nodes.hold(self.b / "dom/x")
        wanted(self.fd)
        self.want_y = [nodes.hold(self.a / "dom/y", mode) for mode in (EX, os.O_RDONLY)]
        wanted(self.y)
        report = nodes.status(self.a)["domains"][0]["locks"]
        while sum(len(lock["waiters"]) for lock in report) < 2:
            report = nodes.status(self.a)["domains"][0]["locks"]

    def close(self) -> None:
        for fd in (self.fd, self.y):
            with contextlib.suppress(OSError):
                os.close(fd)

    def is_cut_off(self, daemon: int) -> None:
        """The mount a is gone by force: errors here, the lock there, once its holder had time to learn
        of it; marked, for nobody saw it closed; and a clean store."""
        for waiter in self.want_y:
            words = waiter.wait().split()
            assert words[0] == "error"
            assert int(words[1]) in GONE
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000)[0][1] & select.POLLERR
        for call in (lambda: os.pread(self.fd, 4, 0), lambda: os.pwrite(self.fd, b"lost", 0)):
            assert error_of(call) in GONE
        assert self.wants_x.wait() == "held"
        assert ended(daemon), "the daemon of an aborted mount goes on"
        assert self.nodes.status(self.b)["domains"][0]["members"] == ["b"]
        info = json.loads(dlmfs("info", "--json", str(self.b / "dom/x")).stdout)
        assert bytes.fromhex(info["lvb_hex"]).rstrip(b"\0") == b"kept"
        assert info["abandoned"]["node"] == "a", "it was in use, and is not marked"
        info = json.loads(dlmfs("info", "--json", str(self.b / "dom/y")).stdout)
        assert info["waiters"] == []
        assert sound(self.nodes.state)


@pytest.fixture
def scene(nodes: Nodes) -> Iterator[Scene]:
    made = Scene(nodes)
    try:
        yield made
    finally:
        made.close()


def test_abort_of_the_connection(nodes: Nodes, scene: Scene, connections: Path) -> None:
    number = entry_of(scene.a).dev.partition(":")[2]
    with daemon_of(scene.a) as daemon:
        (connections / number / "abort").write_text("1")
        scene.is_cut_off(daemon)
    scene.close()
    a = remount(nodes, "a")
    (a / "dom").mkdir()
    assert use(a, "open", a / "dom/y") == (0, "")


def test_umount_by_force(nodes: Nodes, scene: Scene) -> None:
    """umount -f aborts the connection; while files are open the mount itself then stays, dead."""
    with daemon_of(scene.a) as daemon:
        subprocess.run(["umount", "-f", str(scene.a)], check=False, capture_output=True)
        scene.is_cut_off(daemon)
    scene.close()
    (remount(nodes, "a") / "dom").mkdir()


def test_lazy_umount_keeps_the_locks_until_the_last_close(scene: Scene) -> None:
    """As in the kernel's dlmfs; those who wait go on waiting, and get what they wait for."""
    waits_x, want_y = scene.wants_x, scene.want_y
    with daemon_of(scene.a) as daemon:
        subprocess.run(["umount", "-l", str(scene.a)], check=True)
        assert below(scene.a) == []
        assert os.pread(scene.fd, 4, 0) == b"kept"
        assert os.pwrite(scene.fd, b"more", 0) == 4
        assert waits_x.waits
        os.close(scene.fd)
        assert waits_x.wait() == "held"
        assert not any(waiter.poll(0) for waiter in want_y)
        os.close(scene.y)
        _served_in_turn(want_y)
        assert ended(daemon), "the last file is closed, the daemon goes on"
    assert scene.nodes.status(scene.b)["domains"][0]["members"] == ["b"]


def _served_in_turn(waiters: list[Holder]) -> None:
    """holder=node: both at once. Their attribute call fails on the detached path, not the open."""
    for waiter in waiters:
        assert waiter.wait() in ("held", f"error {errno.ENOENT}")
    for waiter in waiters:
        waiter.release()


def test_plain_umount_of_a_mount_in_use_is_refused_and_changes_nothing(scene: Scene) -> None:
    done = dlmfs("umount", str(scene.a), check=False)
    assert done.returncode == 32
    assert "is in use" in done.stderr
    assert os.pread(scene.fd, 4, 0) == b"kept"
    os.close(scene.fd)
    assert scene.wants_x.wait() == "held"
    os.close(scene.y)
    assert [waiter.wait() for waiter in scene.want_y] == ["held", "held"]


def test_abort_under_load_frees_everything(nodes: Nodes, connections: Path) -> None:
    """Many times, at no particular point of the work."""
    a, b = nodes.pair("grace=0.2", "lock-delay=0")
    for turn in range(30 if LONG else 1):
        loads = [Worker(COUNT, where / "dom/n") for where in (a, a, b)]
        try:
            for load in loads:
                load.wait_for(5 + turn)
            number = entry_of(a).dev.partition(":")[2]
            with daemon_of(a) as daemon:
                (connections / number / "abort").write_text("1")
                for load in loads[:2]:
                    last = load.wait_until_over()[-1].split()
                    assert last[0] == "error"
                    assert int(last[1]) in GONE
                assert ended(daemon)
            loads[2].wait_for(20)
        finally:
            for load in loads:
                load.stop()
        (remount(nodes, "a") / "dom").mkdir()
    assert sound(nodes.state)


COUNT = """
import os, sys
try:
    while True:
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0") + 1
        os.pwrite(fd, b"%d" % n, 0)
        os.write(1, b"%d\\n" % n)
        os.close(fd)
except OSError as error:
    os.write(1, b"error %d\\n" % error.errno)
"""


# -- descriptors -----------------------------------------------------------------------------------


@contextlib.contextmanager
def no_more_descriptors(where: Path) -> Iterator[None]:
    """The daemon can open nothing for a while."""
    pid = daemon_pid(where)
    assert pid is not None
    _gone_from_control(where)
    used = max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd")) + 1
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, old[1]))
    for free in set(range(used)) - {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}:
        # A gap below the limit: lower it to the gap, what is open above it stays open.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, old[1]))
        break
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)


def _gone_from_control(where: Path) -> None:
    """Until the daemon has closed its end of our last question: an answered one has been."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(control_path(entry_of(where))))
        sock.sendall(b"{}\n")
        while sock.recv(65536):
            pass


def state_of(where: Path) -> str:
    """The lease state through the mount: that takes no descriptor of the daemon."""
    return os.getxattr(where, "user.dlmfs.state").decode()


def test_a_daemon_without_descriptors_serves_on_and_recovers(nodes: Nodes) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", EX)
    try:
        os.pwrite(fd, b"kept", 0)
        lost = select.poll()
        lost.register(fd, select.POLLERR)
        with no_more_descriptors(a):
            assert use(a, "open", a / "dom/y") == (0, "")
            assert use(b, "try", b / "dom/x") == (errno.ETXTBSY, "")
            # Long enough for the look at the peers that comes every second.
            assert lost.poll(1500) == [], f"the lock was lost: {state_of(a)}"
            assert state_of(a) == "HEALTHY"
        assert os.pread(fd, 4, 0) == b"kept"
        assert nodes.status(a)["lease"]["state"] == "HEALTHY"
    finally:
        os.close(fd)
    assert use(b, "open", b / "dom/x") == (0, "")


def test_a_peer_that_comes_while_a_daemon_has_no_descriptors(nodes: Nodes) -> None:
    """It connects to the daemon's bell, which cannot answer; later the two get along."""
    a, _ = nodes.pair()
    fd = os.open(a / "dom/x", EX)
    try:
        lost = select.poll()
        lost.register(fd, select.POLLERR)
        with no_more_descriptors(a):
            c = nodes.mount("c")
            (c / "dom").mkdir()
            waiter = nodes.hold(c / "dom/x")
            assert lost.poll(1500) == [], f"the lock was lost: {state_of(a)}"
            assert waiter.waits
    finally:
        os.close(fd)
    assert waiter.wait() == "held"
    back = nodes.hold(a / "dom/x")
    assert back.waits
    waiter.release()
    assert back.wait() == "held"


def test_a_question_to_a_daemon_without_descriptors(nodes: Nodes) -> None:
    """It costs the node nothing, and is answered once there are descriptors again."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", EX)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE_S)
            with no_more_descriptors(a):
                sock.connect(str(control_path(entry_of(a))))
                sock.sendall(b'{"cmd": "status"}\n')
                # Served after the question was there: the daemon has met it by then.
                assert use(a, "open", a / "dom/y") == (0, "")
                assert use(b, "open", b / "dom/y") == (0, "")
                assert state_of(a) == "HEALTHY"
            with sock.makefile("rb") as file:
                report = json.loads(file.readline())["ok"]
        assert report["lease"]["state"] == "HEALTHY"
        assert os.pwrite(fd, b"fine", 0) == 4
    finally:
        os.close(fd)
    assert use(b, "open", b / "dom/x") == (0, "")


def test_many_silent_questions(nodes: Nodes) -> None:
    """Connections that ask nothing keep neither locks nor other questions from being served."""
    a, b = nodes.pair()
    with contextlib.ExitStack() as stack:
        address = str(control_path(entry_of(a)))
        for _ in range(500):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
        assert use(a, "open", a / "dom/x") == (0, "")
        assert use(b, "open", b / "dom/x") == (0, "")
        done = dlmfs("status", "--json", str(a), check=False)
        assert done.returncode in (0, 69), done.stdout + done.stderr
        assert state_of(a) == "HEALTHY"
    assert nodes.status(a)["lease"]["state"] == "HEALTHY"


CLIENT = """
import errno, os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
fds = []
try:
    while True:
        fds.append(os.open(f"{sys.argv[1]}/f{len(fds)}", os.O_RDWR | os.O_CREAT))
except OSError as error:
    print(error.errno, len(fds), flush=True)
os.close(fds.pop())
fds.append(os.open(f"{sys.argv[1]}/f{len(fds)}", os.O_RDWR))
print("again", flush=True)
"""


def test_a_program_that_runs_out_of_descriptors(nodes: Nodes) -> None:
    """It is told EMFILE by the kernel, and no lock is left behind by the open that failed."""
    a, b = nodes.pair()
    client = Worker(CLIENT, a / "dom")
    first, second = client.wait_until_over()
    code, count = map(int, first.split())
    assert code == errno.EMFILE
    assert second == "again"
    for number in range(count + 1):
        assert use(b, "try", b / f"dom/f{number}") == (0, "")
