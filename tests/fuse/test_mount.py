"""The device loop, mounting and unmounting on a real kernel."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlmfs.errors import MountFailed, NotPermitted, UsageError
from dlmfs.fuse import glance, mount, mountinfo
from tests.fuse.conftest import DEADLINE_S, ENVIRONMENT, Child, serve

Start = Callable[..., Child]

fuse = pytest.mark.fuse


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again, for what sends no event."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


# -- the device on a real mount -------------------------------------------------------------------


@fuse
def test_plain_use(server: Child, client: Start) -> None:
    user = client("""
fd = os.open(mnt + "/now", os.O_RDWR)
say(len(os.read(fd, 100)))
say(os.pwrite(fd, b"abc", 3))
os.fsync(fd)
os.close(fd)
say(sorted(os.listdir(mnt)))
say(os.stat(mnt + "/now").st_size)
say(os.statvfs(mnt).f_namemax)
say([attempt(os.open, mnt + "/none", os.O_RDONLY), attempt(os.mkdir, mnt + "/x"),
     attempt(os.unlink, mnt + "/now"), attempt(os.open, mnt + "/new", os.O_CREAT | os.O_RDWR)])
say(attempt(os.access, mnt + "/now", os.R_OK))
""")
    told = [user.told() for _ in range(7)]
    assert told[:5] == [64, 3, ["held", "now"], 64, 255]
    assert told[5:] == [["ENOENT", "EPERM", "EBUSY", "EACCES"], None]
    until(lambda: server.say("state")["open"] == 0)
    # HANDLE_KILLPRIV: a write asks for no security.capability before.
    assert not [call for call in server.say("state")["calls"] if call.startswith("getxattr")]


@fuse
def test_a_failing_handler_is_eio_and_no_more(server: Child, client: Start) -> None:
    user = client("""
say(attempt(os.open, mnt + "/broken", os.O_CREAT | os.O_RDWR))
say(attempt(os.open, mnt + "/now", os.O_RDWR))
""")
    assert [user.told(), user.told()] == ["EIO", None]


@fuse
def test_a_reply_that_the_kernel_refuses_ends_the_request(server: Child, client: Start) -> None:
    """An answer longer than was asked for. (Were it not ended, the process would hang.)"""
    user = client("""
buffer = ctypes.create_string_buffer(50)
path = os.fsencode(mnt + "/now")
say([libc.getxattr(path, b"user.long", buffer, 50), errno.errorcode[ctypes.get_errno()]])
say(len(os.getxattr(mnt + "/now", "user.long")))
""")
    assert [user.told(), user.told()] == [[-1, "EIO"], 100]


@fuse
@pytest.mark.parametrize("restart", [True, False])
def test_a_signal_ends_a_waiting_open(server: Child, client: Start, restart: bool) -> None:
    user = client(
        """
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, sys.argv[2] == "False")
signal.setitimer(signal.ITIMER_REAL, 0.1)
say([libc.open(os.fsencode(mnt + "/held"), os.O_RDWR), errno.errorcode[ctypes.get_errno()]])
""",
        str(restart),
    )
    assert user.told() == [-1, "EINTR"]
    state = server.say("state")
    assert (state["waiting"], state["pending"], state["interrupts"]) == (0, 0, 1)


@fuse
def test_sigkill_ends_a_waiting_open(server: Child, client: Start) -> None:
    user = client("os.open(mnt + '/held', os.O_RDWR)")
    server.say("wait 1")
    user.kill()
    assert user.wait() == -signal.SIGKILL
    state = server.say("state")
    assert (state["waiting"], state["interrupts"], state["open"]) == (0, 1, 0)


@fuse
def test_a_killed_process_gives_back_what_it_was_granted(server: Child, client: Start) -> None:
    """Killed while the grant is on its way: the kernel sends RELEASE, or refuses the reply."""
    for _ in range(20):
        user = client("os.open(mnt + '/held', os.O_RDWR)\nsay('granted')\nsignal.pause()")
        server.say("wait 1")
        assert server.process.stdin is not None
        server.process.stdin.write(b"grant\n")
        user.kill()
        assert server.told() in (0, 1)
        assert user.wait() == -signal.SIGKILL
    until(lambda: server.say("state")["open"] == 0)
    assert server.say("state")["pending"] == 0


@fuse
def test_three_hundred_opens_wait_at_once(server: Child, client: Start) -> None:
    user = client("""
for _ in range(300):
    if not os.fork():
        os.open(mnt + "/held", os.O_RDWR)
        os._exit(7)
say("forked")
say(sum(os.waitstatus_to_exitcode(os.wait()[1]) == 7 for _ in range(300)))
""")
    assert user.told() == "forked"
    server.say("wait 300")
    # Others are not held up: neither in the directory nor at a create in it.
    other = client("""
say(sorted(os.listdir(mnt)))
say(attempt(os.open, mnt + "/now", os.O_RDWR | os.O_CREAT))
say(attempt(os.open, mnt + "/held", os.O_RDWR | os.O_NONBLOCK))
say(attempt(os.open, mnt + "/fresh", os.O_RDWR | os.O_CREAT))
""")
    assert [other.told() for _ in range(4)] == [["held", "now"], None, "ETXTBSY", "EACCES"]
    assert server.say("grant") == 300
    assert user.told() == 300
    until(lambda: server.say("state")["open"] == 0)


@fuse
def test_creating_does_not_hold_the_directory(server: Child, client: Start) -> None:
    """O_CREAT of a name that must wait is MKNOD and OPEN, not CREATE (fuse-notes, Critical 1)."""
    waiter = client("say(attempt(os.open, mnt + '/held', os.O_RDWR | os.O_CREAT))")
    server.say("wait 1")
    user = client("say(attempt(os.open, mnt + '/other', os.O_RDWR | os.O_CREAT))")
    assert user.told() == "EACCES"
    server.say("refuse")
    assert waiter.told() == "ETXTBSY"


@fuse
def test_poll_is_woken(server: Child, client: Start) -> None:
    user = client("""
fd = os.open(mnt + "/now", os.O_RDONLY)
poll = select.poll()
poll.register(fd, select.POLLIN)
say(poll.poll(0))
say(poll.poll(30000)[0][1])
""")
    assert user.told() == []
    until(lambda: server.say("state")["pollers"] == 1)
    server.say(f"poll {0x001 | 0x040}")
    assert user.told() == 1


@fuse
def test_a_name_is_forgotten(server: Child, client: Start) -> None:
    def lookups() -> int:
        return int(server.say("state")["calls"].count("lookup now"))

    assert client("say(attempt(os.stat, mnt + '/now'))").told() is None
    before = lookups()
    assert client("say(attempt(os.stat, mnt + '/now'))").told() is None
    assert lookups() == before
    server.say("forget now")
    server.say("forget never-seen")
    until(lambda: client("say(attempt(os.stat, mnt + '/now'))").told() or lookups() > before)


@fuse
def test_a_name_is_forgotten_while_its_directory_is_locked(server: Child, client: Start) -> None:
    """The kernel holds the directory's lock as long as the unlink waits for us."""
    user = client("say(attempt(os.unlink, mnt + '/held'))")
    server.say("wait 1")
    server.say("forget now")
    assert server.say("state")["pending"] == 1  # it still answers
    assert server.say("refuse") == 1
    assert user.told() == "ETXTBSY"


# -- mounting -------------------------------------------------------------------------------------


@fuse
def test_the_mount_table_shows_it(server: Child, mountpoint: Path) -> None:
    entry = mount.find(str(mountpoint))
    assert entry is not None
    assert (entry.mountpoint, entry.fstype) == (str(mountpoint), "fuse.dlmfs")
    assert entry.source == "tiny, with \\ and comma"
    assert {"nosuid", "nodev"} <= set(entry.options)
    assert {f"user_id={os.getuid()}", "default_permissions"} <= set(entry.super_options)
    assert not glance.is_dead(entry)
    assert mount.find(str(mountpoint.parent)) is None


@fuse
def test_a_mount_point_with_odd_characters(
    tmp_path: Path, children: list[Child], mountpoint: Path
) -> None:
    odd = tmp_path / "a b\tc\\d\ne#"
    odd.mkdir()
    child = serve(odd)
    children.append(child)
    try:
        entry = mount.find(str(odd / "x"))
        assert entry is not None
        assert entry.mountpoint == str(odd)
    finally:
        mount.unmount(str(odd))
    assert child.line() == "ended unmounted"
    assert mount.find(str(odd)) is None


@fuse
def test_find_resolves_links_outside_and_asks_the_mount_nothing(
    server: Child, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("mnt")
    (tmp_path / "far").symlink_to(tmp_path / "link" / "dir")
    os.kill(server.pid, signal.SIGSTOP)  # whatever touches the mount now hangs
    try:
        for path in ("mnt", "link", "link/dir/file", "far/file", "mnt/dir/../..//mnt/./x"):
            entry = mount.find(str(tmp_path / path))
            assert entry is not None, path
            assert entry.mountpoint == str(mountpoint)
        assert mount.find(str(tmp_path / "mnt" / "..")) is None
        assert mount.find(str(tmp_path / "mntx")) is None
        monkeypatch.chdir(tmp_path)
        assert mount.find("link/x") == entry is not None
        began = time.monotonic()
        assert not glance.is_dead(entry)
        assert time.monotonic() - began < glance.PATIENCE_S + DEADLINE_S
    finally:
        os.kill(server.pid, signal.SIGCONT)


@fuse
def test_a_mount_in_use_is_busy_and_can_be_detached(
    server: Child, client: Start, mountpoint: Path
) -> None:
    user = client("fd = os.open(mnt + '/now', os.O_RDONLY)\nsay('open')\nsys.stdin.readline()")
    user.told()
    with pytest.raises(MountFailed, match=r"in use: 'fuser -vm .*/mnt'"):
        mount.unmount(str(mountpoint))
    mount.unmount(str(mountpoint), lazy=True)
    assert mount.find(str(mountpoint)) is None
    assert server.say("state")["open"] == 1
    user.kill()
    assert server.line() == "ended unmounted"
    assert server.wait() == 0


@fuse
def test_unmounting_what_is_none(server: Child, mountpoint: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", mountpoint / "now", Path("/")):
        with pytest.raises(UsageError, match="no dlmfs is mounted at"):
            mount.unmount(str(path))
    mount.unmount(str(mountpoint))
    assert server.line() == "ended unmounted"


# -- the remains of a dead daemon -----------------------------------------------------------------


def kill(server: Child) -> None:
    server.kill()
    assert server.wait() == -signal.SIGKILL


@fuse
def test_a_dead_daemons_mount_is_cleared(server: Child, client: Start, mountpoint: Path) -> None:
    waiter = client("say(attempt(os.open, mnt + '/held', os.O_RDWR))")
    server.say("wait 1")
    entry = mount.find(str(mountpoint))
    assert entry is not None
    assert mount.clear_stale(str(mountpoint)) == 0
    kill(server)
    assert waiter.told() == "ECONNABORTED"
    assert glance.is_dead(entry)
    assert mount.clear_stale(str(mountpoint)) == 1
    assert mount.find(str(mountpoint)) is None
    assert list(mountpoint.iterdir()) == []
    assert mount.clear_stale(str(mountpoint)) == 0


@fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 refuses to mount on a dead mount")
def test_dead_mounts_are_cleared_in_stacks(
    server: Child, children: list[Child], mountpoint: Path
) -> None:
    second = serve(mountpoint)
    children.append(second)
    kill(server)
    assert mount.clear_stale(str(mountpoint)) == 0  # the one on top is alive
    kill(second)
    assert mount.clear_stale(str(mountpoint)) == 2
    assert mount.find(str(mountpoint)) is None


@fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 refuses to mount on a dead mount")
def test_mounting_over_a_dead_mount(server: Child, children: list[Child], mountpoint: Path) -> None:
    kill(server)
    with pytest.raises(UsageError, match="lies inside"):
        mount.mount("x", str(mountpoint / "below"), mount.MountFlags())
    children.append(serve(mountpoint))


# -- refusals -------------------------------------------------------------------------------------


@fuse
def test_mount_points_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist: mkdir -p"):
        mount.mount("x", str(tmp_path / "missing"), mount.MountFlags())
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(UsageError, match="not a directory"):
            mount.mount("x", str(tmp_path / path), mount.MountFlags())


def test_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(MountFailed, match=r"modprobe fuse.*--device /dev/fuse"):
        mount.mount("x", str(tmp_path), mount.MountFlags())


def test_without_fusermount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "DEVICE", "/dev/null")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountFailed, match="install the package fuse3"):
        mount.mount("x", str(tmp_path), mount.MountFlags())


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (
            (
                "fusermount3: option allow_other only allowed if 'user_allow_other' is set in "
                "/etc/fuse.conf"
            ),
            NotPermitted,
            "the line 'user_allow_other'",
        ),
        (
            "fusermount3: failed to open /dev/fuse: Permission denied",
            NotPermitted,
            "may not be opened by this user",
        ),
        (
            "fusermount3: failed to open /dev/fuse: No such device",
            MountFailed,
            "modprobe fuse",
        ),
        (
            "fusermount3: user has no write access to mountpoint /mnt",
            NotPermitted,
            "not yours to mount on",
        ),
        (
            "fusermount3: mountpoint /mnt not owned by user",
            NotPermitted,
            "not yours to mount on",
        ),
        (
            "fusermount3: mount failed: Operation not permitted",
            NotPermitted,
            "set-user-ID root",
        ),
        (
            (
                "fusermount3: too many FUSE filesystems mounted; mount_max=N can be set in "
                "/etc/fuse.conf"
            ),
            MountFailed,
            "raise mount_max",
        ),
        (
            "fusermount3: could not determine username",
            MountFailed,
            "give it a line in /etc/passwd",
        ),
        ("fusermount3: something else", MountFailed, "mounting at /mnt: fusermount3: something"),
        ("", MountFailed, "sent no descriptor"),
    ],
)
def test_what_fusermount_complains_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: type, says: str
) -> None:
    monkeypatch.setattr(mount, "_run", lambda *_arguments, **_more: text)
    monkeypatch.setattr(mount, "_fusermount", lambda: "fusermount3")
    with pytest.raises(kind, match=says) as caught:
        mount._mount_as_user("x", "/mnt", mount.MountFlags())
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("texts", "limit"), [("00", 0), ("50", 5), ("95", 5), ("0x", 0)])
def test_the_kernels_request_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: str, limit: int
) -> None:
    files = [tmp_path / "default", tmp_path / "max"]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text + "\n")
    monkeypatch.setattr(mount, "REQUEST_TIMEOUTS", [*map(str, files), "/nonexistent"])
    assert mount.request_timeout_s() == limit


def test_flags_from_options() -> None:
    class Options:
        ro = True
        fsname = "name"
        owner = "file"

    flags = mount.MountFlags.from_options(Options())
    assert flags == mount.MountFlags(ro=True, fsname="name")


AS_USER = """
import errno, os, subprocess, sys, asyncio
sys.path.insert(0, sys.argv[2])
import tiny
from dlmfs.fuse import mount
# Not earlier: the interpreter's own files may be closed to others.
os.setgroups([]); os.setgid(65534); os.setuid(65534)
async def main():
    server = tiny.Server(sys.argv[1])
    server.device.start()
    program = ["head", "-c", "1", sys.argv[1] + "/now"]
    user = await asyncio.create_subprocess_exec(*program, stdout=subprocess.DEVNULL)
    assert await user.wait() == 0
    entry = mount.find(sys.argv[1])
    print(entry.source, "|", entry.fstype, "|", ",".join(entry.super_options))
    mount.unmount(sys.argv[1])
    await server.ended
    try:
        mount.mount("x", sys.argv[1], mount.MountFlags(allow_other=True))
    except Exception as error:
        print(type(error).__name__, error)
asyncio.run(main())
"""


@fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests do this")
@pytest.mark.skipif(not shutil.which("fusermount3"), reason="needs fusermount3")
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """In a mount namespace of its own, where everybody may use /dev/fuse."""
    place = tmp_path / "user"
    place.mkdir()
    for path in [place, *place.parents]:
        os.chmod(path, 0o755)
        if path.name.startswith("pytest-of-"):
            break
    os.chown(place, 65534, 65534)
    here = str(Path(__file__).parent)
    prepare = 'mknod -m 666 "$1/fuse" c 10 229 && mount --bind "$1/fuse" /dev/fuse || exit 9'
    script = f'{prepare}; shift; exec "$@"'
    alone = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", str(tmp_path)]
    done = subprocess.run(
        [*alone, sys.executable, "-c", AS_USER, str(place), here],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if done.returncode == 9:
        pytest.skip("no mount namespace or device node of one's own here")
    assert done.returncode == 0, done.stderr
    ready, table, *refused = done.stdout.splitlines()
    assert ready == "ready"
    assert table.startswith("tiny, with \\ and comma | fuse.dlmfs | ")
    assert "user_id=65534" in table
    for line in refused:  # none where fuse.conf allows it
        assert line.startswith("NotPermitted allow_other needs the line 'user_allow_other'")


# -- mountinfo ------------------------------------------------------------------------------------

TABLE = rb"""21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
22 21 0:20 / /proc rw - proc proc rw
30 21 0:40 / /mnt/a\040b\011\134c rw,nosuid,nodev - fuse.dlmfs local\040one rw,user_id=0,group_id=0
31 30 0:41 / /mnt/a\040b\011\134c ro master:1 propagate_from:2 - fuse.dlmfs etcd:x rw,user_id=5
32 21 0:42 / /dlm rw - fuse.dlmfs x rw
33 21 0:43 / /old rw - ext4 /dev/sdb rw
34 33 0:44 / /old/dlm rw - fuse.dlmfs y rw
35 33 0:45 / /old rw - tmpfs none rw
garbage
36 21 0:46 /
"""


def test_parse_mountinfo() -> None:
    table = mountinfo.parse(TABLE)
    assert [entry.id for entry in table] == [21, 22, 30, 31, 32, 33, 34, 35]
    assert table[2].mountpoint == "/mnt/a b\t\\c"
    assert (table[2].source, table[2].dev) == ("local one", "0:40")
    assert table[2].options == ("rw", "nosuid", "nodev")
    assert table[3].super_options == ("rw", "user_id=5")
    assert (table[3].fstype, table[3].source, table[3].is_dlmfs) == ("fuse.dlmfs", "etcd:x", True)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        *(("/mnt/a b\t\\c", 31), ("/mnt/a b\t\\c/x/y", 31), ("/mnt", 21), ("/dlm", 32)),
        *(("/dlm/", 32), ("/dlm/x/..", 32), ("/dlm/..", 21), ("/dlmx", 21), ("/", 21)),
        *(("/../dlm", 32), ("/proc", 22), ("/old/dlm", 35), ("//dlm//x/./y", 32)),
    ],
)
def test_the_mount_of_a_path(path: str, found: int) -> None:
    """Mounts stack, and one that is covered by another is not there."""
    entry = mountinfo._Walk(mountinfo.parse(TABLE)).resolve(path)[1]
    assert entry is not None
    assert entry.id == found


def test_in_a_chroot_the_root_need_not_be_a_mount() -> None:
    table = mountinfo.parse(b"32 21 0:42 / /dlm rw - fuse.dlmfs x rw\n")
    walk = mountinfo._Walk(table)
    assert walk.resolve("/dlm/x") == ("/dlm/x", table[0])
    assert walk.resolve("/elsewhere") == ("/elsewhere", None)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert mount.find(str(tmp_path / "one" / "x")) is None


def test_mounts_are_listed() -> None:
    assert any(entry.mountpoint == "/" for entry in mount.mounts())
