"""The medium under the state: full, read-only from the start, read-only while in use.

Full: what needs a commit fails with ENOSPC and is as if it had not been tried; what was held stays
held. Read-only while in use (what ext4 does after an error): nothing can be promised any more, so
every operation ends with an error instead of a wait.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fs.nodes import Holder, Nodes, dlmfs
from tests.robust.helpers import (
    LONG,
    Worker,
    daemon_of,
    daemon_pid,
    ended,
    error_of,
    finish,
    kill,
    leaves,
    remount,
    sound,
    tmpfs,
    use,
    wanted,
)

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(600 if LONG else 120)]

QUICKLY_S = 15.0
"""Less than what a clean end waits for a store that may come back (node.LEAVE_MAX_S)."""

LOST = {errno.EIO, errno.ENOLCK, errno.ENOSPC, errno.EROFS}


class Full:
    """Takes up all the space beside a state file until told to free it."""

    def __init__(self, folder: Path) -> None:
        self.ballast = folder / "ballast"

    def fill(self) -> None:
        with open(self.ballast, "wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def small(nodes: Nodes, tiny: Path) -> Full:
    """The nodes' state is on a small file system."""
    nodes.state = tiny / "state.db"
    return Full(tiny)


def write_until_full(fd: int) -> bytes:
    """Change the value until that fails; the last one that was acknowledged.

    Pages that the log has already are written over first, so it may take some writes.
    """
    kept = b""
    for n in range(100_000):
        value = b"%08d" % n
        code = error_of(partial(os.pwrite, fd, value, 0))
        if code:
            assert code == errno.ENOSPC, os.strerror(code)
            return kept
        kept = value
    raise AssertionError("the disk is not full")


def test_full_disk_errors_are_clear_and_nothing_is_lost(nodes: Nodes, small: Full) -> None:
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, b"kept", 0)
        small.fill()
        kept = write_until_full(fd) or b"kept"
        assert os.pread(fd, len(kept), 0) == kept
        assert use(a, "open", a / "dom/new") == (errno.ENOSPC, "")
        assert use(b, "try", b / "dom/x")[0] in (errno.ENOSPC, errno.ETXTBSY)
        assert use(b, "open", b / "dom/x") == (errno.ENOSPC, "")
        assert use(b, "mkdir", b / "more") == (errno.ENOSPC, "")
        for where in (a, b):
            assert nodes.status(where)["lease"]["state"] == "HEALTHY"
        small.free()
        assert os.pread(fd, len(kept), 0) == kept
        assert os.pwrite(fd, b"after", 0) == 5
        assert use(b, "mkdir", b / "more") == (0, "")
        waiter = nodes.hold(b / "dom/x")
        wanted(fd)
    finally:
        os.close(fd)
    assert waiter.wait() == "held"
    with open(b / "dom/x", "rb") as file:
        assert file.read(5) == b"after"
    assert sound(nodes.state)


def test_dlmfs_value_on_a_full_disk(nodes: Nodes, small: Full) -> None:
    """It says what is wrong, and the value that was there is still there; at each node, at once."""
    a, b = nodes.pair()
    x = a / "dom/x"

    def value(*args: object, code: int = 0) -> str:
        done = dlmfs("value", *map(str, args), check=False)
        assert done.returncode == code, done
        return done.stderr if code else done.stdout

    value("set", x, "kept")
    value("set", b / "dom/other", "1")
    fd = os.open(a / "dom/own", os.O_RDWR | os.O_CREAT)
    held = os.open(x, os.O_RDWR)  # so that its commit is the write's
    try:
        small.fill()
        write_until_full(fd)
        for path in (x, a / "dom/new"):
            told = value("set", path, "lost", code=69)
            assert told.startswith(f"dlmfs: {path}")
            assert "the state is full" in told
            assert told.count("\n") == 1
        assert value("get", x) == "kept\n"
        assert value("get", "--stale", b / "dom/x") == "kept\n"
        for where in (a, b):
            assert nodes.status(where)["lease"]["state"] == "HEALTHY"
        small.free()
        value("set", x, "after")
    finally:
        os.close(fd)
        os.close(held)
    assert value("get", b / "dom/x") == "after\n"
    assert value("get", a / "dom/other") == "1\n"
    assert sound(nodes.state)


def full_with_waiter(nodes: Nodes, small: Full) -> tuple[Path, Path, int, Holder]:
    """a holds x with a value, b waits for it, the disk is full."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    waiter = nodes.hold(b / "dom/x")
    wanted(fd)
    small.fill()
    write_until_full(fd)
    return a, b, fd, waiter


def test_a_hand_over_on_a_full_disk_is_made_up_for(nodes: Nodes, small: Full) -> None:
    a, b, fd, waiter = full_with_waiter(nodes, small)
    value = os.pread(fd, 64, 0)
    os.close(fd)
    assert nodes.status(a)["lease"]["state"] == "HEALTHY"
    small.free()
    assert waiter.wait() == "held"
    with open(b / "dom/x", "rb") as file:
        assert file.read() == value


def test_a_death_on_a_full_disk_is_made_up_for(nodes: Nodes, small: Full) -> None:
    a, b, fd, waiter = full_with_waiter(nodes, small)
    value = os.pread(fd, 64, 0)
    kill(a)
    os.close(fd)
    assert nodes.status(b)["lease"]["state"] == "HEALTHY"
    small.free()
    assert waiter.wait() == "held"
    with open(b / "dom/x", "rb") as file:
        assert file.read() == value
    (remount(nodes, "a") / "dom").mkdir()


def test_umount_on_a_full_disk(nodes: Nodes, small: Full) -> None:
    """It waits for space; with DLMFS_LONG, until it goes without: then as if the node had died."""
    a, b, fd, waiter = full_with_waiter(nodes, small)
    os.close(fd)
    with daemon_of(a) as handle:
        assert subprocess.run(["umount", str(a)], check=False).returncode == 0
        if not LONG:
            small.free()
        assert ended(handle, 60)
    if LONG:
        small.free()
    assert waiter.wait() == "held"
    assert sound(nodes.state)
    assert nodes.status(b)["domains"][0]["members"] == ["b"]


def test_a_third_node_is_refused_on_a_full_disk(nodes: Nodes, small: Full) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        small.fill()
        write_until_full(fd)
        b = nodes.folder / "b"
        b.mkdir()
        done = dlmfs("mount", f"local:{nodes.state}", str(b), "-o", "node=b", check=False)
        assert done.returncode == 32
        assert "no space left" in done.stderr
        small.free()
        assert os.pwrite(fd, b"still here", 0)
    finally:
        os.close(fd)
    nodes.mount("b")


CHURN = """
import os, sys
acknowledged, full = 0, 0
while True:
    try:
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        try:
            n = int(os.pread(fd, 64, 0).rstrip(b"\\0") or b"0") + 1
            os.pwrite(fd, b"%d" % n, 0)
            os.write(1, b"%d\\n" % n)
        finally:
            os.close(fd)
    except OSError as error:
        os.write(1, b"error %d\\n" % error.errno)
"""


def test_a_disk_that_fills_and_empties_under_load(nodes: Nodes, small: Full) -> None:
    """Two nodes count in one value all the time; each acknowledged increment is there at the end."""
    mounts = nodes.pair()
    workers = [Worker(CHURN, where / "dom/n") for where in mounts]
    fd = os.open(mounts[0] / "dom/own", os.O_RDWR | os.O_CREAT)
    try:
        for worker in workers:
            worker.wait_for(20)
        for _ in range(20 if LONG else 1):
            small.fill()  # what waits for a hand-over now goes on waiting; what is new fails
            for n in range(2000):  # once the log has its full size it needs no more space
                if error_of(partial(os.pwrite, fd, b"%d" % n, 0)):
                    break
            small.free()
            for worker in workers:
                worker.wait_for(20)
    finally:
        os.close(fd)
        lines = [worker.stop() for worker in workers]
    errors = {line for each in lines for line in each if line.startswith("error")}
    assert errors <= {f"error {errno.ENOSPC}"}
    values = [int(line) for each in lines for line in each if not line.startswith("error")]
    assert len(set(values)) == len(values), "an increment was lost"
    with open(mounts[0] / "dom/n", "rb", buffering=0) as file:
        last = int(file.read().rstrip(b"\0"))
    assert max(values) <= last <= len(values) + len(workers)
    assert sound(nodes.state)


def test_a_file_system_smaller_than_the_log(nodes: Nodes) -> None:
    """SQLite's log grows to 8 MB before it starts again: where there is no room for that, it must
    start again earlier, since there is nothing that anybody could free."""
    with tmpfs("mode=700,size=1m") as folder:
        nodes.state = folder / "state.db"
        where = nodes.mount("a")
        (where / "dom").mkdir()
        fd = os.open(where / "dom/x", os.O_RDWR | os.O_CREAT)
        try:
            for n in range(2000):
                os.pwrite(fd, b"%d" % n, 0)
        finally:
            os.close(fd)
            nodes.close()


def test_a_read_only_state_file_is_refused(nodes: Nodes) -> None:
    """Bound read-only, since modes do not stop root. The folder: tests/cli."""
    where = nodes.mount("a")
    dlmfs("umount", str(where))
    subprocess.run(["mount", "--bind", str(nodes.state), str(nodes.state)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(nodes.state)], check=True)
        source = f"local:{nodes.state}"
        done = dlmfs("mount", source, str(where), check=False)
        assert done.returncode in (1, 32)
        assert f"cannot open the state file {nodes.state}" in done.stderr
        assert "read" in done.stderr
    finally:
        subprocess.run(["umount", str(nodes.state)], check=True)
    nodes.mount("a")


@pytest.fixture
def disk(nodes: Nodes) -> Iterator[Path]:
    """An ext4 of its own for the state; the file in it that, written to, is an error of the disk."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    image, folder = nodes.folder / "image", nodes.folder / "disk"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    made = subprocess.run(
        ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    try:
        found = subprocess.run(
            ["findmnt", "-no", "SOURCE", str(folder)], capture_output=True, text=True, check=True
        )
        trigger = Path("/sys/fs/ext4", Path(found.stdout.strip()).name, "trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel cannot make an error of ext4 on demand")
        nodes.state = folder / "state.db"
        yield trigger
    finally:
        pids = [pid for where in nodes.mounts if (pid := daemon_pid(where)) is not None]
        nodes.close()
        for pid in pids:
            finish(pid)
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
def test_a_file_system_that_turns_read_only_in_use(nodes: Nodes, disk: Path, pair: bool) -> None:
    mounts = [nodes.mount(name) for name in ("ab" if pair else "a")]
    for where in mounts:
        (where / "dom").mkdir()
    a, b = mounts[0], mounts[-1]
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, b"kept", 0)
        disk.write_text("test")
        code, _ = use(a, "write", fd, "lost")
        assert code in LOST, os.strerror(code)
        for where in mounts:
            for what, name in (("try", "dom/y"), ("open", "dom/z"), ("mkdir", "more")):
                code, _ = use(where, what, where / name)
                assert code in LOST, f"{what}: {os.strerror(code)}"
            reason = str(nodes.status(where)["lease"]["reason"])
            assert "internal error" not in reason
        if pair:
            assert use(b, "try", b / "dom/x")[0] in LOST | {errno.ETXTBSY}
    finally:
        os.close(fd)
    for where in mounts:
        leaves(where, QUICKLY_S)


def test_a_full_disk_at_the_first_mount(nodes: Nodes, tiny: Path) -> None:
    """Refused, and the half-made file is no obstacle later."""
    full = Full(tiny)
    full.fill()
    where = nodes.folder / "a"
    where.mkdir()
    nodes.mounts.append(where)
    command = ("mount", f"local:{tiny}/state.db", str(where), "-o", "node=a")
    done = dlmfs(*command, check=False)
    assert done.returncode == 32
    assert "no space left" in done.stderr
    full.free()
    done = dlmfs(*command, check=False)
    assert done.returncode == 0, done.stderr
    (where / "dom").mkdir()
