"""The commands as a user meets them: on real mounts, with real mistakes."""

from __future__ import annotations

import json
import os
import select
import signal
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.config import KNOWN, EtcdSource, LocalSource, MountOptions, parse_options, parse_source
from dlmfs.errors import UsageError
from dlmfs.fuse.mountinfo import mounts
from dlmfs.model import HolderRule
from tests.fs.conftest import nodes as _nodes
from tests.fs.helper import helper as _helper
from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT, Nodes, dlmfs

nodes = _nodes
helper = _helper
fuse = pytest.mark.fuse


def refused(*args: str, code: int, says: str) -> None:
    """One line, the right exit code, never a traceback."""
    done = dlmfs(*args, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("dlmfs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


def entries(where: Path) -> list[str]:
    return [e.source for e in mounts() if e.mountpoint == str(where)]


# -- options and sources -----------------------------------------------------------------------------


def test_what_mount_and_fstab_pass_is_accepted() -> None:
    words = "rw,dev,suid,nodev,nosuid,noexec,noatime,_netdev,nofail,x-systemd.automount,owner,user"
    options = parse_options([words, "holder=file,node=web1,ttl=20", r"fsname=a\,b"])
    assert options.holder is HolderRule.FILE
    assert (options.node, options.ttl_s, options.fsname) == ("web1", 20.0, "a,b")
    assert options.noexec
    assert parse_options([]) == MountOptions()
    assert parse_options(["holder=file,holder=node"]).holder is HolderRule.NODE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hodler=file", "did you mean 'holder'"),
        ("foo", "unknown mount option 'foo'"),
        ("ttl=1", "from 5 to 3600"),
        ("ttl=soon", "from 5 to 3600"),
        ("owner=file", "is called holder=file"),
        ("holder=me", "holder=node or holder=file"),
        ("node=../x", "node name"),
        ("ro=1", "takes no value"),
        ("node", "takes a value"),
        ("subtype=ntfs", "this is dlmfs"),
    ],
)
def test_a_wrong_option_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_options([text])


@given(st.text() | st.lists(st.sampled_from(KNOWN)).map(",".join))
def test_any_option_text_parses_or_is_refused_in_words(text: str) -> None:
    try:
        parse_options([text])
    except UsageError:
        return


def test_sources() -> None:
    assert parse_source("local") == LocalSource(None, "default")
    assert parse_source("local:jobs") == LocalSource(None, "jobs")
    assert parse_source("local:/x/y.db") == LocalSource(Path("/x/y.db"), "")
    assert parse_source("etcd://h/c") == EtcdSource(("h:2379",), "c")
    several = parse_source("etcd://h1:1,h2,[::1]:2380/prod.1")
    assert several == EtcdSource(("h1:1", "h2:2379", "[::1]:2380"), "prod.1")
    local = ("", "local:", "local:a/b", "nfs://x")
    etcd = ("u:p@h/c", "h:2379", "h:2379/", "/c", "h:0/c", "h:70000/c", "h,/c", "h:2379/a/b")
    for wrong in (*local, *(f"etcd://{rest}" for rest in etcd)):
        with pytest.raises(UsageError):
            parse_source(wrong)


# -- where the output goes -----------------------------------------------------------------------------


BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("verb", ["--help", "--version", "help", "lock --help"])
def test_a_reader_that_is_gone_ends_it_in_silence(verb: str) -> None:
    """What is still buffered at the end is written where the error can be caught."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        for environment in (BUFFERED, {**BUFFERED, "PYTHONUNBUFFERED": "1"}):
            done = subprocess.run(
                [*DLMFS, *verb.split()], stdout=writing, stderr=subprocess.PIPE, env=environment,
                timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (141, b"")
    finally:
        os.close(writing)


@pytest.mark.parametrize("verb", ["--version", "lock --help", "simulate --seed 1"])
def test_an_output_that_is_full_is_named(verb: str) -> None:
    with open("/dev/full", "w") as full:
        for environment in (BUFFERED, {**BUFFERED, "PYTHONUNBUFFERED": "1"}):
            done = subprocess.run(
                [*DLMFS, *verb.split()], stdout=full, stderr=subprocess.PIPE, env=environment,
                timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 74
            assert done.stderr == b"dlmfs: the output cannot be written: No space left on device\n"


@fuse
def test_without_standard_streams(nodes: Nodes) -> None:
    """As some supervisors start programs; the new mount's daemon has none either."""
    where = nodes.folder / "m"
    where.mkdir()
    mount = ["mount", f"local:{nodes.folder}/state.db", str(where)]
    lock = str(where / "dom/x")
    for words in (
        mount, ["value", "set", lock], ["value", "get", lock], ["status", str(where)],
        ["why", lock], ["top", str(where)], ["umount", str(where)],
    ):  # fmt: skip
        if words[0] == "value":
            (where / "dom").mkdir(exist_ok=True)
        script = '"$@" <&- >&- 2>&-'
        done = subprocess.run(["sh", "-c", script, "sh", *DLMFS, *words], timeout=60, check=False)
        assert done.returncode == 0, words


@fuse
def test_names_that_the_output_cannot_show(nodes: Nodes) -> None:
    """Neither an encoding without the letters, nor bytes that are none, nor the terminal's own."""
    where = nodes.mount("a")
    for name in ("d\xf6main", b"\xff", "\x1b[31m"):
        (where / os.fsdecode(name)).mkdir()
    for words in (["nodes", str(where)], ["status", str(where)], ["doctor", str(where)]):
        done = subprocess.run(
            [*DLMFS, *words], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        for shown in (r"d\xf6main", r"\xff", r"\x1b[31m"):
            assert shown in done.stdout, words


# -- mistakes ------------------------------------------------------------------------------------------


def test_mistakes_get_one_line_and_their_exit_code(tmp_path: Path) -> None:
    where = str(tmp_path / "m")
    refused("mount", "lokal", where, code=1, says="SOURCE 'lokal'")
    refused("mount", "local", where, "-o", "fast", code=1, says="unknown mount option 'fast'")
    refused("mount", "local", where, code=1, says="mkdir it first")
    refused("mount", "local", code=1, says="MOUNTPOINT")
    refused("umount", str(tmp_path), code=1, says="not a dlmfs mount")
    refused("status", str(tmp_path), code=2, says="not a dlmfs mount")
    refused("info", str(tmp_path / "x"), code=2, says="not on a dlmfs mount")
    refused("mont", code=2, says="did you mean 'mount'")
    refused("info", str(tmp_path / "a\n\x1b[31m"), code=2, says="/a\\n\\x1b[31m is not on")
    (tmp_path / "file").touch()
    refused("mount", "local", str(tmp_path / "file"), code=1, says="not a folder")


def test_state_files_that_are_not_ours_are_refused_and_not_touched(tmp_path: Path) -> None:
    where = tmp_path / "m"
    where.mkdir()
    text, other, newer = tmp_path / "text.db", tmp_path / "other.db", tmp_path / "newer.db"
    text.write_text("shopping list\n" * 100)
    conn = sqlite3.connect(other)
    conn.execute("CREATE TABLE t (x)")
    conn.close()
    conn = sqlite3.connect(newer)
    conn.execute("CREATE TABLE t (x)")
    conn.execute(f"PRAGMA application_id={0x646C6D66}")
    conn.execute("PRAGMA user_version=99")
    conn.close()
    for path, says in ((text, "not a sound"), (other, "another program"), (newer, "format 99")):
        before = path.read_bytes()
        refused("mount", f"local:{path}", str(where), code=32, says=says)
        assert path.read_bytes() == before
    refused("mount", f"local:{tmp_path}/no/x.db", str(where), code=1, says="does not exist")
    refused("mount", f"local:{tmp_path}", str(where), code=1, says="is a folder")
    refused("mount", f"local:{where}/x.db", str(where), code=1, says="below the mount point")


@fuse
@pytest.mark.root
def test_full_and_read_only_state_folders(tmp_path: Path) -> None:
    small, where = tmp_path / "small", tmp_path / "m"
    small.mkdir()
    where.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=700,size=16k", "none", str(small)], check=True
    )
    try:
        refused("mount", f"local:{small}/x.db", str(where), code=32, says="no space left")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        refused("mount", f"local:{small}/x.db", str(where), code=32, says="read-only")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@fuse
@pytest.mark.root
def test_no_fuse_device_says_what_to_do(tmp_path: Path) -> None:
    hidden = (
        f"mount --bind {tmp_path} /dev && exec {' '.join(DLMFS)} mount local:{tmp_path}/x.db /mnt"
    )
    (tmp_path / "null").touch()
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hidden], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 32
    assert "/dev/fuse" in done.stderr
    assert "--device /dev/fuse" in done.stderr


# -- mounting and ending ---------------------------------------------------------------------------------


@fuse
def test_mount_shows_as_fuse_dlmfs_and_refuses_a_second(nodes: Nodes) -> None:
    where = nodes.mount("a")
    assert entries(where) == [f"local:{nodes.state}"]
    entry = next(e for e in mounts() if e.mountpoint == str(where))
    assert entry.fstype == "fuse.dlmfs"
    assert {"nodev", "nosuid"} <= set(entry.options)
    refused("mount", f"local:{nodes.state}", str(where), code=32, says="already mounted")
    other = nodes.folder / "other"
    other.mkdir()
    refused(
        "mount", f"local:{nodes.state}", str(other), "-o", "node=a", code=32, says="node named a"
    )


def ended(pid: int) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE_S)[0])
    finally:
        os.close(handle)


@fuse
@pytest.mark.parametrize("how", ["dlmfs", "umount", "SIGTERM"])
def test_every_clean_end(nodes: Nodes, how: str) -> None:
    where = nodes.mount("a")
    (where / "dom").mkdir()
    (where / "dom/x").touch()
    pid = nodes.pid(where)
    if how == "dlmfs":
        dlmfs("umount", str(where))
    elif how == "umount":
        tool = ["umount"] if os.getuid() == 0 else ["fusermount3", "-u"]
        subprocess.run([*tool, str(where)], check=True)
    else:
        os.kill(pid, signal.SIGTERM)
    assert ended(pid)
    assert entries(where) == []
    conn = sqlite3.connect(nodes.state)
    try:
        assert conn.execute("SELECT key FROM kv").fetchall() == []
    finally:
        conn.close()


@fuse
def test_sigterm_while_the_lock_is_held_and_awaited(nodes: Nodes) -> None:
    """Its holder is told, and has the grace to close it. One that does not is left as by a death."""
    a, b = nodes.pair("grace=0.5", "lock-delay=0")
    assert nodes.hold(a / "dom/x").wait() == "held"
    assert nodes.hold(a / "dom/y").wait() == "held"
    waiter = nodes.hold(b / "dom/x")
    assert waiter.waits
    pid = nodes.pid(a)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid)
    assert entries(a) == []
    assert waiter.wait() == "held"
    info = json.loads(dlmfs("info", "--json", str(b / "dom/x")).stdout)
    assert info["abandoned"]["node"] == "a"


@fuse
def test_a_mount_at_the_place_of_one_that_ends_takes_over_its_name(nodes: Nodes) -> None:
    """As a service that is restarted by hand: neither "mounted already" nor "alive"."""
    a = nodes.mount("a", "grace=1.5")
    (a / "dom").mkdir()
    assert nodes.hold(a / "dom/x").wait() == "held"
    pid = nodes.pid(a)
    os.kill(pid, signal.SIGTERM)
    nodes.mount("a", "lock-delay=0")
    assert nodes.pid(a) != pid
    assert nodes.status(a)["node"] == "a"
    assert len(entries(a)) == 1


@fuse
@pytest.mark.root
def test_a_mount_where_one_was_torn_away_waits_for_the_name_of_its_daemon(nodes: Nodes) -> None:
    """umount -f leaves the mount dead and its daemon alive, for as long as its holders have."""
    a = nodes.mount("a", "grace=1.5")
    (a / "dom").mkdir()
    assert nodes.hold(a / "dom/x").wait() == "held"
    pid = nodes.pid(a)
    subprocess.run(["umount", "-f", str(a)], check=False, capture_output=True)
    nodes.mount("a", "lock-delay=0")
    assert nodes.pid(a) != pid
    assert nodes.status(a)["node"] == "a"


@fuse
def test_busy_umount_is_refused_and_says_so(nodes: Nodes) -> None:
    where = nodes.mount("a")
    (where / "dom").mkdir()
    assert nodes.hold(where / "dom/x").wait() == "held"
    refused("umount", str(where), code=32, says="is in use")
    assert len(entries(where)) == 1


@fuse
def test_a_dead_mount_is_recognised_and_never_stacked_on(nodes: Nodes) -> None:
    where = nodes.mount("a")
    pid = nodes.pid(where)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    done = dlmfs("status", "--json", str(where), check=False)
    assert done.returncode == 69
    assert "gone" in json.loads(done.stdout)[0]["error"]
    nodes.mount("a")
    assert len(entries(where)) == 1
    os.kill(nodes.pid(where), signal.SIGKILL)
    dlmfs("umount", str(where))
    assert entries(where) == []


@fuse
def test_a_stopped_daemon_is_named(nodes: Nodes) -> None:
    a, b = nodes.pair()
    pid = nodes.pid(a)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert f"the node a is stopped (pid {pid})" in dlmfs("status", str(b)).stdout
        done = dlmfs("status", str(a), check=False)
        assert done.returncode == 69
        assert f"pid {pid}, stopped" in done.stdout
    finally:
        os.kill(pid, signal.SIGCONT)


@fuse
def test_default_node_names(nodes: Nodes) -> None:
    host = os.uname().nodename.split(".")[0]
    names = []
    for folder in ("p", "q"):
        where = nodes.folder / folder
        where.mkdir()
        nodes.mounts.append(where)
        dlmfs("mount", f"local:{nodes.state}", str(where))
        names.append(nodes.status(where)["node"])
    assert names == [host, f"{host}-2"]


@fuse
def test_a_lock_is_named_alike_in_every_command(nodes: Nodes) -> None:
    """DOMAIN/LOCK below the mount that the environment names, or a path from the current folder."""
    where = nodes.mount("a")
    (where / "dom").mkdir()

    def told(*words: str, cwd: Path = nodes.folder, mount: str = str(where)) -> str:
        done = subprocess.run(
            [*DLMFS, *words], cwd=cwd, env={**os.environ, "DLMFS_MOUNT": mount}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
        )  # fmt: skip
        return f"{done.returncode} {done.stdout}".strip()

    assert told("value", "set", "dom/x", "here") == "0"
    for path, cwd in (("dom/x", nodes.folder), ("x", where / "dom"), ("a/dom/x", nodes.folder)):
        assert told("value", "get", path, cwd=cwd) == "0 here"
        assert "0 dom/x\n" in told("why", path, cwd=cwd)
        assert "dom/x" in told("info", path, cwd=cwd)
        assert told("lock", path, "printenv", "DLMFS_LOCK", cwd=cwd) == f"0 {where}/dom/x"
    assert told("nodes").startswith("0 a ")
    assert told("domain", "rm", "none").startswith("2 dlmfs: there is nothing of a domain")
    nowhere = str(nodes.folder)
    for words in (["why", "dom/x"], ["value", "get", "dom/x"], ["nodes"]):
        assert f"{nowhere} is not on a dlmfs mount" in told(*words, mount=nowhere)


@fuse
def test_status_and_info_for_people(nodes: Nodes) -> None:
    a, b = nodes.pair("holder=file")
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    assert nodes.hold(b / "dom/x").waits
    text = dlmfs("status", str(a)).stdout
    assert f"held by    EX  pid {holder.process.pid} python" in text
    assert "wanted by  EX  node b" in text
    text = dlmfs("info", str(b / "dom/x")).stdout
    assert "member     a  EX" in text
    assert "waiting    node b  EX" in text
    refused("info", str(a / "dom"), code=2, says="not a lock")
    refused("info", str(a / "nodom/x"), code=2, says="mkdir it first")


# -- as mount(8) calls us ------------------------------------------------------------------------------


@fuse
@pytest.mark.root
def test_mount_8(nodes: Nodes, helper: Path) -> None:
    assert stat.S_ISLNK(helper.lstat().st_mode)
    where = nodes.folder / "m8"
    where.mkdir()
    nodes.mounts.append(where)
    source = f"local:{nodes.state}"
    subprocess.run(
        ["mount", "-t", "fuse.dlmfs", "-o", "holder=file", source, str(where)], check=True
    )
    assert entries(where) == [source]
    assert nodes.status(where)["holder_rule"] == "file"


@fuse
def test_the_forms_without_a_verb_and_without_an_environment(nodes: Nodes) -> None:
    where = nodes.folder / "bare"
    where.mkdir()
    nodes.mounts.append(where)
    done = subprocess.run(
        [
            str(ROOT / "scripts/dlmfs"),
            f"local:{nodes.state}",
            str(where),
            "-o",
            "rw,dev,suid,holder=node",
        ],
        env={},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(entries(where)) == 1


@fuse
def test_the_helper_checks_but_mounts_nothing_with_fake(nodes: Nodes) -> None:
    link = nodes.folder / "mount.dlmfs"
    link.symlink_to(ROOT / "scripts" / "dlmfs")
    where = nodes.folder / "fake"
    where.mkdir()
    subprocess.run([str(link), "local", str(where), "-f", "-n", "-s"], check=True, timeout=60)
    assert entries(where) == []


@pytest.mark.fuse
def test_status_says_that_a_holders_process_is_gone(nodes: Nodes) -> None:
    """Whoever inherited its descriptor keeps the lock."""
    lock = nodes.mount("a") / "dom/x"
    lock.parent.mkdir()
    shell = 'exec 9<>"$0"; sleep 600 <&- >&- 2>&- & echo $!; exit'
    done = subprocess.run(["sh", "-c", shell, lock], stdout=subprocess.PIPE, text=True, check=True)
    try:
        said = dlmfs("status", str(lock.parent.parent)).stdout
        assert "which is gone: one that inherited its descriptor keeps it" in said
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)
