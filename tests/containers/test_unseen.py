"""Where the control socket is not to be seen: no command calls a living daemon dead."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dlmfs import control
from dlmfs.control import control_path
from dlmfs.errors import DaemonDead, Unseen
from dlmfs.fuse import mountinfo
from tests.containers.inside import dlmfs, inside, shared
from tests.fs.nodes import DLMFS, Nodes
from tests.fs.nodes import dlmfs as outside
from tests.robust.helpers import entry_of, kill, stopped

pytestmark = [pytest.mark.fuse, pytest.mark.root]

WRONG = ("is gone", "is dead", "DEAD", "dlmfs umount")
"""What must not be said of a living daemon, and whom it would hit."""


@pytest.fixture
def where(nodes: Nodes) -> Path:
    made = nodes.mount("a", "holder=file")
    (made / "dom").mkdir()
    return made


def test_a_lock_is_taken_where_the_daemon_cannot_be_asked(where: Path) -> None:
    done = dlmfs("lock", where / "dom/x", "--", "echo", "took")
    assert (done.returncode, done.stdout) == (0, "took\n"), done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("status", "."),
        ("status", "--json", "."),
        ("doctor", "-q", "."),
        ("nodes", "."),
        ("evict", "b", "."),
        ("info", "dom/x"),
        ("why", "dom/x"),
        ("why", "--json", "dom/x"),
        ("top", "--once", "."),
        ("value", "get", "--stale", "dom/x"),
    ],
    ids=" ".join,
)
def test_no_command_calls_a_living_daemon_dead(where: Path, command: tuple[str, ...]) -> None:
    outside("lock", str(where / "dom/x"), "--", "true")
    *words, place = command
    done = dlmfs(*words, where / place)
    said = done.stdout + done.stderr
    assert "cannot be asked from here" in said, said
    assert "it lives" in said, said
    assert not [word for word in WRONG if word in said], said
    assert done.returncode in ((0,) if words[0] in ("top", "status") else (1, 69)), said
    assert "(node a, HEALTHY; its socket is in /run/dlmfs/ctl where it runs)" in said, said
    assert "internal error" not in said


def test_what_the_mount_tells_is_told(nodes: Nodes, where: Path) -> None:
    """Node, state, who has which lock and who waits: as far as this node knows."""
    outside("lock", str(where / "dom/idle"), "--", "true")
    holder = nodes.hold(where / "dom/x")
    assert holder.wait() == "held"
    pid = holder.process.pid
    for command, head in (
        (("status", where), f"{where}  node a  HEALTHY"),
        (("info", where / "dom/x"), "dom/x  this node has EX"),
        (("why", where / "dom/x"), "dom/x  this node has EX"),
    ):
        done = dlmfs(*command)
        assert done.stdout.startswith(head), done.stdout + done.stderr
        assert f"held by    EX  pid {pid} " in done.stdout
        assert "idle" not in done.stdout
    row = json.loads(dlmfs("status", "--json", where).stdout)[0]["unseen"]
    assert row["status"]["lease"]["state"] == "HEALTHY"
    assert row["locks"][0]["holders"][0]["pid"] == pid


def test_what_modes_keep_from_a_user_is_not_told_there(nodes: Nodes, where: Path) -> None:
    (where / "dom/x").touch(mode=0o600)
    assert nodes.hold(where / "dom/x").wait() == "held"
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    done = inside(*user, *DLMFS, "why", where / "dom/x")
    assert (done.returncode, done.stdout) == (69, ""), done.stdout
    done = inside(*user, *DLMFS, "status", where)
    assert "dom/x" not in done.stdout


def test_a_removed_socket_is_no_death(where: Path) -> None:
    path = control_path(entry_of(where))
    path.rename(path.with_suffix(".away"))
    try:
        with pytest.raises(Unseen, match="it lives"):
            control.ask(entry_of(where), {"cmd": "status"})
        with pytest.raises(Unseen, match="it lives"):
            control.daemon_pid(entry_of(where))
    finally:
        path.with_suffix(".away").rename(path)


def test_a_socket_on_which_nobody_listens_is_no_death(where: Path) -> None:
    """One that a dead daemon left, whose device number is another mount's by now."""
    path = control_path(entry_of(where))
    away = path.rename(path.with_suffix(".away"))
    import socket

    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    try:
        with pytest.raises(Unseen, match="it lives"):
            control.ask(entry_of(where), {"cmd": "status"})
    finally:
        away.rename(path)


def test_a_stopped_daemon_hangs_no_command(where: Path) -> None:
    with stopped(where):
        done = dlmfs("status", where)
    assert done.returncode == 69
    assert "the mount does not answer, as that of a stopped daemon" in done.stdout
    assert not [word for word in WRONG if word in done.stdout], done.stdout


def test_a_dead_daemon_is_called_dead_there_too(nodes: Nodes, where: Path) -> None:
    kill(where)
    done = dlmfs("status", where)
    assert (done.returncode, "is gone: `dlmfs umount" in done.stdout) == (69, True)
    with pytest.raises(DaemonDead):
        control.ask(entry_of(where), {"cmd": "status"})


# -- umount ----------------------------------------------------------------------------------------------


def test_umount_takes_only_its_own_mount_away(where: Path) -> None:
    done = dlmfs("umount", where)
    assert done.returncode == 0, done.stderr
    assert "is unmounted here; its daemon, which cannot be seen, may go on" in done.stderr
    assert json.loads(outside("status", "--json", str(where)).stdout)[0]["node"] == "a"


def test_umount_of_what_is_in_use_is_refused(where: Path) -> None:
    """It was lazy there: `-l` is the user's to say."""
    done = dlmfs("umount", where, after=f"exec 9<>{where}/dom/x" if touch(where) else "")
    assert (done.returncode, "is in use" in done.stderr) == (32, True), done.stderr
    done = dlmfs("umount", "-l", where, after=f"exec 9<>{where}/dom/x")
    assert done.returncode == 0, done.stderr


def touch(where: Path) -> bool:
    (where / "dom/x").touch()
    return True


@pytest.mark.parametrize("how", [(), ("-l",)], ids=["", "lazy"])
def test_umount_never_takes_a_shared_mount_from_the_host(
    tmp_path: Path, how: tuple[str, ...]
) -> None:
    with shared(tmp_path):
        nodes = Nodes(tmp_path)
        try:
            where = nodes.mount("a", "holder=file")
            (where / "dom").mkdir()
            done = dlmfs("umount", *how, where, propagation="unchanged")
            assert done.returncode == 32, done.stderr
            assert f"Nothing was unmounted: {tmp_path} is shared" in done.stderr
            assert mountinfo.find(str(where)) is not None
            assert nodes.status(where)["node"] == "a"

            advice = done.stderr.partition("After `")[2].partition("`")[0]
            done = dlmfs("umount", where, propagation="unchanged", after=advice)
            assert (done.returncode, "is unmounted here" in done.stderr) == (0, True), done.stderr
            assert nodes.status(where)["node"] == "a"
            os.kill(nodes.pid(where), signal.SIGTERM)
        finally:
            nodes.close()
