"""What the tests of broken surroundings share: workers under load, places that fill up, checks."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dlmfs import control
from dlmfs.fuse import mount as fuse_mount
from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs

LONG = bool(os.environ.get("DLMFS_LONG"))

GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV}
"""What a program sees whose daemon has died (fuse-notes 12)."""


class Worker:
    """A process that works and writes a line for each thing done; its lines are read as they come."""

    def __init__(self, program: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as out:
            for line in out:
                with self._changed:
                    self.lines.append(line.decode().rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        """Until it has written so many more lines from now on."""
        with self._changed:
            wanted = len(self.lines) + more
            assert self._changed.wait_for(
                lambda: self._over or len(self.lines) >= wanted, PATIENCE_S
            ), f"no progress: {self.lines[-3:]}"
            assert len(self.lines) >= wanted, f"it ended: {self.lines[-3:]}"

    def wait_until_over(self) -> list[str]:
        """All its lines, once it has ended by itself."""
        self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return self.lines

    def stop(self) -> list[str]:
        if self.process.poll() is None:
            self.process.kill()
        return self.wait_until_over()


def entry_of(where: Path) -> fuse_mount.MountEntry:
    entry = fuse_mount.find(str(where))
    assert entry is not None
    assert entry.is_dlmfs, f"no dlmfs at {where}"
    return entry


def daemon_pid(where: Path) -> int | None:
    """The daemon's process by its control socket: works for a stopped one too."""
    entry = fuse_mount.find(str(where))
    if entry is None or not entry.is_dlmfs:
        return None
    return control.daemon_pid(entry)


@contextlib.contextmanager
def stopped(where: Path) -> Iterator[int]:
    """The daemon of this mount is stopped; it goes on in any case."""
    pid = daemon_pid(where)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        limit = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < limit
            os.sched_yield()
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def remount(nodes: Nodes, name: str, *options: str) -> Path:
    """Mount again where a dead mount still stands; at once, without clearing it first."""
    where = nodes.folder / name
    opts = ",".join([f"node={name}", *options])
    done = dlmfs("mount", f"local:{nodes.state}", str(where), "-o", opts, check=False)
    assert done.returncode == 0, done.stderr
    return where


def below(folder: str | Path) -> list[str]:
    """Mount points at or below a folder."""
    prefix = str(folder).rstrip("/")
    points = [e.mountpoint for e in fuse_mount.mounts()]
    return [p for p in points if p == prefix or p.startswith(prefix + "/")]


def sound(state: Path) -> bool:
    """Whether SQLite finds nothing wrong with the state, seen from a process of its own kind."""
    conn = sqlite3.connect(f"file:{state}?mode=ro", uri=True, timeout=PATIENCE_S)
    try:
        return bool(conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
    finally:
        conn.close()


def ended(pidfd: int, within_s: float = PATIENCE_S) -> bool:
    """Whether the process of a pidfd ends within that time."""
    return bool(select.select([pidfd], [], [], within_s)[0])


@contextlib.contextmanager
def watched(pid: int) -> Iterator[int]:
    """A pidfd: it names this process for good, and tells of its end."""
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def daemon_of(where: Path) -> Iterator[int]:
    """A pidfd of a mount's daemon."""
    pid = daemon_pid(where)
    assert pid is not None, f"no daemon at {where}"
    with watched(pid) as handle:
        yield handle


def kill(where: Path) -> None:
    """SIGKILL for a mount's daemon; returns when it is gone."""
    with daemon_of(where) as handle:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert ended(handle)


def leaves(where: Path, within_s: float = PATIENCE_S) -> None:
    """umount works, and the daemon ends by itself."""
    with daemon_of(where) as handle:
        done = subprocess.run(["umount", str(where)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ended(handle, within_s), "the daemon of an unmounted node goes on"


def wanted(fd: int) -> None:
    """Until another node waits for this open lock."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000), "nobody asked for the lock"


def finish(pid: int) -> None:
    """Kill a daemon that a failed test left behind, stopped or not."""
    with contextlib.suppress(ProcessLookupError), watched(pid) as handle:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        ended(handle)


def daemons_below(folder: Path) -> list[int]:
    """Processes that have the folder in their command line, as all daemons of a test have."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                if b"mount" in words and any(os.fsencode(folder) in word for word in words):
                    found.append(int(name))
    return found


@contextlib.contextmanager
def tmpfs(options: str) -> Iterator[Path]:
    """A tmpfs of one's own."""
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-tiny-"))
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        folder.rmdir()


@contextlib.contextmanager
def fusectl() -> Iterator[Path]:
    """The kernel's FUSE control file system, at a place of its own."""
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-ctl-"))
    try:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.rmdir()


def error_of(call: Callable[[], object]) -> int:
    """0, or the errno that it fails with."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


USE = """
import os, sys
path, fd, data = sys.argv[2], int(sys.argv[2]) if sys.argv[2].isdigit() else -1, sys.argv[3].encode()
try:
    match sys.argv[1]:
        case "write": os.pwrite(fd, data, 0)
        case "read": os.write(1, os.pread(fd, 64, 0).rstrip(b"\\0") + b"\\n")
        case "open": os.open(path, os.O_RDWR | os.O_CREAT)
        case "try": os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        case "mkdir": os.mkdir(path)
    print(0)
except OSError as error:
    print(error.errno)
"""


def use(where: Path, what: str, on: Path | int, data: str = "") -> tuple[int, str]:
    """The errno (0: none) of one operation on a mount, by a process of its own, and what it read.

    A daemon that leaves it unanswered is killed: nothing else ends the process then.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", USE, what, str(on), data],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(on,) if isinstance(on, int) else (),
    )
    try:
        out, _ = child.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        pid = daemon_pid(where)
        if pid is not None:
            finish(pid)
        child.kill()
        child.communicate(timeout=PATIENCE_S)
        raise AssertionError(f"{what} was not answered for {PATIENCE_S:.0f} s") from None
    *read, code = out.splitlines()
    return int(code), "".join(read)
