"""What `dlmfs doctor` finds in fstab, units and their variables; and what tells of the holder rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlmfs.cli.checks import configured
from dlmfs.cli.checks.finding import Finding
from tests.cli.test_doctor import doctor, says
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import ROOT, Nodes, dlmfs

nodes = _nodes


def found(root: Path) -> list[Finding]:
    """The findings below `root`."""
    return list(configured.check(root))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


UNIT = "[Mount]\nWhat=local\nWhere=/mnt/locks\nType=fuse.dlmfs\nOptions={}\n"
SERVICE = "[Service]\nEnvironmentFile=-/etc/locks/%i.env\nExecStart=/usr/local/bin/dlmfs mount x\n"
OLD = [
    {
        "etc/fstab": "# local /x dlmfs owner=file\nlocal /mnt/locks fuse.dlmfs owner=file,nofail 0 0\n"
    },
    {"etc/fstab": "local /mnt/locks dlmfs nofail,owner=node"},
    {"etc/systemd/system/mnt-locks.mount": UNIT.format("owner=file,noexec")},
    {"usr/lib/systemd/system/mnt-locks.mount": UNIT.format(" noexec,owner=file ")},
    {
        "usr/lib/systemd/system/mnt-locks.mount": UNIT.format("noexec"),
        "etc/systemd/system/mnt-locks.mount.d/more.conf": "[Mount]\nOptions=owner=file\n",
    },
    {"etc/dlmfs/jobs.conf": 'OPTIONS="noexec,owner=file"\n'},
    {"etc/systemd/system/locks@.service": SERVICE, "etc/locks/a.env": "O=owner=file\n"},
    {"etc/systemd/system/dlmfs@.service.d/x.conf": "[Service]\nEnvironment=OPTIONS=owner=node\n"},
    {
        "run/systemd/system/l.service": "[Service]\nExecStart=dlmfs mount local /m -o noexec,owner=file\n"
    },
]


@pytest.mark.parametrize("files", OLD, ids=[f"{number}" for number in range(len(OLD))])
def test_the_former_name_is_found_wherever_a_mount_is_configured(
    files: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, files)
    (finding,) = found(tmp_path)
    assert finding.level == "fail"
    assert "it is called holder=" in finding.says
    assert str(tmp_path / list(files)[-1]) in finding.says
    assert "mount it anew" in finding.mend


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    """Ours, as it comes, and others' files with such a word."""
    for path in (ROOT / "contrib" / "systemd").iterdir():
        write(tmp_path, {f"etc/systemd/system/{path.name}": path.read_text()})
    write(
        tmp_path,
        {
            "etc/fstab": "/dev/sda1 / ext4 owner=file 0 1\nlocal /m dlmfs owner,X-mount.owner=1 0 0\n"
            "etcd://h/prod /n fuse.dlmfs holder=file,_netdev,nofail,x-systemd.automount 0 0\n"
            "LABEL=x\nlocal /m\\040n fuse.dlmfs\n",
            "etc/systemd/system/other.service": "[Service]\nExecStart=/bin/other owner=file\n",
            "etc/dlmfs/jobs.conf": "OPTIONS=holder=file\n",
            "etc/systemd/system/odd.service": "dlmfs\nEnvironmentFile=-/\nEnvironmentFile=//**x/%i\n",
        },
    )
    (finding,) = found(tmp_path)
    assert finding.level == "ok"


def test_what_the_mount_would_refuse_is_found_before_the_boot(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "etc/fstab": "etcd://h/prod /a fuse.dlmfs hodler=file 0 0\n\nloco /b dlmfs ttl=1 0 0\n",
            "etc/systemd/system/a.mount": UNIT.format("holder=x"),
        },
    )
    every = found(tmp_path)
    assert [finding.level for finding in every] == ["fail", "warn", "fail", "fail", "fail"]
    for finding, words in zip(
        every, ("did you mean 'holder'", "_netdev", "'loco'", "ttl=1", "holder=x"), strict=True
    ):
        assert words in f"{finding.says} {finding.mend}"
    assert "fstab, line 3" in every[2].says


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "etc/fstab").mkdir(parents=True)
    (tmp_path / "etc/dlmfs").write_bytes(b"\xff")
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    (tmp_path / "etc/systemd/system/a.mount").symlink_to("a.mount")
    (tmp_path / "etc/systemd/system/b.mount").write_bytes(b"dlmfs \xff\0 Options=owner\n=\n[")
    assert [finding.level for finding in found(tmp_path)] == ["ok"]


# -- the rule, where somebody looks ----------------------------------------------------------------------


@pytest.mark.fuse
def test_which_rule_holds_is_told(nodes: Nodes) -> None:
    """By the mount itself if nobody said which, by status and doctor; nodes that differ are named."""
    a = nodes.mount("a", "holder=file")
    found = doctor(a)
    says(found, "ok", f"source local:{nodes.state}, holder=file")
    b = nodes.folder / "b"
    b.mkdir()
    nodes.mounts.append(b)
    done = dlmfs("mount", f"local:{nodes.state}", str(b), "-o", "node=b")
    assert "holder=node, by default: two processes of this node both get" in done.stderr
    assert done.stderr.count("\n") == 1
    for where, rule, other in (
        (a, "file", "node b has holder=node"),
        (b, "node", "node a has holder=file"),
    ):
        assert f"holder={rule}" in dlmfs("status", str(where)).stdout
        assert "mount all nodes with the same holder=" in says(doctor(where), "warn", other).mend
    c = nodes.folder / "c"
    c.mkdir()
    nodes.mounts.append(c)
    for rule in ("file", "node"):
        said = dlmfs("mount", f"local:{nodes.state}", str(c), "-o", f"node=c,holder={rule}")
        assert said.stderr == ""
        dlmfs("umount", str(c))
