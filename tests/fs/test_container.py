"""Containers: process, mount and user namespaces around daemons and around programs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes
from tests.tools.bench import until
from tests.tools.private import USER, Private, missing, private

pytestmark = [pytest.mark.fuse, pytest.mark.root]

CREATE = os.O_RDWR | os.O_CREAT
MAKE = "mkdir {0}/dom && echo value >{0}/dom/x"
USERNS = "--user --map-root-user --mount"


@pytest.fixture(scope="module")
def here() -> Iterator[Private]:
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
    with private() as made:
        yield made


@pytest.fixture
def where(here: Private) -> Iterator[Path]:
    """A mount of root's in a process namespace of its own, holder=file."""
    made = here.mount("ns", "holder=file", uid=0, source="local:ns")
    here.sh(MAKE.format(made), uid=0, check=True)
    try:
        yield made
    finally:
        here.dlmfs("umount", "-l", made, uid=0)


# -- a daemon in a process namespace -----------------------------------------------------------------


def test_a_daemon_in_a_process_namespace(here: Private, where: Path) -> None:
    """It tells the process numbers of its own namespace, where they can be acted on."""
    assert here.status(where, uid=0)["pid"] < 1000
    with here.holding(where / "dom/x", uid=0):
        (holder,) = here.status(where, uid=0)["domains"][0]["locks"][0]["holders"]
        assert here.sh(f"cat /proc/{holder['pid']}/comm", uid=0).stdout == "sh\n"


def test_programs_outside_of_the_daemons_process_namespace(here: Private, where: Path) -> None:
    """They are numbered 0 there, and are told apart all the same: numbers are for people only."""
    lock = where / "dom/x"
    with here.holding(lock, uid=0, pids=False):
        for flags in (os.O_RDONLY, os.O_RDWR):
            refused = here.errno(lock, flags | os.O_NONBLOCK, uid=0, pids=False)
            assert refused == errno.ETXTBSY, "another process of the same outside"
            assert here.errno(lock, flags | os.O_NONBLOCK, uid=0) == errno.ETXTBSY
        (holder,) = here.status(where, uid=0)["domains"][0]["locks"][0]["holders"]
        assert holder["pid"] == 0
        assert here.dlmfs("status", where, uid=0).returncode == 0
    assert here.errno(lock, os.O_RDWR, uid=0, pids=False) == 0


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_from_outside_ends_a_wait(here: Private, where: Path, sign: int) -> None:
    """The wait of a process that the daemon cannot see; its place is not kept for anybody."""
    lock = where / "dom/x"

    def waiting() -> list[object]:
        locks = here.status(where, uid=0)["domains"][0]["locks"]
        return [waiter for known in locks for waiter in known["waiters"]]

    with here.holding(lock, uid=0):
        command = here.command("cat", lock, uid=0, pids=False)
        waiter = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            until("it waits", lambda: waiting() != [])
            waiter.send_signal(sign)
            assert waiter.wait(PATIENCE_S) == -sign
            until("its wait is over", lambda: waiting() == [])
        finally:
            waiter.kill()
            waiter.wait()
    assert here.errno(lock, os.O_RDWR | os.O_NONBLOCK, uid=0) == 0


def test_nodes_in_different_process_namespaces_exclude_each_other(nodes: Nodes) -> None:
    """One state file, as a volume: the kernel tells a lock's holder in the asker's numbers, so each
    sees the other's as 0, which must not pass for dead."""
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
    outside = nodes.mount("outside")
    (outside / "dom").mkdir()
    holder = nodes.hold(outside / "dom/x")
    assert holder.wait() == "held"
    with private(shared=nodes.folder) as inner:
        inside = inner.mount("inside", uid=0, source=f"local:{inner.base}/host/state.db")
        inner.sh(f"mkdir {inside}/dom", uid=0, check=True)
        tried = CREATE | os.O_NONBLOCK
        assert inner.errno(inside / "dom/x", tried, uid=0) == errno.ETXTBSY, "both have it"
        for members in (nodes.status(outside), inner.status(inside, uid=0)):
            assert members["domains"][0]["members"] == ["inside", "outside"]
        holder.release()
        with inner.holding(inside / "dom/x", uid=0):
            refused = nodes.hold(outside / "dom/x", tried)
            assert refused.wait() == f"error {errno.ETXTBSY}"
        assert nodes.hold(outside / "dom/x").wait() == "held"
        inner.dlmfs("umount", inside, uid=0, check=True)


def test_the_end_of_a_container_frees_its_locks(nodes: Nodes) -> None:
    """Its init dies, the kernel kills the daemon with it: a node outside has the lock at once."""
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
    outside = nodes.mount("outside")
    (outside / "dom").mkdir()
    with private(shared=nodes.folder) as inner:
        inside = inner.mount("inside", uid=0, source=f"local:{inner.base}/host/state.db")
        inner.sh(f"mkdir {inside}/dom", uid=0, check=True)
        with inner.holding(inside / "dom/x", uid=0):
            assert nodes.status(outside)["domains"][0]["members"] == ["inside", "outside"]
            waiter = nodes.hold(outside / "dom/x")
            assert waiter.waits
            os.kill(inner.init, signal.SIGKILL)
            assert waiter.wait() == "held"


# -- a container without root ------------------------------------------------------------------------


def in_container(here: Private, script: str, uid: int = USER) -> subprocess.CompletedProcess[str]:
    """Run a shell as root of a user namespace of that user. $dlmfs is the program."""
    dlmfs = f"{here.python} -I {here.base}/repo/scripts/dlmfs"
    return here.sh(f'dlmfs="{dlmfs}"\n{script}', uid=uid, unshare=USERNS)


@pytest.fixture
def userns(here: Private) -> Private:
    done = here.run("true", unshare=USERNS)
    if done.returncode:
        pytest.skip(f"no user namespaces for ordinary users here: {done.stderr.strip()}")
    return here


CONTAINER = """
set -e
mkdir -p {home}
{prepare}
mkdir -p {home}/a {home}/b
$dlmfs mount local:{home}/state.db {home}/a -o node=a,holder=node
$dlmfs mount local:{home}/state.db {home}/b -o node=b,holder=node
mkdir {home}/a/dom {home}/b/dom
echo value >{home}/a/dom/x
touch {home}/b/dom/x
head -c 5 {home}/b/dom/x; echo
$dlmfs status --json {home}/a
exec 9<>{home}/a/dom/x
dd if={home}/b/dom/x iflag=nonblock of=/dev/null 2>&1 | grep -c 'Text file busy' || true
exec 9>&-
grep {home} /proc/self/mountinfo | grep -c 'nosuid,nodev' || true
$dlmfs umount {home}/a
$dlmfs umount {home}/b
echo done
"""


@pytest.mark.parametrize(
    "prepare", ["mount -t tmpfs tmpfs /run", ":"], ids=["own /run", "host's /run"]
)
def test_a_container_without_root(userns: Private, prepare: str) -> None:
    """`unshare -Urm`: root there may mount, and is nobody outside, where /run is not its own."""
    name = "rootless" + str(len(prepare))
    script = CONTAINER.format(home=userns.home / name, prepare=prepare)
    done = in_container(userns, script)
    assert "internal error" not in done.stderr
    assert (done.returncode, done.stderr) == (0, "")
    value, status, busy, flags, last = done.stdout.splitlines()
    assert (value, busy, flags, last) == ("value", "1", "2", "done")
    (report,) = json.loads(status)
    assert report["domains"][0]["members"] == ["a", "b"]


@pytest.mark.parametrize("unshare", [USERNS, "--mount"], ids=["without root", "with root"])
def test_a_container_whose_run_is_read_only(userns: Private, unshare: str) -> None:
    """As `docker run --read-only` has it: it works, or says why, in one line."""
    home = userns.home / f"readonly{len(unshare)}"
    dlmfs = f"{userns.python} -I {userns.base}/repo/scripts/dlmfs"
    script = (
        f"mkdir -p {home}.d {home}; mount -t tmpfs -o ro tmpfs /run; "
        f"{dlmfs} mount local:{home}.d/s.db {home}"
        f"; code=$?; {dlmfs} umount -l {home} 2>/dev/null; exit $code"
    )
    done = userns.sh(script, uid=USER if "user" in unshare else 0, unshare=unshare)
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_default_source_in_a_container_without_root(userns: Private) -> None:
    """The state folder of the host's root is not writable: it works, or says why, in one line."""
    home = userns.home / "default"
    script = (
        f"mkdir -p {home}; $dlmfs mount local {home}; code=$?; $dlmfs umount -l {home}; exit $code"
    )
    done = in_container(userns, script)
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_outsiders_do_not_get_into_a_container_without_root(userns: Private) -> None:
    """The kernel lets only the mount's user namespace and its children in, whatever allow_other."""
    home = userns.home / "inner"
    script = (
        f"mount -t tmpfs tmpfs /run; mkdir -p {home}.d {home}; "
        f"$dlmfs mount local:{home}.d/s.db {home} || exit; mkdir {home}/dom; "
        f"echo $$; read line; $dlmfs umount -l {home}"
    )
    dlmfs = f'dlmfs="{userns.python} -I {userns.base}/repo/scripts/dlmfs"\n'
    command = userns.command("sh", "-c", dlmfs + script, unshare=USERNS)
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        pid = int(child.stdout.readline())
        done = userns.sh(f"ls /proc/{pid}/root{home}", uid=0)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    finally:
        child.communicate("\n", timeout=PATIENCE_S)


# -- mount namespaces --------------------------------------------------------------------------------


def test_a_mount_in_a_namespace_of_its_own_is_seen_nowhere_else(here: Private, where: Path) -> None:
    """The machine's table has nothing of it, so `dlmfs status` outside does not list it."""
    assert str(where) not in Path("/proc/self/mountinfo").read_text()
    assert here.sh(f"mountpoint -q {where}", uid=0).returncode == 0


def test_a_copy_of_the_mount_table_keeps_the_mount_busy_until_it_ends(
    here: Private, where: Path
) -> None:
    """`unshare -m` copies the mount. umount in the first namespace leaves the copy: the daemon serves
    it until that one is gone too, and says so."""
    script = f"mount --make-rprivate /; echo copied; read line; cat {where}/dom/x | head -c 5"
    command = here.command("sh", "-c", script, uid=0, unshare="--mount")
    copy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert copy.stdout is not None
    try:
        assert copy.stdout.readline() == "copied\n"
        pid = here.status(where, uid=0)["pid"]
        assert here.run("umount", where, uid=0).returncode == 0
        out, _ = copy.communicate("\n", timeout=PATIENCE_S)
        assert out == "value"
    finally:
        copy.kill()
        copy.wait()
    gone = here.sh(f"timeout 20 sh -c 'while kill -0 {pid} 2>/dev/null; do sleep 0.1; done'", uid=0)
    assert gone.returncode == 0, "the daemon goes on without a mount"
