"""The whole daemon as an ordinary user, with fusermount3: who gets in, and who may do what."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.private import OTHER, USER, Private, missing, private

pytestmark = [pytest.mark.fuse, pytest.mark.root]

CREATE = os.O_RDWR | os.O_CREAT
EX_NOPERM = 77
FAILED = 32


@pytest.fixture(scope="module")
def here() -> Iterator[Private]:
    """One place for the tests of this module; each uses names of its own."""
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
    with private() as made:
        yield made


@pytest.fixture
def mounted(here: Private) -> Iterator[Path]:
    """A mount of USER with a domain and a lock, without allow_other."""
    where = here.mount("own")
    here.sh(f"mkdir {where}/dom && echo value >{where}/dom/x", check=True)
    try:
        yield where
    finally:
        here.dlmfs("umount", "-l", where)


def allow_other(here: Private, allowed: bool) -> None:
    """Write the place's own fuse.conf."""
    if not Path("/etc/fuse.conf").exists():
        pytest.skip("no /etc/fuse.conf to put another in its place: install the package fuse3")
    text = "user_allow_other" if allowed else ""
    here.sh(f"echo {text} >/etc/fuse.conf", uid=None, check=True)


@pytest.fixture
def open_to_all(here: Private) -> Iterator[Path]:
    """The same with allow_other."""
    allow_other(here, True)
    where = here.mount("open", "allow_other")
    try:
        here.sh(f"mkdir {where}/dom && echo value >{where}/dom/x", check=True)
        yield where
    finally:
        here.dlmfs("umount", "-l", where)
        allow_other(here, False)


# -- the ordinary life -----------------------------------------------------------------------------


def test_two_nodes_of_an_ordinary_user(here: Private) -> None:
    """Exclusion, value, trylock and leaving, with nothing that root prepared but FUSE itself."""
    a, b = here.mount("a"), here.mount("b")
    assert here.sh(f"mkdir {a}/dom {b}/dom && echo value >{a}/dom/x").returncode == 0
    assert here.status(a)["domains"][0]["members"] == ["a", "b"]
    daemon = here.status(a)["pid"]
    assert here.sh(f"stat -c %u /proc/{daemon}").stdout == f"{USER}\n"
    # Without no_new_privs: fusermount3 is set-user-ID, and is needed at the end.
    told = here.sh(f"grep -E '^(CapEff|NoNewPrivs):' /proc/{daemon}/status").stdout.split()
    assert told == ["CapEff:", "0" * 16, "NoNewPrivs:", "0"]
    with here.holding(a / "dom/x"):
        assert here.errno(b / "dom/x", CREATE | os.O_NONBLOCK) == errno.ETXTBSY
    assert here.sh(f"head -c 5 {b}/dom/x").stdout == "value"
    for where in (a, b):
        assert here.dlmfs("umount", where).returncode == 0
        assert here.sh(f"mountpoint -q {where}").returncode != 0
    done = here.py("import os; os.kill(int(os.sys.argv[1]), 0)", str(daemon))
    assert "ProcessLookupError" in done.stderr


def test_the_files_belong_to_their_makers(here: Private, mounted: Path) -> None:
    """The root of the mount too: it is the user's, mode 0755."""
    done = here.sh(f"cd {mounted} && stat -c '%u %a' . dom dom/x")
    assert done.stdout.split("\n")[:3] == [f"{USER} 755", f"{USER} 755", f"{USER} 644"]


def test_state_and_socket_are_private(here: Private, mounted: Path) -> None:
    """Others must not read values or forge grants."""
    assert mounted.name == "own"
    for folder in (f"/dev/shm/dlmfs-{USER}", f"/dev/shm/dlmfs-{USER}/ctl"):
        done = here.sh(f"stat -c '%u %a' {folder}", uid=None)
        assert done.stdout == f"{USER} 700\n"


def test_a_state_file_of_ones_own(here: Private) -> None:
    """Root is refused: what lies there is a user's to swap, and the database a user's to write."""
    folder = here.home / "kept"
    here.sh(f"umask 0; mkdir -m 700 {folder}", check=True)
    source = f"local:{folder}/state.db"
    where = here.mount("own-file", source=source)
    try:
        assert here.sh(f"mkdir {where}/dom && echo value >{where}/dom/x").returncode == 0
        modes = here.sh(f"stat -c %a {folder}/state.db*").stdout.split()
        assert modes == ["600", "600", "600", "700"]
        here.sh(f"mkdir {here.home}/roots", uid=None, check=True)
        refused = here.dlmfs("mount", source, here.home / "roots", uid=None)
        assert refused.returncode == FAILED
        assert f"{folder} belongs to another user (uid {USER})" in refused.stderr
        assert here.sh(f"stat -c %u {folder}/state.db*").stdout.split() == [str(USER)] * 4
    finally:
        here.dlmfs("umount", "-l", where)


def test_a_dead_daemon_of_an_ordinary_user(here: Private) -> None:
    """SIGKILL; the next mount at its place clears what is left."""
    where = here.mount("dead")
    here.sh(f"kill -9 {here.status(where)['pid']}", check=True)
    again = here.mount("dead")
    assert here.sh(f"mkdir {again}/dom").returncode == 0
    assert here.sh("grep -c /dead /proc/self/mountinfo").stdout == "1\n"
    assert here.dlmfs("umount", where).returncode == 0


# -- who gets in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [OTHER, 0])
def test_without_allow_other_nobody_else_gets_in(here: Private, mounted: Path, uid: int) -> None:
    """Not even root; neither to look nor to lock."""
    for command in ("stat", "ls", "cat", "touch", "rm", "chmod 777"):
        done = here.sh(f"{command} {mounted}/dom/x", uid=uid)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    assert here.errno(mounted / "dom/x", os.O_RDONLY, uid=uid) == errno.EACCES
    assert "Permission denied" in here.sh(f"stat {mounted}", uid=uid).stderr
    assert here.sh(f"mkdir {mounted}/new", uid=uid).returncode != 0


def test_allow_other_needs_the_administrators_consent(here: Private) -> None:
    allow_other(here, False)
    where = here.home / "refused"
    here.sh(f"mkdir {where}", check=True)
    done = here.dlmfs("mount", "local", where, "-o", "allow_other")
    assert done.returncode == 1
    assert done.stderr == "dlmfs: allow_other needs the line 'user_allow_other' in /etc/fuse.conf\n"
    assert here.sh(f"mountpoint -q {where}").returncode != 0


def test_with_allow_other_modes_decide(here: Private, open_to_all: Path) -> None:
    """0644 in 0755: another user may lock shared, and nothing else."""
    lock = open_to_all / "dom/x"
    assert here.sh(f"head -c 5 {lock}", uid=OTHER).stdout == "value"
    assert here.errno(lock, os.O_RDWR, uid=OTHER) == errno.EACCES
    assert here.errno(lock, os.O_WRONLY | os.O_NONBLOCK, uid=OTHER) == errno.EACCES
    assert here.errno(open_to_all / "dom/new", CREATE, uid=OTHER) == errno.EACCES
    for command in (f"mkdir {open_to_all}/new", f"rm -f {lock}", f"touch -c -d 2000-01-01 {lock}"):
        assert here.sh(command, uid=OTHER).returncode != 0
    for command in (f"chmod 666 {lock}", f"chown {OTHER} {lock}", f"rmdir {open_to_all}/dom"):
        assert here.sh(command, uid=OTHER).returncode != 0
    assert here.sh(f"stat -c '%u %a' {lock}").stdout == f"{USER} 644\n"


def test_a_refused_open_takes_no_lock(here: Private, open_to_all: Path) -> None:
    """The kernel refuses before the daemon is asked: the level stays as it was."""
    lock = open_to_all / "dom/secret"
    script = "import os, stat, sys; os.mknod(sys.argv[1], stat.S_IFREG | 0o600)"
    assert here.py(script, lock).returncode == 0
    assert here.errno(lock, os.O_RDONLY, uid=OTHER) == errno.EACCES
    assert here.errno(lock, os.O_RDWR, uid=OTHER) == errno.EACCES
    script = "import os, sys; print(os.getxattr(sys.argv[1], 'user.dlmfs.mode').decode())"
    assert here.py(script, lock).stdout == "NL\n"
    assert "PermissionError" in here.py(script, lock, uid=OTHER).stderr


def test_a_sticky_domain_for_all(here: Private, open_to_all: Path) -> None:
    """As /tmp: everybody makes locks, and removes only his own."""
    here.sh(f"chmod 1777 {open_to_all}/dom", check=True)
    assert here.errno(open_to_all / "dom/theirs", CREATE, uid=OTHER) == 0
    assert here.sh(f"stat -c %u {open_to_all}/dom/theirs").stdout == f"{OTHER}\n"
    done = here.sh(f"rm -f {open_to_all}/dom/x", uid=OTHER)
    assert "Operation not permitted" in done.stderr
    assert here.sh(f"rm {open_to_all}/dom/theirs", uid=OTHER).returncode == 0


def test_root_and_chown_on_the_mount_of_a_user(here: Private, open_to_all: Path) -> None:
    """With allow_other root may do all; nobody else may give a file away."""
    lock = open_to_all / "dom/x"
    done = here.sh(f"chown {OTHER} {lock}")
    assert "Operation not permitted" in done.stderr
    assert here.sh(f"chown {OTHER}:{OTHER} {lock} && chmod 600 {lock}", uid=0).returncode == 0
    assert here.errno(lock, os.O_RDWR, uid=OTHER) == 0
    assert here.errno(lock, os.O_RDWR, uid=USER) == errno.EACCES


def test_others_wait_and_exclude_as_the_owner_does(here: Private, open_to_all: Path) -> None:
    """The lock knows no users: one user's holder keeps another user's trylock out."""
    here.sh(f"chmod 666 {open_to_all}/dom/x", check=True)
    where = here.mount("second", "holder=file")
    here.sh(f"mkdir {where}/dom", check=True)
    with here.holding(open_to_all / "dom/x", uid=OTHER):
        assert here.errno(where / "dom/x", CREATE | os.O_NONBLOCK) == errno.ETXTBSY
    assert here.errno(where / "dom/x", CREATE) == 0
    assert here.dlmfs("umount", where).returncode == 0


# -- what is another user's --------------------------------------------------------------------------


def test_unmounting_another_users_mount_is_refused(here: Private, mounted: Path) -> None:
    for lazy in ([], ["-l"]):
        done = here.dlmfs("umount", *lazy, mounted, uid=OTHER)
        assert done.returncode == 1
        assert "is another user's" in done.stderr
        assert here.run("fusermount3", "-u", *(["-z"] * bool(lazy)), mounted, uid=OTHER).returncode
    assert here.sh(f"mountpoint -q {mounted}").returncode == 0


def test_mounting_on_another_users_folder_is_refused(here: Private) -> None:
    where = here.home / "theirs"
    here.sh(f"mkdir {where}", uid=OTHER, check=True)
    done = here.dlmfs("mount", "local", where)
    assert done.returncode == 1
    assert "not yours to mount on" in done.stderr


@pytest.mark.parametrize("folder_mode", ["700", "711"])
def test_asking_another_users_daemon_is_refused(
    here: Private, mounted: Path, folder_mode: str
) -> None:
    """Its status names processes and locks: that is the owner's and root's business. Also where the
    socket can be reached, the daemon looks at who asks."""
    folder = f"/dev/shm/dlmfs-{USER}"
    here.sh(f"chmod {folder_mode} {folder} {folder}/ctl", check=True)
    try:
        for words in (("status", mounted), ("info", mounted / "dom/x")):
            done = here.dlmfs(*words, uid=OTHER)
            assert "another user" in done.stdout + done.stderr
            assert "DEAD" not in done.stdout
            assert done.returncode == EX_NOPERM
            assert here.dlmfs(*words, uid=0).returncode == 0
    finally:
        here.sh(f"chmod 700 {folder} {folder}/ctl", check=True)


def test_a_user_without_a_name_is_told_what_is_missing(here: Private) -> None:
    """fusermount3 looks the user up: in containers there may be no such line."""
    where, uid = here.home / "nameless", 23456
    here.sh(f"mkdir {where}", uid=uid, check=True)
    done = here.dlmfs("mount", "local", where, uid=uid)
    assert done.returncode in (1, FAILED)
    assert "mounts for known users only" in done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("made", ["mkdir -m 777 -p F/ctl", "ln -s /tmp F", ": >F"])
def test_nobody_keeps_another_from_mounting(here: Private, made: str) -> None:
    """/dev/shm is everybody's. Whoever was there first does not own our locks, nor stops us; and all of a
    user's mounts meet in one lock space, also when the other has gone."""
    uid = USER + 1
    folder = f"/dev/shm/dlmfs-{uid}"
    here.sh(f"rm -rf {folder}*", uid=0, check=True)
    here.sh(made.replace("F", folder), uid=OTHER, check=True)
    a = here.mount("squatted-a", uid=uid)
    here.sh(f"rm -rf {folder}", uid=OTHER, check=True)
    b = here.mount("squatted-b", uid=uid)
    try:
        here.sh(f"mkdir {a}/dom {b}/dom; touch {b}/dom/x", uid=uid, check=True)
        with here.holding(a / "dom/x", uid=uid):
            assert here.errno(b / "dom/x", os.O_RDWR | os.O_NONBLOCK, uid=uid) == errno.ETXTBSY
        assert here.status(a, uid=uid)["domains"][0]["members"] == ["squatted-a", "squatted-b"]
        assert here.dlmfs("status", a, uid=0).returncode == 0
        (used,) = here.sh(f"ls -d {folder}*", uid=0).stdout.split()
        assert used.startswith(f"{folder}.")
        modes = here.sh(f"stat -c '%u %a' {used} {used}/ctl", uid=0).stdout
        assert modes == f"{uid} 700\n" * 2
    finally:
        for where in (a, b):
            here.dlmfs("umount", "-l", where, uid=uid)


@pytest.mark.parametrize("mode", [700, 777])
def test_a_state_file_in_another_users_folder_is_refused(here: Private, mode: int) -> None:
    folder = here.home / f"of-another{mode}"
    here.sh(f"mkdir -m {mode} -p {folder}", uid=OTHER, check=True)
    where = here.home / "wants"
    here.sh(f"mkdir -p {where}", check=True)
    done = here.dlmfs("mount", f"local:{folder}/state.db", where)
    assert done.returncode == FAILED
    assert f"{folder} belongs to another user (uid {OTHER})" in done.stderr


def test_the_state_of_root_is_for_root(here: Private) -> None:
    """A lock's mode guards its value: the state must not tell it to everybody. And who may read a
    file may put a read lock on it, which keeps SQLite's writers out for as long as he likes."""
    where = here.mount("roots", uid=0)
    here.sh(f"mkdir {where}/dom; umask 77; echo secret >{where}/dom/x", uid=0, check=True)
    try:
        assert "Permission denied" in here.sh(f"cat {where}/dom/x").stderr
        state = here.status(where, uid=0)["store"]["path"]
        for suffix in ("", "-wal", "-shm"):
            assert here.errno(Path(state + suffix), os.O_RDONLY) == errno.EACCES, suffix
    finally:
        here.dlmfs("umount", "-l", where, uid=0)


def test_only_root_administers_the_mount_of_root(here: Private) -> None:
    """Root's mounts are open to all, their status too; putting a node out or removing what a domain
    left behind is not for everybody."""
    source = f"local:{here.base}/roots.db"
    a, b = (here.mount(name, uid=0, source=source) for name in ("root-a", "root-b"))
    try:
        assert here.dlmfs("status", a).returncode == 0
        for words in (("evict", "root-b", a), ("domain", "rm", "dom", a)):
            done = here.dlmfs(*words)
            assert done.returncode == EX_NOPERM, done.stdout + done.stderr
        assert here.status(b, uid=0)["lease"]["state"] == "HEALTHY"
    finally:
        for where in (a, b):
            here.dlmfs("umount", "-l", where, uid=0)


def test_a_folder_of_ones_own_that_others_can_write_is_refused(here: Private) -> None:
    uid = USER + 2
    folder = f"/dev/shm/dlmfs-{uid}"
    where = here.home / "ctl-mount"
    here.sh(f"mkdir {where} && mkdir -m 777 {folder}", uid=uid, check=True)
    done = here.dlmfs("mount", "local", where, uid=uid)
    assert done.returncode == FAILED
    assert f"{folder} is not a folder that only this user can write" in done.stderr


FORGE = """
import json, os, select, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
sock.listen()
print("listening", flush=True)
while sys.stdin not in select.select([sock, sys.stdin], [], [])[0]:
    peer, _ = sock.accept()
    peer.makefile("rb").readline()
    peer.sendall(json.dumps({"ok": {"forged": True}}).encode() + b"\\n")
    peer.close()
"""


def test_an_answer_from_another_users_socket_is_refused(here: Private) -> None:
    """A daemon died, and another user's program answers at its place: it is not believed."""
    uid = USER + 3
    folder = f"/dev/shm/dlmfs-{uid}"
    state = here.home / "forge-state"
    here.sh(f"mkdir -p {state}; chown {uid} {state}", uid=0, check=True)
    where = here.mount("forged", uid=uid, source=f"local:{state}/state.db")
    daemon = here.status(where, uid=uid)["pid"]
    socket = here.sh(f"ls {folder}/ctl", uid=0).stdout.strip()
    here.sh(f"kill -9 {daemon}; rm -rf {folder}", uid=uid, check=True)
    here.sh(f"mkdir -m 755 -p {folder}/ctl", uid=OTHER, check=True)
    place = f"{folder}/ctl/{socket}"
    try:
        with here.running(here.python, "-I", "-c", FORGE, place, says="listening", uid=OTHER):
            done = here.dlmfs("status", "--json", where, uid=uid)
        assert '"forged": true' not in done.stdout
        assert "internal error" not in done.stderr
    finally:
        here.run("umount", "-l", where, uid=None)
