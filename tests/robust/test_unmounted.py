"""What a daemon takes an unread RELEASE for when its mount is gone, or torn away under its programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from dlmfs.fuse import mount
from dlmfs.fuse.connections import Connection
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import Nodes, dlmfs
from tests.robust.helpers import daemon_of, ended, entry_of, fusectl

nodes = _nodes
pytestmark = [pytest.mark.fuse, pytest.mark.root]


def test_what_was_closed_just_before_an_umount_is_no_death(nodes: Nodes) -> None:
    """The daemon stands still meanwhile, and the end of its mount overtakes the RELEASE."""
    a, b = nodes.pair("grace=600")
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    with daemon_of(a) as daemon:
        signal.pidfd_send_signal(daemon, signal.SIGSTOP)
        os.close(fd)
        mount.unmount(str(a), lazy=True)  # umount(8) would ask the daemon about the folder
        signal.pidfd_send_signal(daemon, signal.SIGCONT)
        assert ended(daemon), "it waits for holders that there are not"
    os.close(os.open(b / "dom/x", os.O_RDWR | os.O_CREAT))
    info = json.loads(dlmfs("info", "--json", str(b / "dom/x")).stdout)
    assert info["abandoned"] is None


@pytest.mark.parametrize("detached", [False, True])
def test_a_connection_is_over_when_its_last_user_is_gone(nodes: Nodes, *, detached: bool) -> None:
    a = nodes.mount("a", "grace=0")
    (a / "dom").mkdir()
    entry = entry_of(a)
    connection = Connection(entry.dev)
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    try:
        with daemon_of(a) as daemon, fusectl() as connections:
            if detached:
                subprocess.run(["umount", "-l", str(a)], check=True)
            Path(connections, entry.dev.partition(":")[2], "abort").write_text("1")
            assert ended(daemon)
            assert not connection.is_over()
            os.close(fd)
            fd = -1
            if not detached:
                subprocess.run(["umount", str(a)], check=False)  # its daemon may have done so
            assert connection.is_over()
    finally:
        connection.close()
        if fd >= 0:
            os.close(fd)


def test_no_list_of_connections_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dlmfs.fuse.connections.PLACE", str(tmp_path / "missing"))
    monkeypatch.setattr("dlmfs.fuse.connections.FSOPEN", -1)
    connection = Connection("0:77")
    assert not connection.is_over()
    connection.close()
