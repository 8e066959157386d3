"""Who belongs to a holder is asked in a thread: what a user's processes cost there delays nobody else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from dlmfs.faults import Faults
from dlmfs.fs import kin, kinship
from dlmfs.fs.answer import Reply
from dlmfs.fs.kinship import Kinship
from dlmfs.fuse import opcodes
from tests.fs.nodes import PATIENCE_S, Nodes
from tests.fs.simulated import Mount

QUESTION = kin.Question(1, frozenset(), 1, b"/dom/x", "0:99")


class Loop:
    """Runs what the thread sends at once, in the thread, and says when that was."""

    def __init__(self) -> None:
        self.told = threading.Semaphore(0)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> None:
        callback(*args)
        self.told.release()

    def wait(self) -> None:
        assert self.told.acquire(timeout=PATIENCE_S)


class Asked:
    """A thread whose answers are held back until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop, self.faults = Loop(), Faults()
        self.kinship = Kinship(self.loop, self.faults)
        self.answers: list[tuple[str, bool]] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()
        monkeypatch.setattr(kin, "is_kin", self.is_kin)

    def is_kin(self, asked: kin.Question) -> bool:
        self.begun.release()
        assert self.gate.wait(PATIENCE_S)
        if asked.ino == 0:
            raise KeyError("a bug")
        return True

    def ask(self, user: str, number: int = 1) -> None:
        name = f"{user}{number}"
        question = QUESTION._replace(ino=number)
        self.kinship.ask(user, question, lambda answer: self.answers.append((name, answer)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_users_take_turns(asked: Asked) -> None:
    for number in (1, 2, 3):
        asked.ask("a", number)
    assert asked.begun.acquire(timeout=PATIENCE_S)
    asked.ask("b")
    asked.gate.set()
    for _ in range(4):
        asked.loop.wait()
    assert asked.answers == [("a1", True), ("a2", True), ("b1", True), ("a3", True)]
    asked.kinship.close()


def test_beyond_its_share_a_user_is_told_no(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinship, "WAITING_MAX", 2)
    asked.ask("a", 1)
    assert asked.begun.acquire(timeout=PATIENCE_S)
    for number in (2, 3, 4):
        asked.ask("a", number)
    asked.loop.wait()
    assert asked.answers == [("a4", False)]
    asked.gate.set()
    for _ in range(3):
        asked.loop.wait()
    assert asked.answers[1:] == [("a1", True), ("a2", True), ("a3", True)]
    asked.kinship.close()


@pytest.mark.allow_warnings
def test_what_raises_is_no_kin_and_is_named(asked: Asked) -> None:
    asked.gate.set()
    asked.ask("a", 0)
    asked.ask("a", 1)
    for _ in range(3):  # the note, and two answers
        asked.loop.wait()
    assert asked.answers == [("a0", False), ("a1", True)]
    assert asked.faults.told()["last"][0]["where"] == "kinship"
    asked.kinship.close()


# -- the answer comes later ---------------------------------------------------------------------------


class Later:
    """Keeps what was asked until the test answers."""

    def __init__(self, mount: Mount) -> None:
        self.done: list[Callable[[bool], None]] = []
        mount.fs.kinship = lambda _user, _question, done: self.done.append(done)


def other_open(mount: Mount, flags: int) -> tuple[int, Reply]:
    """By a process of which the daemon knows nothing."""
    header = mount.header(mount.file.ino, opcodes.OPEN)._replace(pid=1)
    reply = mount.fs.open(header, flags)
    mount.loop.run_for(0.01)
    return header.unique, mount.kernel.said.get(header.unique) if reply is None else reply


def test_a_trylock_is_refused_when_the_answer_is_there() -> None:
    mount = Mount()
    later = Later(mount)
    mount.hold()
    unique, reply = other_open(mount, os.O_RDWR | os.O_NONBLOCK)
    assert reply is None
    later.done[0](False)
    assert mount.kernel.said[unique] == errno.ETXTBSY


@pytest.mark.parametrize("answer", [True, False])
def test_an_answer_about_one_who_has_gone_is_nobodys(answer: bool) -> None:
    mount = Mount()
    later = Later(mount)
    fh = mount.hold()
    unique, _ = other_open(mount, os.O_RDWR)
    mount.fs.interrupt(unique)
    mount.fs.places.clear()
    later.done[0](answer)
    mount.close(fh)
    assert mount.counts() == (0, 0)


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.allow_warnings
def test_an_answer_after_the_domain_is_lost_is_nobodys(answer: bool) -> None:
    mount = Mount()
    later = Later(mount)
    mount.hold()
    unique, _ = other_open(mount, os.O_RDWR)
    mount.space.lose("taken away")
    said = mount.kernel.said[unique]
    later.done[0](answer)
    assert mount.kernel.said[unique] == said


def test_who_holds_it_itself_is_not_asked_about() -> None:
    mount = Mount()
    later = Later(mount)
    mount.open(os.O_RDONLY)
    mount.open(os.O_RDONLY)
    mount.open(os.O_RDWR)
    assert later.done == []


def test_a_trylock_whose_answer_does_not_come_is_answered() -> None:
    """Promise 6, whatever the thread does."""
    mount = Mount()
    Later(mount)
    mount.hold()
    unique, reply = other_open(mount, os.O_RDWR | os.O_NONBLOCK)
    assert reply is None
    mount.loop.run_for(mount.space.timing.try_timeout_s + 0.1)
    assert mount.kernel.said[unique] == errno.ETXTBSY


# -- the kernel opens the file itself -----------------------------------------------------------------

FLAGS = """
import errno, fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for request in (0x80086601, 0x801C581F):  # FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR
    try:
        fcntl.ioctl(fd, request, bytes(64))
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


@pytest.mark.fuse
@pytest.mark.skipif(os.sysconf("SC_LONG_BIT") != 64, reason="a 32-bit open(2) looks the same")
def test_an_ioctl_of_flags_waits_for_nobody(nodes: Nodes) -> None:
    """Not even for the lock that its own descriptor holds, as it did for ever."""
    where = nodes.mount("a", "holder=file")
    (where / "dom").mkdir()
    command = [sys.executable, "-I", "-c", FLAGS, str(where / "dom/x")]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.split() == [b"ENOTTY", b"ENOTTY"]
    waiter = nodes.hold(where / "dom/x", os.O_RDONLY)
    assert waiter.wait() == "held"


def test_an_open_of_a_32_bit_program_takes_the_lock() -> None:
    """It has no flag at all when it reads only."""
    mount = Mount()
    mount.fs.by_kernel = lambda _thread: False
    _, reply = mount.open(os.O_RDONLY)
    assert isinstance(reply, bytes)
    mount.fs.by_kernel = lambda _thread: True
    _, reply = mount.open(os.O_RDONLY)
    assert reply == errno.ENOTTY
    _, reply = mount.open(os.O_RDONLY | 0o100000)
    assert isinstance(reply, bytes)
