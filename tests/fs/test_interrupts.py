"""Which interrupted requests end with EINTR, and when (`fs.interrupts`); and what /proc says of the
signals of a thread (`fs.signals`)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs import proc
from dlmfs.fs import interrupts, signals
from dlmfs.fs.interrupts import LAST_S, PATIENCE_S, Interrupts
from dlmfs.fs.signals import Cause, Freezer
from dlmfs.fuse import mountinfo, opcodes
from dlmfs.sim.loop import SimLoop
from tests.fs.nodes import PATIENCE_S as LONG_S
from tests.fs.simulated import Mount

MOMENT_S = 0.01


@pytest.fixture
def mount() -> Mount:
    return Mount()


class Silent:
    """A mount whose store does not answer."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.fh = mount.hold()
        mount.cut()

    def write(self) -> int:
        header = self.mount.header(self.mount.file.ino, opcodes.WRITE)
        assert self.mount.fs.write(header, self.fh, 0, b"value") is None
        return header.unique

    def open(self) -> int:
        """Of a lock that nobody has ever had."""
        return self.mount.open_another()

    def answer(self, unique: int) -> bytes | int | None:
        return self.mount.kernel.said.get(unique)


@pytest.fixture
def silent(mount: Mount) -> Silent:
    return Silent(mount)


@pytest.mark.parametrize("what", ["write", "open"])
@pytest.mark.parametrize("cause", [Cause.CAUGHT, Cause.FROZEN])
def test_what_waits_for_a_silent_store_ends_after_a_second(
    silent: Silent, what: str, cause: Cause
) -> None:
    """Not before: a store that is well has answered long since."""
    unique = getattr(silent, what)()
    silent.mount.fs.why = cause
    silent.mount.fs.interrupt(unique)
    silent.mount.loop.run_for(PATIENCE_S - 2 * MOMENT_S)
    assert silent.answer(unique) is None
    silent.mount.loop.run_for(LAST_S + 3 * MOMENT_S)
    assert silent.answer(unique) == errno.EINTR


@pytest.mark.parametrize("what", ["write", "open"])
def test_what_waits_for_a_silent_store_can_be_killed_at_once(silent: Silent, what: str) -> None:
    unique = getattr(silent, what)()
    silent.mount.fs.why = Cause.FATAL
    silent.mount.fs.interrupt(unique)
    assert silent.answer(unique) == errno.EINTR


@pytest.mark.parametrize("what", ["write", "open"])
def test_a_stop_ends_nothing_and_what_comes_after_it_does(silent: Silent, what: str) -> None:
    unique = getattr(silent, what)()
    silent.mount.fs.why = Cause.NOTHING
    silent.mount.fs.interrupt(unique)
    silent.mount.loop.run_for(LONG_S)
    assert silent.answer(unique) is None
    silent.mount.fs.why = Cause.FATAL
    silent.mount.loop.run_for(LAST_S + MOMENT_S)
    assert silent.answer(unique) == errno.EINTR
    assert len(silent.mount.fs.interrupts) == 0


@pytest.mark.parametrize("cause", [Cause.CAUGHT, Cause.FROZEN, Cause.FATAL])
def test_a_wait_for_a_holder_ends_at_once(mount: Mount, cause: Cause) -> None:
    mount.hold()
    mount.fs.why = cause
    mount.interrupted()


def test_the_store_decides_first(mount: Mount) -> None:
    """A signal in the moment before it is known that somebody is in the way: then it ends the wait."""
    mount.hold()
    header = mount.header(mount.file.ino, opcodes.OPEN)
    assert mount.fs.open(header, os.O_RDWR) is None
    mount.fs.interrupt(header.unique)
    mount.loop.run_for(LAST_S)
    assert mount.kernel.said[header.unique] == errno.EINTR


def test_what_was_answered_meanwhile_is_looked_at_no_more(mount: Mount) -> None:
    fh = mount.hold()
    mount.fs.why = Cause.NOTHING
    unique, _ = mount.open()
    mount.fs.interrupt(unique)
    mount.close(fh)
    assert isinstance(mount.kernel.said[unique], bytes)
    mount.loop.run_for(LAST_S + MOMENT_S)
    assert len(mount.fs.interrupts) == 0


@pytest.mark.allow_warnings
def test_the_end_of_the_mount_ends_the_looking(mount: Mount) -> None:
    mount.hold()
    mount.fs.why = Cause.NOTHING
    unique, _ = mount.open()
    mount.fs.interrupt(unique)
    mount.fs.ends("a test")
    mount.loop.run_for(LAST_S + MOMENT_S)
    assert len(mount.fs.interrupts) == 0


def test_a_look_that_fails_is_repeated() -> None:
    """Nobody tells of that request again: its process could not be killed any more."""
    loop = SimLoop()
    fails = [True, True, False]

    def settle(_unique: int, _waited_s: float) -> bool:
        if fails.pop(0):
            raise OSError(errno.EMFILE, "no descriptor is left")
        return True

    made = Interrupts(loop, settle)
    with pytest.raises(OSError, match="no descriptor"):
        made.came(1)
    with pytest.raises(OSError, match="no descriptor"):
        loop.run_for(1.0)
    loop.run_for(1.0)
    assert not fails
    assert len(made) == 0


def test_what_looking_costs_is_bounded() -> None:
    """A thousand that are stopped: few looks in one turn of the loop, and a bounded rate; each is looked
    at again within seconds all the same."""
    loop = SimLoop()
    looks: list[tuple[float, int]] = []
    ended: set[int] = set()

    def settle(unique: int, waited_s: float) -> bool:
        if waited_s:
            looks.append((loop.time(), unique))
        return unique in ended

    made = Interrupts(loop, settle)
    for unique in range(1000):
        made.came(unique)
    loop.run_for(10.0)
    turns = [at for at, _ in looks]
    assert max(turns.count(at) for at in set(turns)) <= interrupts.BATCH
    assert len(looks) <= 10.0 / interrupts.PAUSE_S * interrupts.BATCH
    looks.clear()
    loop.run_for(3.0)
    assert {unique for _, unique in looks} == set(range(1000))
    # One that comes now does not wait behind them.
    looks.clear()
    made.came(1000)
    loop.run_for(3.0)
    assert 1000 in {unique for _, unique in looks}
    ended.update(range(1001))
    loop.run_for(3.0)
    assert len(made) == 0


# -- what /proc says ----------------------------------------------------------------------------

SLEEPER = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
os.write(1, b"x")
while True:
    signal.pause()
"""


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands still: what it is sent stays pending, as with one that waits for us."""
    command = [sys.executable, "-I", "-S", "-c", SLEEPER]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    assert child.stdout is not None
    try:
        assert child.stdout.read(1) == b"x"
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGUSR1, Cause.CAUGHT),
        (signal.SIGUSR2, Cause.NOTHING),
        (signal.SIGHUP, Cause.NOTHING),
        (signal.SIGTERM, Cause.FATAL),
        (signal.SIGQUIT, Cause.FATAL),
        (signal.SIGRTMIN, Cause.FATAL),
        (signal.SIGTSTP, Cause.NOTHING),
        (signal.SIGSTOP, Cause.NOTHING),
        (signal.SIGWINCH, Cause.NOTHING),
        (signal.SIGCHLD, Cause.NOTHING),
        (0, Cause.NOTHING),
    ],
)
def test_what_a_pending_signal_means(
    stopped: subprocess.Popen[bytes], number: int, cause: Cause
) -> None:
    """Caught, ignored, blocked, fatal by default (with a core or without), stops, ignored by default."""
    stopped.send_signal(number)
    assert signals.cause(stopped.pid) is cause


def test_under_a_debugger_ignored_signals_are_pending_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """... since it is shown them first (signal(7)); the program would never see them."""
    usr1 = b"%016x" % (1 << (signal.SIGUSR1 - 1))
    nothing = b"0" * 16
    masks = {
        b"SigPnd": usr1,
        b"ShdPnd": nothing,
        b"SigBlk": nothing,
        b"SigIgn": usr1,
        b"SigCgt": nothing,
    }
    monkeypatch.setattr(proc, "status", lambda _thread: masks)
    assert signals.cause(os.getpid()) is Cause.NOTHING
    masks[b"SigIgn"] = nothing
    assert signals.cause(os.getpid()) is Cause.FATAL


@pytest.mark.parametrize("thread", [0, (1 << 22) - 1])
def test_of_a_thread_that_cannot_be_seen_a_signal_is_taken_for_caught(thread: int) -> None:
    assert signals.cause(thread) is Cause.CAUGHT


TABLE = b"30 1 0:26 / {v2} rw - cgroup2 cgroup2 rw\n31 1 0:27 {root} {v1} rw - cgroup cgroup rw,freezer\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups that are played by a folder: `v2/a/b` and `v1/a`, and process 7."""
    for name in ("v2/a/b", "v1/a", "v1/x", "proc/7"):
        (tmp_path / name).mkdir(parents=True)
    for path in (tmp_path / "v2/a", tmp_path / "v2/a/b"):
        (path / "cgroup.freeze").write_text("0\n")
    for path in (tmp_path / "v1").iterdir():
        (path / "freezer.state").write_text("THAWED\n")
    monkeypatch.setattr(proc, "ROOT", str(tmp_path / "proc"))
    return tmp_path


def freezer(groups: Path, root: str = "/") -> Freezer:
    text = TABLE.replace(b"{v2}", bytes(groups / "v2")).replace(b"{v1}", bytes(groups / "v1"))
    return Freezer(mountinfo.parse(text.replace(b"{root}", root.encode())))


def test_a_group_is_frozen_with_those_above_it(groups: Path) -> None:
    (groups / "proc/7/cgroup").write_text("9:pids:/z\n6:freezer:/x\n0::/a/b\n")
    assert not freezer(groups).holds(7)
    (groups / "v2/a/cgroup.freeze").write_text("1\n")
    assert freezer(groups).holds(7)


@pytest.mark.parametrize(
    ("state", "held"), [("FREEZING", True), ("FROZEN", True), ("THAWED", False)]
)
def test_the_states_of_version_1(groups: Path, state: str, held: bool) -> None:
    (groups / "proc/7/cgroup").write_text("6:cpu,freezer:/x\n0::/a/b\n")
    (groups / "v1/x/freezer.state").write_text(f"{state}\n")
    assert freezer(groups).holds(7) is held


def test_a_part_of_the_groups_is_mounted(groups: Path) -> None:
    """As in a container without a cgroup namespace: paths are as from the top."""
    (groups / "v1/a/freezer.state").write_text("FROZEN\n")
    (groups / "proc/7/cgroup").write_text("6:freezer:/docker/1/a\n")
    assert freezer(groups, "/docker/1").holds(7)
    assert not freezer(groups, "/docker/2").holds(7)


@pytest.mark.parametrize("text", ["", "0::", "x", "6:freezer:/../../x\n0::/..\n", "::::\n\n"])
def test_what_cannot_be_understood_is_not_frozen(groups: Path, text: str) -> None:
    (groups / "proc/7/cgroup").write_text(text)
    (groups / "v1/x/freezer.state").write_text("FROZEN\n")
    assert not freezer(groups).holds(7)


def test_levels_without_end_are_not_all_looked_at(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (groups / "proc/7/cgroup").write_text("0::" + "/a" * 1000 + "\n")
    reads: list[str] = []
    plain = signals._read

    def read(path: str) -> bytes:
        reads.append(path)
        return plain(path)

    monkeypatch.setattr(signals, "_read", read)
    assert not freezer(groups).holds(7)
    assert len(reads) <= signals.LEVELS_MAX + 2
