"""Mount flags: what the mount table shows, and that the kernel acts on it."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from dlmfs.fuse import mountinfo
from tests.fs.nodes import PATIENCE_S, Nodes

pytestmark = pytest.mark.fuse

STATVFS = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
STATVFS["noatime"] = os.ST_NOATIME


def entry(where: Path) -> mountinfo.MountEntry:
    """The line of /proc/self/mountinfo."""
    (found,) = [e for e in mountinfo.mounts() if e.mountpoint == str(where)]
    return found


def flags(where: Path) -> set[str]:
    """The per-mount flags, and that statvfs(2) says the same."""
    shown = set(entry(where).options) & set(STATVFS)
    told = os.statvfs(where).f_flag
    assert {name for name, bit in STATVFS.items() if told & bit} == shown
    return shown


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), {"nosuid", "nodev"}),
        (("noexec",), {"nosuid", "nodev", "noexec"}),
        (("noexec", "exec"), {"nosuid", "nodev"}),
        (("noatime",), {"nosuid", "nodev", "noatime"}),
        (("ro",), {"nosuid", "nodev", "ro"}),
        (("ro", "rw"), {"nosuid", "nodev"}),
        (("rw", "suid", "dev", "exec", "auto", "nouser", "async"), {"nosuid", "nodev"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)
def test_the_flags_in_the_mount_table(
    nodes: Nodes, options: tuple[str, ...], shown: set[str]
) -> None:
    """nosuid and nodev are always on, also with what mount(8) passes for `defaults`."""
    assert flags(nodes.mount("a", *options)) == shown


def test_source_type_and_owner_in_the_mount_table(nodes: Nodes) -> None:
    plain, named = nodes.mount("a"), nodes.mount("b", "fsname=jobs")
    assert entry(plain).fstype == "fuse.dlmfs"
    assert entry(plain).source == f"local:{nodes.state}"
    assert entry(named).source == "jobs"
    inside = set(entry(plain).super_options)
    assert {f"user_id={os.getuid()}", f"group_id={os.getgid()}", "default_permissions"} <= inside
    assert ("allow_other" in inside) == (os.getuid() == 0)


def program(where: Path) -> Path:
    """A lock whose value is a script and whose mode says that it may be executed."""
    (where / "dom").mkdir()
    path = where / "dom/run"
    path.write_bytes(b"#!/bin/sh\nexit 0\n" + b"\n" * 47)
    path.chmod(0o6755)
    return path


def execute(path: Path) -> int:
    """What execve(2) answers."""
    try:
        subprocess.run([path], timeout=PATIENCE_S, check=False)
    except OSError as error:
        return error.errno or -1
    return 0


def test_noexec_is_enforced_before_the_lock_is_asked_for(nodes: Nodes) -> None:
    """EACCES at once, also while another node holds it."""
    a, b = nodes.mount("a", "noexec"), nodes.mount("b")
    path = program(a)
    assert execute(path) == errno.EACCES
    (b / "dom").mkdir()
    holder = nodes.hold(b / "dom/run")
    assert holder.wait() == "held"
    assert execute(path) == errno.EACCES
    assert os.getxattr(path, "user.dlmfs.mode") == b"NL"


def test_a_lock_is_no_program(nodes: Nodes) -> None:
    """The kernel's dlmfs: EINVAL, though the mode allows it. At least it must not run."""
    assert execute(program(nodes.mount("a"))) in (errno.EINVAL, errno.EACCES, errno.ENOEXEC)


@pytest.mark.root
def test_set_user_id_bits_do_nothing(nodes: Nodes) -> None:
    """nosuid: the mode is kept as in the kernel, and gives nobody anything."""
    path = program(nodes.mount("a"))
    assert path.stat().st_mode & 0o7777 == 0o6755
    assert os.statvfs(path).f_flag & os.ST_NOSUID


@pytest.mark.parametrize("kind", ["b", "c"])
@pytest.mark.root
def test_no_devices(nodes: Nodes, kind: str) -> None:
    a, _ = nodes.pair()
    for where in (a, a / "dom"):
        done = subprocess.run(
            ["mknod", str(where / "dev"), kind, "1", "3"],
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            timeout=PATIENCE_S,
            check=False,
        )
        assert b"Operation not permitted" in done.stderr


def test_a_read_only_mount_joins_nothing(nodes: Nodes) -> None:
    """EROFS for every change; status and unmounting work."""
    where = nodes.mount("a", "ro")
    with pytest.raises(OSError, match="Read-only file system"):
        (where / "dom").mkdir()
    with pytest.raises(OSError, match="Read-only file system"):
        where.chmod(0o777)
    with pytest.raises(OSError, match="Read-only file system"):
        os.open(where / "x", os.O_RDWR | os.O_CREAT)
    assert nodes.status(where)["domains"] == []


@pytest.mark.root
def test_remounting_read_only_and_back(nodes: Nodes) -> None:
    """mount -o remount,ro is the kernel's own: what is open goes on, new EX opens are EROFS, new
    shared ones work."""
    a, b = nodes.pair()
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.close(fd)
    subprocess.run(["mount", "-i", "-o", "remount,bind,ro", str(a)], check=True)
    assert "ro" in flags(a)
    with pytest.raises(OSError, match="Read-only file system"):
        os.open(a / "dom/x", os.O_RDWR)
    os.close(os.open(a / "dom/x", os.O_RDONLY))
    assert nodes.hold(b / "dom/x").wait() == "held"
    subprocess.run(["mount", "-i", "-o", "remount,bind,rw", str(a)], check=True)
    assert (a / "dom/x").exists()


@pytest.mark.parametrize(
    "option", ["dev=1", "noexec=yes", "ro=0", "nosuidd", "allow_root", "max_read=1"]
)
def test_flags_that_are_none_are_refused_by_name(nodes: Nodes, option: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        nodes.mount("a", option)
    assert option in refused.value.stderr
    assert refused.value.returncode == 1
