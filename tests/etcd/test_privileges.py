"""What root's daemon and its watchdog keep of root's power on etcd, and that both do their work with it.
See tests/fs/test_privileges.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dlmfs import privileges
from tests.etcd.mounts import EtcdNodes, put, until, value
from tests.etcd.server import PATIENCE_S
from tests.fs.test_privileges import USER, confined, gone, sets

pytestmark = [pytest.mark.fuse, pytest.mark.root]

HOLDER = """
import os, sys
os.setgid(12345); os.setuid(12345)
fd = os.open(sys.argv[1], os.O_RDONLY)
os.write(1, b"held\\n")
sys.stdin.read()
"""


def test_a_daemon_with_a_watchdog(nodes: EtcdNodes) -> None:
    """It keeps, for another user's processes, the right to signal them, and the daemon does not."""
    nodes.folder.chmod(0o755)
    a, b = nodes.mount("a", "on-lost=kill"), nodes.mount("b")
    for where in (a, b):
        (where / "dom").mkdir()
        (where / "dom/x").touch()
    put(a / "dom/x", b"value")
    (watchdog,) = nodes.helpers
    assert sets(nodes.pid(a)) == confined(privileges.DAEMON)
    assert sets(watchdog) == confined(privileges.WATCHDOG)
    command = [sys.executable, "-I", "-S", "-c", HOLDER, str(a / "dom/x")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert os.stat(f"/proc/{holder.pid}").st_uid == USER
        os.kill(nodes.pid(a), signal.SIGTERM)
        assert holder.wait(PATIENCE_S) == -signal.SIGTERM
    until(lambda: gone(a), "the mount is gone")
    assert value(b / "dom/x") == b"value"
    until(lambda: all("/n/a" not in key for key in nodes.all_keys()), "the session is over")
