"""What root's daemon keeps of root's power, and that it does its work with it to a clean end
(`dlmfs.privileges`, docs/security.md). On etcd, with a watchdog: tests/etcd/test_privileges.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dlmfs import privileges, proc
from dlmfs.fuse import mountinfo
from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes
from tests.waiting.agents import until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

USER = 12345


def mask(capabilities: frozenset[int]) -> int:
    return sum(1 << capability for capability in capabilities)


def sets(pid: int) -> dict[str, int]:
    """The capabilities of a process, in each of its threads the same; and whether it can get others."""
    names = (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb", b"NoNewPrivs")
    found = []
    for thread in proc.threads(pid):
        told = proc.status(thread)
        found.append({name.decode(): int(told[name], 16) for name in names})
    assert found
    assert all(each == found[0] for each in found)
    return found[0]


def confined(kept: frozenset[int]) -> dict[str, int]:
    left = {"CapInh": 0, "CapBnd": 0, "CapAmb": 0, "NoNewPrivs": 1}
    return {"CapPrm": mask(kept), "CapEff": mask(kept), **left}


def gone(where: Path) -> bool:
    return all(entry.mountpoint != str(where) for entry in mountinfo.mounts())


def members(nodes: Nodes, where: Path) -> list[str]:
    found: list[str] = nodes.status(where)["domains"][0]["members"]
    return found


def works(where: Path) -> None:
    """Taking a lock, its value, and a handle for poll."""
    fd = os.open(where / "dom/x", os.O_RDWR | os.O_CREAT)
    assert os.pwrite(fd, b"value", 0) == 5
    os.close(fd)


def ends(nodes: Nodes, how: str, where: Path, other: Path) -> None:
    """A clean end: the mount is gone, and the node from its domains, at once."""
    pid = nodes.pid(where)
    with open(f"/proc/{pid}/stat"):
        if how == "umount":
            subprocess.run([*DLMFS, "umount", where], check=True, timeout=PATIENCE_S)
        else:
            os.kill(pid, signal.SIGTERM)
    until(lambda: gone(where), "the mount is gone")
    until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon is gone")
    until(lambda: members(nodes, other) == ["b"], "it has left")


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_a_local_mount(nodes: Nodes, how: str) -> None:
    a, b = nodes.pair()
    for where in (a, b):
        works(where)
        assert sets(nodes.pid(where)) == confined(privileges.DAEMON)
    ends(nodes, how, a, b)


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_a_mount_point_in_the_folder_of_another_user(nodes: Nodes, how: str) -> None:
    """Which only he may enter, and root by CAP_DAC_READ_SEARCH."""
    theirs = nodes.folder / "theirs"
    theirs.mkdir(mode=0o700)
    where = theirs / "a"
    where.mkdir()
    os.chown(where, USER, USER)
    os.chown(theirs, USER, USER)
    nodes.mounts.append(where)
    source = f"local:{nodes.state}"
    subprocess.run([*DLMFS, "mount", source, where, "-o", "node=a"], check=True, timeout=PATIENCE_S)
    (where / "dom").mkdir()
    b = nodes.mount("b")
    (b / "dom").mkdir()
    works(where)
    assert sets(nodes.pid(where)) == confined(privileges.DAEMON)
    ends(nodes, how, where, b)


HEIR = """
import ctypes, os, sys
path = sys.argv[1]
os.setgid(12345); os.setuid(12345)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: what tells of it is its user's again
fd = os.open(path, os.O_RDONLY)
parent = os.getpid()
if os.fork():
    os._exit(0)
os.setsid()
while os.getppid() == parent:
    pass
os.write(1, b"ready\\n")
sys.stdin.readline()
os.close(os.open(path, os.O_RDONLY))
os.write(1, b"again\\n")
"""


def test_another_users_process_is_known_by_its_descriptors(nodes: Nodes) -> None:
    """One that has inherited the lock, and whose parent has ended, opens it again while another node
    waits: it would wait for itself (engine rule 11). /proc/PID/fd tells it to CAP_SYS_PTRACE with
    CAP_DAC_READ_SEARCH only."""
    nodes.folder.chmod(0o755)
    a, b = nodes.pair()
    (a / "dom/x").touch()
    command = [sys.executable, "-I", "-S", "-c", HEIR, str(a / "dom/x")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as heir:
        assert heir.stdin is not None
        assert heir.stdout is not None
        try:
            assert heir.stdout.readline() == b"ready\n"
            writer = nodes.hold(b / "dom/x")
            assert writer.waits
            heir.stdin.write(b"\n")
            assert heir.stdout.readline() == b"again\n"
        finally:
            heir.stdin.close()
    assert writer.wait() == "held"


@pytest.mark.parametrize(
    "given", ["+sys_admin", "+sys_admin,+setpcap"], ids=["alone", "with setpcap"]
)
def test_a_container_that_gives_less(nodes: Nodes, given: str) -> None:
    """With CAP_SYS_ADMIN alone it mounts, serves and ends; and keeps no more than it got."""
    where = nodes.folder / "a"
    where.mkdir()
    nodes.mounts.append(where)
    less = ["setpriv", "--inh-caps=-all", f"--bounding-set=-all,{given}"]
    done = subprocess.run(
        [*less, *DLMFS, "mount", f"local:{nodes.state}", where, "-o", "node=a,holder=node"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (where / "dom").mkdir()
    b = nodes.mount("b")
    (b / "dom").mkdir()
    works(where)
    found = sets(nodes.pid(where))
    assert found["CapEff"] == found["CapPrm"] == mask(frozenset({privileges.SYS_ADMIN}))
    assert found["NoNewPrivs"] == 1
    ends(nodes, "SIGTERM", where, b)


REFUSED = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from dlmfs import privileges
class Libc:
    def __getattr__(self, name):
        return lambda *_: (ctypes.set_errno(1), -1)[1]
privileges.ctypes.CDLL = lambda *_, **__: Libc()
privileges.confine(privileges.DAEMON)
"""


def test_a_refusal_is_told_and_costs_nothing() -> None:
    """A sandbox may forbid these calls."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, ROOT / "src"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0
    assert "keeps more privileges than it needs (no_new_privs: " in done.stderr
    assert "capset: " in done.stderr


def test_the_page_has_each_of_them() -> None:
    """docs/security.md names what is kept, and nothing else."""
    table = re.findall(
        r"^\| (daemon|watchdog) \| CAP_(\w+) \|",
        (ROOT / "docs/security.md").read_text(),
        re.MULTILINE,
    )
    listed: dict[str, set[int]] = {"daemon": set(), "watchdog": set()}
    for process, name in table:
        listed[process].add(getattr(privileges, name))
    assert listed == {"daemon": privileges.DAEMON, "watchdog": privileges.WATCHDOG}


def started(command: Sequence[str]) -> dict[str, int]:
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        k: int(v, 16) for k, v in re.findall(r"^(Cap\w+|NoNewPrivs):\s*(\w+)$", out, re.MULTILINE)
    }


def test_what_a_confined_process_starts_has_nothing() -> None:
    """Whoever has got hold of the daemon gets nothing back by a program, set-user-ID or not."""
    code = (
        "import os, sys\nsys.path.insert(0, sys.argv[1])\nfrom dlmfs import privileges\n"
        "privileges.confine(privileges.DAEMON)\nos.execvp('cat', ['cat', '/proc/self/status'])"
    )
    found = started([sys.executable, "-c", code, str(ROOT / "src")])
    assert (found["CapEff"], found["CapPrm"], found["CapBnd"], found["NoNewPrivs"]) == (0, 0, 0, 1)
