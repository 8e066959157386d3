"""The tools where a process of this very node holds a lock or waits for one."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes
from tests.tools.bench import ENVIRONMENT, until

pytestmark = pytest.mark.fuse


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool that must end by itself."""
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=ENVIRONMENT,
        check=False,
    )


def need(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is missing: install the package {package}")


@pytest.mark.parametrize(("tool", "package"), [("lsof", "lsof"), ("fuser", "psmisc")])
def test_who_has_the_file_open(nodes: Nodes, tool: str, package: str) -> None:
    """The holder is named; a process that waits in open(2) has nothing open yet."""
    need(tool, package)
    a, _ = nodes.pair("holder=file")
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.hold(a / "dom/x")
    assert waiter.waits
    done = run(tool, a / "dom/x")
    assert done.returncode == 0
    assert str(holder.process.pid) in done.stdout
    assert str(waiter.process.pid) not in done.stdout


def test_umount_says_that_the_mount_is_in_use(nodes: Nodes) -> None:
    a, _ = nodes.pair()
    assert nodes.hold(a / "dom/x").wait() == "held"
    done = run("umount" if os.getuid() == 0 else "fusermount3", *(["-u"] * bool(os.getuid())), a)
    assert done.returncode != 0
    assert "busy" in done.stderr
    assert (a / "dom/x").exists()


def test_rm_of_a_lock_in_use(nodes: Nodes) -> None:
    """The kernel's dlmfs: EBUSY. What is idle goes, the domain stays, and the holder goes on."""
    a, _ = nodes.pair()
    holder = nodes.hold(a / "dom/used")
    assert holder.wait() == "held"
    (a / "dom/idle").touch()
    done = run("rm", "-r", a / "dom")
    assert done.returncode == 1
    assert "Device or resource busy" in done.stderr
    assert [path.name for path in (a / "dom").iterdir()] == ["used"]
    assert nodes.status(a)["domains"][0]["locks"][0]["holders"][0]["pid"] == holder.process.pid


def test_a_tool_that_looks_does_not_disturb_a_waiter(nodes: Nodes) -> None:
    """Names and attributes are served while opens wait on the same file: queue unchanged."""
    a, b = nodes.pair()
    holder = nodes.hold(b / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.hold(a / "dom/x")
    assert waiter.waits
    for command in (["ls", "-l"], ["stat"], ["find"], ["chmod", "640"], ["touch", "-c"]):
        assert run(*command, a / "dom/x").returncode == 0
    holder.release()
    assert waiter.wait() == "held"


def test_inotify_tells_of_an_open_when_the_lock_is_granted(nodes: Nodes) -> None:
    """IN_OPEN comes with the lock, not with the attempt; other nodes' opens are not told."""
    need("inotifywait", "inotify-tools")
    a, b = nodes.pair()
    holder = nodes.hold(b / "dom/x")
    assert holder.wait() == "held"
    waiter = nodes.hold(a / "dom/x")
    assert waiter.waits
    log = nodes.folder / "log"
    with log.open("w") as file:
        watch = subprocess.Popen(
            ["inotifywait", "-q", "-m", "-e", "open,attrib", "--format", "%e", str(a / "dom/x")],
            stdout=file,
            stdin=subprocess.DEVNULL,
        )
    nodes.children.append(watch)

    def attribute_seen() -> bool:
        (a / "dom/x").chmod(0o640)
        return "ATTRIB" in log.read_text()

    until("inotifywait listens", attribute_seen)
    assert "OPEN" not in log.read_text()
    holder.release()
    assert waiter.wait() == "held"
    until("the open is told", lambda: "OPEN" in log.read_text())


def test_touch_makes_locks_in_domains_only(nodes: Nodes) -> None:
    a, _ = nodes.pair()
    assert run("touch", a / "dom/new").returncode == 0
    refused = run("touch", a / "new")
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr
    nested = run("mkdir", "-p", a / "dom/sub/sub")
    assert nested.returncode == 1
    assert "Operation not permitted" in nested.stderr


@pytest.mark.parametrize("shell", ["bash", "dash", "busybox"])
def test_a_shell_holds_a_lock_for_its_commands(nodes: Nodes, shell: str) -> None:
    """exec N<>FILE keeps it, commands in between inherit it, exec N>&- drops it."""
    need(shell, shell)
    a, b = nodes.pair()
    (a / "dom/x").touch()
    script = f"exec 9<>{a}/dom/x; /bin/true; echo held; read line; exec 9>&-; echo dropped; read l"
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    child = subprocess.Popen(
        [*command, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    nodes.children.append(child)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    heir = nodes.hold(b / "dom/x")
    assert heir.waits
    child.stdin.write(b"\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"dropped\n"
    assert heir.wait() == "held"


def test_a_stopped_and_killed_tool_leaves_the_queue(nodes: Nodes) -> None:
    """Ctrl-Z, then kill -9: as a user does with a command that does not come back."""
    a, b = nodes.pair()
    holder = nodes.hold(b / "dom/x")
    assert holder.wait() == "held"
    os.mknod(a / "dom/x", stat.S_IFREG | 0o644)
    child = subprocess.Popen(["cat", str(a / "dom/x")], stdout=subprocess.PIPE)
    nodes.children.append(child)
    until("cat waits", lambda: waiters(nodes, a) == [child.pid])
    child.send_signal(signal.SIGSTOP)
    child.kill()
    assert child.wait(PATIENCE_S) == -signal.SIGKILL
    until("its place is given up", lambda: waiters(nodes, a) == [])


def waiters(nodes: Nodes, where: Path) -> list[int]:
    locks = nodes.status(where)["domains"][0]["locks"]
    return [waiter["pid"] for lock in locks for waiter in lock["waiters"]]
