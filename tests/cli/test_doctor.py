"""`dlmfs doctor`: what it finds on a sound host, and each thing that can be wrong with one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmfs import fstype
from dlmfs.cli.checks import finding, host
from dlmfs.cli.checks.finding import Finding
from dlmfs.cli.checks.mounted import latency
from dlmfs.fuse import mount as fuse_mount
from tests.cli.programs import Opener, until
from tests.etcd.server import state_of
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, Nodes, dlmfs

nodes = _nodes
fuse = pytest.mark.fuse


def doctor(*args: str | Path) -> list[Finding]:
    """The findings; the exit code goes with the worst. This machine may lack things of its own."""
    command = [*DLMFS, "doctor", "--json", *map(str, args)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.stderr == b""
    found = [Finding(**row) for row in json.loads(done.stdout)]
    levels = {f.level for f in found}
    assert done.returncode == (69 if "fail" in levels else 1 if "warn" in levels else 0)
    return found


def bad(found: list[Finding], about: str = "") -> list[Finding]:
    """What is not well, but for what this machine itself may be lacking."""
    own = ("control", "clock", "suspend", "files", "waiting", "extras")
    return [f for f in found if f.level != "ok" and about in f.about and f.about not in own]


def says(found: list[Finding], level: str, words: str) -> Finding:
    """The one finding with these words; it says how to mend it unless all is well."""
    hits = [f for f in found if words in f.says]
    assert [f.level for f in hits] == [level], (words, found)
    assert bool(hits[0].mend) == (level != "ok"), hits[0]
    assert "\n" not in hits[0].mend
    return hits[0]


# -- mounts ----------------------------------------------------------------------------------------


@fuse
def test_a_sound_mount(nodes: Nodes) -> None:
    a, _ = nodes.pair()
    Opener(nodes, ("x", a / "dom/x")).has(1)
    found = doctor(a)
    assert bad(found) == []
    says(found, "ok", "/dev/fuse can be opened")
    says(found, "ok", f"node a, source local:{nodes.state}")
    says(found, "ok", "the store answers within")
    says(found, "ok", "node b (")
    says(found, "ok", "domain dom: 2 nodes, 1 locks")
    text = dlmfs("doctor", str(a), check=False).stdout
    assert "ok    python: 3." in text
    assert text.splitlines()[-1].startswith("failures: 0, warnings: ")


@fuse
def test_a_dead_and_a_stopped_daemon(nodes: Nodes) -> None:
    a, b = nodes.pair()
    pid = nodes.pid(b)
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: state_of(pid) == "T", "it stops")
        stopped = says(doctor(b), "fail", f"its daemon (pid {pid}) is stopped")
        assert stopped.mend == f"kill -CONT {pid}"
        peer = says(doctor(a), "fail", "node b (")
        assert f"its daemon (pid {pid}) is stopped" in peer.says
        assert peer.mend.startswith(f"kill -CONT {pid} on ")
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: bad(doctor(a)) == [], "b is well again")
    nodes.kill(b)
    until(lambda: any(f.says == "its daemon is dead" for f in doctor(b)), "b is dead")
    assert f"dlmfs umount {b}" in says(doctor(b), "fail", "its daemon is dead").mend


@fuse
def test_what_the_dead_left_behind(nodes: Nodes) -> None:
    a, b = nodes.pair()
    c = nodes.mount("c")
    (c / "other dom").mkdir()
    (c / "other dom/v").touch()
    holder = Opener(nodes, ("x", c / "other dom/v"), ("x", b / "dom/x")).has(1).go().has(2)
    dlmfs("value", "set", str(a / "dom/y"), "1")
    nodes.kill(b)
    nodes.kill(c)
    holder.end()
    until(
        lambda: not any("node b" in f.says or "node c" in f.says for f in doctor(a)),
        "they are gone",
    )
    found = doctor(a)
    alone = says(found, "warn", "domain other dom has no node any more, but the values of 1 locks")
    assert alone.mend.startswith("dlmfs domain rm 'other dom' ")
    says(found, "warn", "domain dom: 1 locks of dead nodes only: x")
    assert dlmfs("value", "get", str(a / "dom/x")).stdout == "\n"
    found = doctor(a)
    says(found, "warn", "domain dom: the values of 1 locks are doubtful, their holder died: x")
    dlmfs("domain", "rm", "other dom", str(a))
    dlmfs("value", "set", str(a / "dom/x"), "anew")
    assert bad(doctor(a)) == []


@fuse
def test_a_state_file_that_was_deleted(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    nodes.state.unlink()
    until(lambda: any("FENCED" in f.says for f in doctor(a)), "it sees that")
    found = doctor(a)
    assert "deleted or replaced" in says(found, "fail", "FENCED: ").says


def test_a_mount_that_is_none(tmp_path: Path) -> None:
    done = dlmfs("doctor", str(tmp_path), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a dlmfs mount" in done.stderr
    done = dlmfs("doctor", "etcd://", check=False)
    assert done.returncode == 2


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as out:
        done = subprocess.run(
            [*DLMFS, "doctor", "local:no"],
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


# -- sources of the embedded engine ----------------------------------------------------------------


@fuse
def test_a_state_file_and_the_names_in_use(nodes: Nodes) -> None:
    source = f"local:{nodes.state}"
    says(doctor(source), "ok", "is made by the first mount")
    assert not nodes.state.exists(), "the doctor made it"
    a = nodes.mount("a")
    pid = nodes.pid(a)
    says(doctor(source), "ok", f"the name a is in use by pid {pid}")
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: state_of(pid) == "T", "it stops")
        assert says(doctor(source), "fail", "node a (").mend == f"kill -CONT {pid}"
    finally:
        os.kill(pid, signal.SIGCONT)
    nodes.kill(a)
    until(lambda: any("is dead, and no other" in f.says for f in doctor(source)), "dead")
    nodes.state.chmod(0o644)
    says(doctor(source), "warn", "can be read or written by others")


def test_state_files_that_are_not_ours(tmp_path: Path) -> None:
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("shopping list\n" * 100)
    conn = sqlite3.connect(other)
    conn.execute("CREATE TABLE t (x)")
    conn.close()
    before = text.read_bytes(), other.read_bytes()
    says(doctor(f"local:{text}"), "fail", "cannot be read")
    says(doctor(f"local:{other}"), "fail", "is no state file of this version")
    assert (text.read_bytes(), other.read_bytes()) == before
    says(doctor(f"local:{tmp_path}/no/x.db"), "fail", "does not exist")


# -- the host --------------------------------------------------------------------------------------


def only(findings: Finding | Iterator[Finding]) -> Finding:
    if isinstance(findings, Finding):
        return findings
    (found,) = findings
    return found


@pytest.mark.parametrize(
    ("limits", "level", "words"),
    [("", "ok", "as long as it takes"), ("0", "ok", "as long as it takes"), ("60", "fail", "60 s")],
)
def test_the_kernels_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: str, level: str, words: str
) -> None:
    path = tmp_path / "max_request_timeout"
    if limits:
        path.write_text(limits + "\n")
    monkeypatch.setattr(fuse_mount, "REQUEST_TIMEOUTS", (str(path),))
    found = says([host._request_timeout()], level, words)
    assert "sysctl -w" in found.mend or level == "ok"


def test_no_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_mount, "DEVICE", str(tmp_path / "fuse"))
    assert "modprobe fuse" in says(list(host._device()), "fail", "does not exist").mend
    (tmp_path / "fuse").mkdir()
    says(list(host._device()), "fail", "cannot be opened")


def test_a_user_without_fusermount3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(host, "FUSE_CONF", tmp_path / "fuse.conf")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(host._right_to_mount())
    assert "install the package fuse3" in says(found, "fail", "without fusermount3").mend
    says(found, "ok", "only -o allow_other needs it")
    program = tmp_path / "fusermount3"
    program.touch(0o755)
    (tmp_path / "fuse.conf").write_text("# user_allow_other\n user_allow_other \n")
    found = list(host._right_to_mount())
    says(found, "fail", "is not set-user-ID root")
    says(found, "ok", "may be used by every user")


@pytest.mark.root
def test_a_root_that_may_not_mount() -> None:
    """As in a container."""
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *DLMFS, "doctor", "local:no"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 69
    assert "this root may not mount" in done.stdout
    assert "--cap-add SYS_ADMIN" in done.stdout


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CLOCKS", tmp_path)
    says([host._clock()], "ok", "does not tell")
    (tmp_path / "current_clocksource").write_text("tsc\n")
    says([host._clock()], "ok", "source tsc")
    (tmp_path / "current_clocksource").write_text("hpet\n")
    says([host._clock()], "warn", "the clock source is hpet")


@pytest.mark.parametrize(("etcd", "level"), [(True, "warn"), (False, "ok")])
def test_a_machine_that_was_asleep(monkeypatch: pytest.MonkeyPatch, etcd: bool, level: str) -> None:
    times = {time.CLOCK_BOOTTIME: 5000.0, time.CLOCK_MONOTONIC: 1000.0}
    monkeypatch.setattr(time, "clock_gettime", times.__getitem__)
    says([host._suspended(etcd=etcd)], level, "was suspended for 4000 s")


@pytest.mark.parametrize(("etcd", "level"), [(True, "fail"), (False, "ok")])
def test_missing_extras(monkeypatch: pytest.MonkeyPatch, etcd: bool, level: str) -> None:
    def none(_name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", none)
    found = only(host._extras(etcd=etcd))
    assert found.level == level
    assert "pip install 'dlmfs[etcd]'" in found.mend + found.says


def test_places_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dlmfs" / "ctl"
    monkeypatch.setattr(host, "control_folders", lambda _uid: (folder,))
    says([host._control_folder()], "ok", str(folder))
    folder.mkdir(parents=True)
    assert list(host._dead_sockets()) == []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "0-1.sock"))
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(folder / "0-2.sock"))
        living.listen()
        for number in (1, 2):
            (folder / f"0-{number}.lease").touch()
        dead = says(list(host._dead_sockets()), "warn", "2 files of dead daemons")
        assert dead.mend == f"rm {folder}/0-1.sock {folder}/0-1.lease"
    folder.chmod(0o777)
    says([host._control_folder()], "fail", "no place for the daemons' sockets")


def test_state_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(kind: str) -> Callable[[Path], str]:
        return lambda _folder: kind

    for kind, default, level in (
        ("tmpfs", True, "ok"),
        ("ext4", True, "warn"),
        ("ext4", False, "ok"),
        ("nfs4", False, "fail"),
        ("nfs4", True, "fail"),
    ):
        monkeypatch.setattr(fstype, "fs_type", on(kind))
        place = tmp_path / "mine"
        place.mkdir(mode=0o700, exist_ok=True)
        found = host.state_folder(place / "x.db", default=default)
        assert found.level == level, (kind, default, found)
        assert bool(found.mend) == (level != "ok")
    monkeypatch.setattr(fstype, "fs_type", on("tmpfs"))
    assert host.state_folder(tmp_path / "new" / "x.db", default=True).level == "ok"
    assert not (tmp_path / "new").exists(), "the doctor made it"
    place.chmod(0o777)
    assert host.state_folder(place / "x.db", default=True).level == "fail"


@pytest.mark.parametrize(
    ("worst_ms", "ttl_s", "level"),
    [(1, None, "ok"), (500, None, "warn"), (20, 15, "ok"), (500, 15, "warn"), (1500, 15, "fail")],
)
def test_latency_is_measured_against_the_lease_time(
    worst_ms: float, ttl_s: float | None, level: str
) -> None:
    assert latency("x", worst_ms, ttl_s).level == level


def test_each_warning_has_a_name_that_is_listed() -> None:
    """Names stand in the source as they are: whoever accepts one must find it."""
    folder = Path(finding.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    used = set(re.findall(r'\bwarn\(\s*"([a-z-]+)"', text))
    assert used == set(finding.WARNINGS)


def test_a_failure_is_accepted_by_nobody() -> None:
    bad = finding.fail("x", "y", "z")._replace(name="clock")
    assert finding.accept(bad, frozenset({"clock"})) == bad
