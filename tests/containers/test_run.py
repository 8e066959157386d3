"""Where control socket and deadline lie: named by `run=`, and where /run cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dlmfs import rundir
from dlmfs.control import control_path, daemon_pid
from dlmfs.deadline import Deadline
from dlmfs.errors import MountFailed
from tests.containers.inside import dlmfs, inside
from tests.fs.nodes import DLMFS, Nodes
from tests.fs.nodes import dlmfs as outside
from tests.robust.helpers import entry_of

pytestmark = [pytest.mark.fuse, pytest.mark.root]


# -- named -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for that, which the environment names."""
    folder = tmp_path / "run"
    monkeypatch.setenv(rundir.ENVIRONMENT, str(folder))
    return folder


def test_both_sides_find_it(nodes: Nodes, run: Path) -> None:
    where = nodes.mount("a", f"run={run}")
    assert control_path(entry_of(where)).parent == run / "ctl"
    assert nodes.status(where)["node"] == "a"
    found = Deadline.find(entry_of(where).dev, 0)
    assert found is not None
    found.close()
    assert sorted(path.suffix for path in (run / "ctl").iterdir()) == [".lease", ".sock"]


def test_the_environment_is_enough(nodes: Nodes, run: Path) -> None:
    where = nodes.mount("a")
    assert control_path(entry_of(where)).parent == run / "ctl"


def test_a_container_to_which_the_folder_is_bound_asks_the_daemon(nodes: Nodes, run: Path) -> None:
    where = nodes.mount("a", "holder=file")
    (where / "dom").mkdir()
    done = dlmfs("status", "--json", where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["node"] == "a"
    done = dlmfs("lock", where / "dom/x", "--", *DLMFS, "why", where / "dom/x")
    assert (done.returncode, "has it exclusively" in done.stdout) == (0, True), done.stderr


def test_from_another_pid_namespace_the_daemon_has_no_number(nodes: Nodes, run: Path) -> None:
    where = nodes.mount("a", "holder=file")
    how = ["--pid", "--fork", "--mount-proc"]
    done = inside(*DLMFS, "doctor", "-q", where, unshare=how)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    done = inside(*DLMFS, "umount", where, unshare=how)
    assert done.returncode == 0, done.stderr
    assert "cannot be seen from this pid namespace" in done.stderr
    assert daemon_pid(entry_of(where))


def test_a_folder_that_others_can_write_is_refused(nodes: Nodes, run: Path) -> None:
    run.mkdir()
    run.chmod(0o777)
    where = nodes.folder / "a"
    where.mkdir()
    done = outside("mount", f"local:{nodes.state}", str(where), "-o", f"run={run}", check=False)
    assert done.returncode == 32
    assert f"{run} is not a folder that only this user can write" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("folder", ["run", "/", "/" + 100 * "x"])
def test_no_place(nodes: Nodes, folder: str) -> None:
    done = outside("mount", "local", str(nodes.folder), "-o", f"run={folder}", check=False)
    assert (done.returncode, "absolute path" in done.stderr) == (1, True)


def test_not_below_the_mount_point(nodes: Nodes) -> None:
    below = nodes.folder / "run"
    done = outside("mount", "local", str(nodes.folder), "-o", f"run={below}", check=False)
    assert (done.returncode, "lies below the mount point" in done.stderr) == (1, True)


# -- a /run that cannot be written -----------------------------------------------------------------

FULL = "dd if=/dev/zero of={0}/full bs=4k 2>/dev/null || true"
NO_RUN = {
    "read-only": "mount -o remount,ro /run",
    "full": "mount -o remount,size=64k /run; " + FULL.format("/run"),
    "no inodes": "mount -o remount,nr_inodes=4 /run; touch /run/1 /run/2 /run/3 /run/4 2>/dev/null",
    "read-only, made": "mkdir -p /run/dlmfs/ctl; mount -o remount,ro /run",
}
MOUNT = """{command} mount local:{state} {where} {options} &&
{command} status {where} && {command} umount {where}"""


def mounted(nodes: Nodes, broken: str, options: str = "") -> tuple[int, str]:
    """What comes of mounting, asking and unmounting in a container."""
    where = nodes.folder / "a"
    where.mkdir()
    words = {"command": " ".join(DLMFS), "state": nodes.state, "where": where}
    script = MOUNT.format(options=options, **words)
    done = inside("sh", "-c", script, after=f"({broken})")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("how", NO_RUN)
def test_another_place_serves_where_run_cannot_be_written(nodes: Nodes, how: str) -> None:
    code, said = mounted(nodes, NO_RUN[how])
    assert (code, "node " in said) == (0, True), said


@pytest.mark.parametrize("how", NO_RUN)
def test_no_place_at_all_is_a_sentence(nodes: Nodes, how: str) -> None:
    broken = (
        f"{NO_RUN[how]}; {NO_RUN[how].replace('/run', '/dev/shm').replace('/dlmfs/', '/dlmfs-0/')}"
    )
    code, said = mounted(nodes, broken)
    assert code == 32, said
    assert "no place for the" in said
    assert "-o run=DIR" in said
    assert "internal error" not in said
    assert said.count("\n") == 1
    assert not os.path.ismount(nodes.folder / "a")


def test_run_is_the_way_out(nodes: Nodes) -> None:
    broken = f"{NO_RUN['read-only']}; {NO_RUN['read-only'].replace('/run', '/dev/shm')}"
    code, said = mounted(nodes, broken, f"-o run={nodes.folder}/run")
    assert code == 0, said
    assert f"its socket is in {nodes.folder}/run/ctl where it runs" in said
    code, said = mounted_with_environment(nodes, broken)
    assert code == 0, said


def mounted_with_environment(nodes: Nodes, broken: str) -> tuple[int, str]:
    words = {"command": " ".join(DLMFS), "state": nodes.state, "where": nodes.folder / "a"}
    script = MOUNT.format(options="", **words)
    done = inside("env", f"DLMFS_RUN={nodes.folder}/run", "sh", "-c", script, after=f"({broken})")
    return done.returncode, done.stdout + done.stderr


def test_what_was_begun_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_folder: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(MountFailed, match=r"no place for the thing: .*/x: No space left on device"):
        rundir.put(full, "thing", str(tmp_path / "x"))
