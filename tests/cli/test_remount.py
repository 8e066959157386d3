"""`mount -o remount`, and the rest of what mount(8) asks of a helper: -f, -s, -N, -n, -v."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from dlmfs.fuse import mountinfo
from tests.fs.conftest import nodes as _nodes
from tests.fs.helper import helper as _helper
from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs

nodes = _nodes
helper = _helper
pytestmark = [pytest.mark.fuse, pytest.mark.root]


def flags(where: Path) -> set[str]:
    """Of the mount, with `ro` for the whole file system as "RO"."""
    (entry,) = [e for e in mountinfo.mounts() if e.mountpoint == str(where)]
    return {*entry.options, *(["RO"] if "ro" in entry.super_options else [])} - {"rw"}


ALWAYS = {"nosuid", "nodev"}


def remount(nodes: Nodes, where: Path, words: str) -> tuple[int, str]:
    """The exit code, and what was complained of."""
    words = f"remount,{words}" if words else "remount"
    done = dlmfs("mount", f"local:{nodes.state}", str(where), "-o", words, check=False)
    assert done.stdout == ""
    assert done.stderr.count("\n") == (done.returncode != 0)
    return done.returncode, done.stderr


def test_flags_change_and_others_stay(nodes: Nodes) -> None:
    where = nodes.mount("a", "noexec")
    pid = nodes.pid(where)
    (where / "dom").mkdir()
    with open(where / "dom/x", "a"):
        pass
    for words, shown in (
        ("ro", {"ro", "RO", "noexec", "relatime"}),
        ("", {"ro", "RO", "noexec", "relatime"}),
        ("noatime", {"ro", "RO", "noexec", "noatime"}),
        ("rw,exec", {"noatime"}),
        ("atime", {"relatime"}),
    ):
        assert remount(nodes, where, words) == (0, "")
        assert flags(where) == ALWAYS | shown, words
    assert nodes.pid(where) == pid
    assert os.listdir(where / "dom") == ["x"]


def test_what_mount_8_repeats_is_taken(nodes: Nodes) -> None:
    """What fstab says and has said, what the mount table shows, and what the daemon chose itself."""
    where = nodes.mount("a", "holder=file", "max_locks=1000")
    told = "rw,relatime,user_id=0,group_id=0,default_permissions,allow_other,_netdev,nofail,user,noexec"
    assert remount(nodes, where, told) == (0, "")
    assert flags(where) == ALWAYS | {"noexec", "relatime"}
    same = "ro,holder=file,node=a,max_locks=1000,user_share=50,ttl=15,lock-delay=2,grace=2"
    assert remount(nodes, where, same) == (0, "")
    done = dlmfs("mount", "none", str(where), "-o", "remount,rw", check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_would_be_another_daemon_is_refused_whole(nodes: Nodes) -> None:
    where = nodes.mount("a", "max_locks=1000")
    for words, says in (
        ("holder=file", "it is mounted without holder="),
        ("max_locks=7", "it is mounted with max_locks=1000"),
        ("node=b", "it is mounted with node=a"),
        ("lock-delay=0", "without lock-delay="),
        ("insecure-password", "without insecure-password"),
    ):
        code, text = remount(nodes, where, f"ro,{words}")
        assert code == 1
        assert f"{words} cannot be changed by a remount ({says}" in text or says in text
        assert flags(where) == ALWAYS | {"relatime"}
    done = dlmfs("mount", "local:other", str(where), "-o", "remount", check=False)
    assert f"local:{nodes.state} is mounted there" in done.stderr
    code, text = remount(nodes, where, "rw,hodler=file")
    assert (code, "did you mean 'holder'" in text) == (1, True)
    code, text = remount(nodes, where / "nothing", "ro")
    assert (code, "nothing to remount" in text) == (1, True)


def test_read_only_while_a_lock_is_held_exclusively(nodes: Nodes) -> None:
    where = nodes.mount("a")
    (where / "dom").mkdir()
    with open(where / "dom/x", "a"):
        code, text = remount(nodes, where, "ro")
    assert (code, "is in use" in text) == (32, True)
    assert flags(where) == ALWAYS | {"relatime"}


def test_a_daemon_that_is_stopped_keeps_nobody_from_it(nodes: Nodes) -> None:
    where = nodes.mount("a")
    pid = nodes.pid(where)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert remount(nodes, where, "ro") == (0, "")
        assert flags(where) == ALWAYS | {"relatime", "ro", "RO"}
        code, text = remount(nodes, where, "rw,holder=node")
        assert (code, "is not known" in text) == (32, True)
    finally:
        os.kill(pid, signal.SIGCONT)


# -- by mount(8) itself --------------------------------------------------------------------------------


def mount(*words: str | Path, code: int = 0) -> str:
    """Run mount(8); what it, or the helper, said on standard error."""
    done = subprocess.run(
        ["mount", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def test_mount_8_remounts(nodes: Nodes, helper: Path) -> None:
    """As a user does, and as systemd reloads a mount unit."""
    assert helper.exists()
    where = nodes.mount("a", "holder=file")
    source = f"local:{nodes.state}"
    mount("-o", "remount,ro", where)
    assert flags(where) >= ALWAYS | {"ro", "RO"}
    unit = ["-t", "fuse.dlmfs", source, str(where), "-o"]
    mount(*unit, "remount,holder=file,noexec")
    assert flags(where) == ALWAYS | {"noexec", "relatime"}
    assert "holder=node cannot be changed" in mount(*unit, "remount,holder=node,noexec", code=1)
    assert nodes.status(where)["holder_rule"] == "file"


def test_a_fake_mount_looks_and_mounts_nothing(nodes: Nodes, helper: Path) -> None:
    assert helper.exists()
    where = nodes.folder / "f"
    where.mkdir()
    words = ["-f", "-n", "-v", "-t", "fuse.dlmfs", f"local:{nodes.state}"]
    mount(*words, where, "-o", "holder=file")
    assert not nodes.state.exists()
    assert "choose holder=" in mount(*words, where, "-o", "holder=x", code=1)
    assert "does not exist" in mount(*words, where / "no", "-o", "holder=file", code=1)
    a = nodes.mount("a")
    assert "already mounted" in mount(*words, a, code=32)
    mount(*words, a, "-o", "remount,ro")
    assert flags(a) == ALWAYS | {"relatime"}
    nodes.kill(a)
    mount(*words, a)
    assert [e for e in mountinfo.mounts() if e.mountpoint == str(a)], "it was cleared"


def test_a_sloppy_mount_passes_over_what_it_does_not_know(nodes: Nodes, helper: Path) -> None:
    """But not in silence; and what it knows must still be right."""
    assert helper.exists()
    where = nodes.folder / "s"
    where.mkdir()
    nodes.mounts.append(where)
    words = ["-s", "-t", "fuse.dlmfs", f"local:{nodes.state}", str(where), "-o"]
    assert "choose holder=" in mount(*words, "intr,holder=x", code=1)
    assert "takes a value" in mount(*words, "ttl", code=1)
    said = mount(*words, "intr,rsize=8192,holder=file")
    assert said.count("passed over") == 2
    assert nodes.status(where)["holder_rule"] == "file"


def test_a_mount_in_another_namespace(nodes: Nodes, helper: Path) -> None:
    """`mount -N`: it is there, with its control socket, and not here."""
    assert helper.exists()
    where = nodes.folder / "n"
    where.mkdir()
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"\n"
            there = f"/proc/{other.pid}/ns/mnt"
            mount(
                "-N", there, "-t", "fuse.dlmfs", f"local:{nodes.state}", where, "-o", "holder=file"
            )
            inside = ["nsenter", f"--mount={there}"]
            shown = subprocess.run(
                [*inside, "stat", "-f", "-c", "%T", where], capture_output=True, check=True
            )
            assert shown.stdout == b"fuseblk\n" or b"fuse" in shown.stdout
            assert [e for e in mountinfo.mounts() if e.mountpoint == str(where)] == []
            subprocess.run([*inside, "umount", where], check=True, timeout=PATIENCE_S)
            refused = mount(
                "-N", there, "-t", "fuse.dlmfs", f"local:{nodes.state}", "/no/such", code=1
            )
            assert "does not exist" in refused
        finally:
            other.stdin.close()
