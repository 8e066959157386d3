"""What the service manager is told, and by whom."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from dlmfs.notify import TURN_S, Manager, Reports
from dlmfs.sim.loop import SimLoop
from tests.fs.nodes import DLMFS, Nodes
from tests.tools.notified import PATIENCE_S, Heard

OWN, OTHER = str(os.getpid()), "1"


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": "vsock:2:1"}, None),
        ({"NOTIFY_SOCKET": "/run/x"}, 0.0),
        ({"NOTIFY_SOCKET": "@x", "SYSTEMD_EXEC_PID": OWN}, 0.0),
        ({"NOTIFY_SOCKET": "@x", "SYSTEMD_EXEC_PID": OTHER}, None),
        ({"NOTIFY_SOCKET": "@x", "SYSTEMD_EXEC_PID": ""}, None),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "4000000"}, 4.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": OWN}, 4.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": OTHER}, 0.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_only_who_was_started_by_a_manager_has_one(
    environment: dict[str, str], watchdog_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What some program of a service mounts must not speak in that service's name; nor what this
    process starts in its own."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "SYSTEMD_EXEC_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    manager = Manager.of_environment(foreground=True)
    assert (manager.watchdog_s if manager else None) == watchdog_s
    assert "NOTIFY_SOCKET" not in os.environ
    assert "WATCHDOG_USEC" not in os.environ


def test_in_the_background_it_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts a container may set the socket for all that is in it, and wait for another's word."""
    for named in (False, True):
        monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
        monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
        if named:
            monkeypatch.setenv("SYSTEMD_EXEC_PID", OWN)
        assert (Manager.of_environment(foreground=False) is not None) is named


def test_what_a_store_says_is_no_word_of_its_own(heard: Heard) -> None:
    assert Manager(heard.address).tell("STATUS=no: \nMAINPID=1\x1b[m\u2028\udcff")
    assert heard.next() == ["STATUS=no:  MAINPID=1 [m  "]


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0dlmfs-test-{OWN}")
        assert Manager(f"@dlmfs-test-{OWN}").tell("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_nobody_there_is_nobodys_trouble(tmp_path: Path) -> None:
    assert not Manager(str(tmp_path / "none")).tell("READY=1")


def test_a_manager_that_does_not_listen_is_not_waited_for(heard: Heard) -> None:
    manager = Manager(heard.address)
    while manager.tell("STATUS=again"):
        pass
    assert heard.next() == ["STATUS=again"]


def test_turns_of_the_loop_feed_the_watchdog_and_tell_changes(heard: Heard) -> None:
    loop = SimLoop()
    says = ["HEALTHY"]
    reports = Reports(Manager(heard.address, watchdog_s=8.0), loop, lambda: says[0])
    reports.begin()
    assert heard.all() == ["READY=1", "STATUS=HEALTHY"]
    says[0] = "FENCED"
    loop.run_for(1.5 * TURN_S)
    assert heard.all() == ["STATUS=FENCED"]
    for _ in range(4):  # whatever the state, in good time
        loop.run_for(4.0)
        assert heard.all().count("WATCHDOG=1") >= 1
    reports.ends()
    assert heard.all() == ["STOPPING=1"]
    reports.close()
    loop.run_for(8.0)
    assert heard.all() == []


def test_a_status_that_was_not_taken_is_told_again(tmp_path: Path) -> None:
    loop = SimLoop()
    reports = Reports(Manager(str(tmp_path / "notify")), loop, lambda: "HEALTHY")
    reports.begin()
    late = Heard(tmp_path)
    try:
        loop.run_for(1.5 * TURN_S)
        assert late.all() == ["STATUS=HEALTHY"]
    finally:
        late.close()


@pytest.mark.fuse
@pytest.mark.parametrize("form", [["-f"], []])
def test_ready_when_the_mount_answers_and_stopping_at_the_end(
    nodes: Nodes, heard: Heard, form: list[str]
) -> None:
    """Without -f, too, the process that the manager started is the daemon."""
    where = nodes.folder / "told"
    where.mkdir()
    nodes.mounts.append(where)
    words = [*DLMFS, "mount", *form, f"local:{nodes.state}", str(where), "-o", "node=n"]
    environment = {**os.environ, "NOTIFY_SOCKET": heard.address, "WATCHDOG_USEC": "2000000"}
    # As a manager does that names the process.
    script = 'export SYSTEMD_EXEC_PID=$$; exec "$@"'
    started = subprocess.Popen(["sh", "-c", script, "sh", *words], env=environment)
    try:
        ready, status = heard.next()
        os.statvfs(where)
        assert ready == "READY=1"
        assert status == f"STATUS=HEALTHY: node n of local:{nodes.state}"
        assert nodes.pid(where) == started.pid
        assert heard.next() == ["WATCHDOG=1"]
        started.terminate()
        while heard.next() != ["STOPPING=1"]:
            pass
    finally:
        started.terminate()
        assert started.wait(PATIENCE_S) == 0


def test_why_it_did_not_start(heard: Heard, tmp_path: Path) -> None:
    words = [*DLMFS, "mount", "-f", "local", str(tmp_path / "none")]
    environment = {**os.environ, "NOTIFY_SOCKET": heard.address}
    environment.pop("SYSTEMD_EXEC_PID", None)
    done = subprocess.run(words, env=environment, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    (word,) = heard.next()
    assert word.startswith("STATUS=the mount point ")
