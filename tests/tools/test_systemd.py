"""The units in contrib/, and what systemd makes of an fstab line. systemd itself need not run: its own
programs check and generate the units, and what a unit says is done here by hand."""

from __future__ import annotations

import configparser
import os
import re
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from dlmfs import privileges
from dlmfs.fuse import mountinfo
from tests.fs.helper import helper as helper
from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes
from tests.tools.notified import Heard

UNITS = ROOT / "contrib" / "systemd"
GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")


class Unit:
    """A unit file, as far as it is needed: later values replace earlier ones but for Environment."""

    def __init__(self, text: str) -> None:
        self._parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#", ";"))
        self._parser.optionxform = str  # type: ignore[assignment,method-assign]
        self._parser.read_string(text)

    def __call__(self, section: str, name: str) -> str:
        return self._parser.get(section, name)


def variables(unit: Unit, instance: str) -> dict[str, str]:
    pairs = unit("Service", "Environment").replace("%i", instance).split(" ")
    return dict(pair.split("=", 1) for pair in pairs)


def command(line: str, known: dict[str, str]) -> list[str]:
    """An Exec line's words, with our program in place of the installed one."""
    line = re.sub(r"\$\{(\w+)\}", lambda match: known[match[1]], line)
    assert line.startswith("/usr/local/bin/dlmfs ")
    return [*DLMFS, *line.split()[1:]]


def mounted(where: Path) -> list[mountinfo.MountEntry]:
    return [entry for entry in mountinfo.mounts() if entry.mountpoint == str(where)]


@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.iterdir()))
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    """systemd-analyze verify has no complaint, once the program is where the unit names it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: install the package systemd")
    for path in UNITS.iterdir():
        text = path.read_text().replace("/usr/local/bin/dlmfs", "/bin/true")
        (tmp_path / path.name).write_text(text)
    unit = name.replace("@.", "@jobs.")
    if unit != name:
        (tmp_path / unit).symlink_to(name)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "LC_ALL": "C", "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


HIDING = (
    *(
        "ProtectSystem",
        "ProtectHome",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateUsers",
    ),
    *(
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "MountAPIVFS",
    ),
    *("ProtectKernelTunables", "ProtectControlGroups", "ProtectKernelModules", "ProtectKernelLogs"),
    *("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "RootDirectory", "RootImage"),
    *("ProtectProc", "ProcSubset", "ProtectHostname", "DynamicUser", "StateDirectory", "UMask"),
)
"""Settings that make a mount namespace, where others do not see the mount (systemd.exec(5)); and those
that would keep users from the control socket."""


def settings(text: str, name: str) -> set[str]:
    return {
        word for line in re.findall(rf"^{name}=(.*)$", text, re.MULTILINE) for word in line.split()
    }


@pytest.mark.parametrize("name", ["dlmfs@.service", "mnt-locks.mount"])
def test_the_units_keep_what_the_daemon_needs_and_no_more(name: str) -> None:
    text = (UNITS / name).read_text()
    assert [setting for setting in HIDING if settings(text, setting)] == []
    assert settings(text, "NoNewPrivileges") == {"yes"}
    numbers = privileges.DAEMON | privileges.WATCHDOG
    known = {
        key: value for key, value in vars(privileges).items() if key.isupper() and value in numbers
    }
    assert settings(text, "CapabilityBoundingSet") == {f"CAP_{key}" for key in known}


def test_how_much_is_exposed(tmp_path: Path) -> None:
    """By systemd's own account. Without a mount namespace, and with CAP_SYS_ADMIN, it is never little."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: install the package systemd")
    unit = tmp_path / "dlmfs@jobs.service"
    text = (UNITS / "dlmfs@.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/dlmfs", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    if found is None:
        pytest.skip("this systemd-analyze does not look at a unit offline")
    assert float(found[1]) <= EXPOSED_MAX


EXPOSED_MAX = 6.5


@pytest.mark.fuse
def test_what_the_service_does(nodes: Nodes, heard: Heard) -> None:
    """Its ExecStart says READY when the mount answers, and ends in order by SIGTERM, with a file open;
    all with the privileges that the unit leaves."""
    unit = Unit((UNITS / "dlmfs@.service").read_text())
    assert unit("Service", "Type") == "notify"
    known = variables(unit, "jobs")
    assert known == {"SOURCE": "local:jobs", "MOUNTPOINT": "/mnt/jobs", "OPTIONS": "holder=file"}
    where = nodes.folder / "service"
    where.mkdir()
    nodes.mounts.append(where)
    known |= {"SOURCE": f"local:{nodes.state}", "MOUNTPOINT": str(where)}
    less: list[str] = []
    if os.geteuid() == 0:
        kept = unit("Service", "CapabilityBoundingSet").lower().replace("cap_", "+").split()
        bounds = ",".join(["-all", *kept])
        less = ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounds}"]
    start = [*less, *command(unit("Service", "ExecStart"), known)]
    environment = {**os.environ, "NOTIFY_SOCKET": heard.address, "WATCHDOG_USEC": "30000000"}
    environment.pop("SYSTEMD_EXEC_PID", None)
    started = subprocess.Popen(start, env=environment)
    try:
        assert heard.next()[0] == "READY=1"
        assert nodes.pid(where) == started.pid
        assert nodes.status(where)["holder_rule"] == "file"
        (where / "dom").mkdir()
        nodes.hold(where / "dom" / "x", os.O_RDWR | os.O_CREAT)
    finally:
        started.terminate()
        assert started.wait(PATIENCE_S) == 0
    assert mounted(where) == []


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    """What the program says first. Fails if it says nothing in time."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], PATIENCE_S)[0], "the program did not start"
    return process.stdout.readline()


def until_wanted(path: Path) -> None:
    """Wait until another node waits for the lock."""
    fd = os.open(path, os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000), "nobody waits"
    finally:
        os.close(fd)


@pytest.mark.fuse
def test_a_service_that_runs_on_one_node_only(nodes: Nodes) -> None:
    """Two nodes start the unit's command, and one program runs. When `systemctl stop` ends its `dlmfs
    lock`, the other node's program starts, with a larger token."""
    unit = Unit((UNITS / "one-node@.service").read_text())
    assert unit("Service", "Restart") == "always"
    line = unit("Service", "ExecStart")
    assert line.endswith(" -- $PROGRAM")
    program = ["sh", "-c", "echo $DLMFS_TOKEN; exec sleep 1000"]
    started: list[subprocess.Popen[bytes]] = []
    tokens = []
    try:
        for name in ("a", "b"):
            lock = nodes.mount(name) / "services" / "reports"
            words = command(line.removesuffix("$PROGRAM"), {"LOCK": str(lock)})
            started.append(subprocess.Popen([*words, *program], stdout=subprocess.PIPE))
            if name == "a":
                tokens.append(int(first_line(started[0])))
        first, second = started
        until_wanted(nodes.folder / "a" / "services" / "reports")
        assert second.stdout is not None
        assert not select.select([second.stdout], [], [], 0)[0], "both run"
        first.terminate()
        tokens.append(int(first_line(second)))
        assert first.wait(PATIENCE_S) != 0
        assert tokens[0] < tokens[1]
    finally:
        for process in started:
            process.terminate()
            process.wait(PATIENCE_S)
            assert process.stdout is not None
            process.stdout.close()


# -- mount(8) and fstab ------------------------------------------------------------------------------


def mount_as(unit: Unit, nodes: Nodes) -> Path:
    """Carry out a mount unit as systemd does: mount -t TYPE -o OPTIONS WHAT WHERE."""
    where = nodes.folder / "unit"
    where.mkdir()
    nodes.mounts.append(where)
    assert unit("Mount", "What") == "local"
    words = ["-t", unit("Mount", "Type"), "-o", unit("Mount", "Options"), f"local:{nodes.state}"]
    subprocess.run(["mount", *words, str(where)], check=True, timeout=PATIENCE_S)
    return where


@pytest.mark.fuse
@pytest.mark.root
def test_what_the_mount_unit_does(nodes: Nodes, helper: Path) -> None:
    assert helper.exists()
    automount = Unit((UNITS / "mnt-locks.automount").read_text())
    unit = Unit((UNITS / "mnt-locks.mount").read_text())
    assert automount("Automount", "Where") == unit("Mount", "Where") == "/mnt/locks"
    where = mount_as(unit, nodes)
    (entry,) = mounted(where)
    assert "noexec" in entry.options
    assert nodes.status(where)["holder_rule"] == "file"
    subprocess.run(["umount", str(where)], check=True, timeout=PATIENCE_S)
    assert mounted(where) == []


@pytest.mark.fuse
@pytest.mark.root
def test_an_fstab_line_with_automount(nodes: Nodes, helper: Path, tmp_path: Path) -> None:
    """The line of the docs: systemd makes a mount and an automount of it, and all the options that
    it hands to mount(8) are taken."""
    assert helper.exists()
    if not GENERATOR.exists():
        pytest.skip(f"{GENERATOR} is missing: install the package systemd")
    text = (UNITS / "mnt-locks.automount").read_text()
    (line,) = re.findall(r"^# +(local .* 0 0)$", text, re.MULTILINE)
    assert "x-systemd.automount" in line
    line = line.replace("nofail", "nofail,_netdev,x-systemd.mount-timeout=30")
    (tmp_path / "fstab").write_text(line + "\n")
    folders = [tmp_path / name for name in ("normal", "early", "late")]
    for folder in folders:
        folder.mkdir()
    subprocess.run(
        [GENERATOR, *folders],
        env={**os.environ, "SYSTEMD_FSTAB": str(tmp_path / "fstab")},
        check=True,
        timeout=PATIENCE_S,
    )
    made = {path.name: Unit(path.read_text()) for path in folders[0].glob("mnt-locks.*")}
    if not made:
        pytest.skip("this systemd's generator does not read SYSTEMD_FSTAB")
    assert made["mnt-locks.automount"]("Automount", "Where") == "/mnt/locks"
    assert made["mnt-locks.mount"]("Mount", "Type") == "fuse.dlmfs"
    where = mount_as(made["mnt-locks.mount"], nodes)
    assert nodes.status(where)["holder_rule"] == "file"
