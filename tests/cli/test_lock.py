"""`dlmfs lock`: after flock(1), and more than it where the lock may be lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dlmfs.cli import lock as lock_command
from dlmfs.cli.lock import arrange, parse
from dlmfs.client.place import Place
from dlmfs.errors import UsageError
from tests.cli.jobs import Start, ended, locked, until
from tests.cli.jobs import start as _start
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, Nodes
from tests.waiting.agents import stood_in_line_for

nodes = _nodes
start = _start
fuse = pytest.mark.fuse


# -- the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "paths", "command"),
    [
        ("/d/x -- run -a", ["/d/x"], ["run", "-a"]),
        ("/d/x /d/y -- run -- b", ["/d/x", "/d/y"], ["run", "--", "b"]),
        ("/d/x run -n", ["/d/x"], ["run", "-n"]),
        ("/d/x bash -c two", ["/d/x"], ["bash", "-c", "two"]),
        ("/d/x -c two", ["/d/x"], ["SH", "-c", "two"]),
        ("-c /d/x two", ["/d/x"], ["SH", "-c", "two"]),
        ("-c /d/x /d/y -- two", ["/d/x", "/d/y"], ["SH", "-c", "two"]),
        ("-- /d/x run", ["/d/x"], ["run"]),
    ],
)
def test_forms(
    words: str, paths: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", "SH")
    order = parse(words.split())
    assert (order.paths, order.command) == (paths, command)


def test_options() -> None:
    order = parse("-s -w 1.5 -E 9 -o --verbose p run".split())
    assert (order.shared, order.wait_s, order.conflict_exit) == (True, 1.5, 9)
    assert (order.close, order.verbose, order.trying) == (True, True, False)
    assert parse("-w0 p run".split()).trying
    assert parse("-n -w 5 p run".split()).trying
    assert not parse("-s --exclusive p run".split()).shared
    assert parse("--timeout=2 p run".split()).wait_s == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "no PATH"),
        ("p", "no command"),
        ("p --", "no command"),
        ("-w soon p run", "seconds, not 'soon'"),
        ("-w -1 p run", "seconds, not '-1'"),
        ("-w nan p run", "seconds"),
        ("-w 1e9 p run", "seconds"),
        ("-E 256 p run", "0 to 255"),
        ("-E x p run", "0 to 255"),
        ("-F p run", "-F"),
        ("-c p two words", "one word"),
        ("-w", "-w"),
    ],
)
def test_mistakes(words: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(words.split())
    assert lock_command.run(words.split()) == 64


def test_several_locks_have_one_order_whatever_the_mounts_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounts = {"a": ("/mnt/a", "etcd://h1,h2/prod"), "z": ("/zzz", "etcd://h2,h1/prod")}

    def fake(path: str, near: bool) -> Place:
        assert near
        mount, domain, name = path.split("/")
        return Place(mounts[mount][0], "0:1", mounts[mount][1], domain, name)

    monkeypatch.setattr(lock_command, "place", fake)
    here = [(p.domain, p.name) for p in arrange(["a/d/y", "a/d/x", "a/b/z", "a/d/y"])]
    there = [(p.domain, p.name) for p in arrange(["z/b/z", "z/d/y", "z/d/x"])]
    assert here == there == [("b", "z"), ("d", "x"), ("d", "y")]
    with pytest.raises(UsageError, match="one lock by two mounts"):
        arrange(["a/d/x", "z/d/x"])
    with pytest.raises(UsageError, match="newline"):
        arrange(["a/d/x\n", "a/d/y"])
    assert len(arrange(["a/d/x\n"])) == 1


@fuse
def test_what_takes_long_to_import_is_not(nodes: Nodes) -> None:
    """It is to start within 60 ms; a measured time would say something else on each machine."""
    a = nodes.mount("a")
    done = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", *DLMFS[1:], "lock", str(a / "dom/x"), "true"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert {"dlmfs.cli.front", "dlmfs.cli.supervise"} <= imported, "of both processes"
    slow = {"argparse", "asyncio", "dataclasses", "difflib", "inspect", "json", "logging", "socket"}
    slow |= {"subprocess", "traceback", "dlmfs.model", "dlmfs.client.keeper"}
    assert not slow & imported


# -- the command and its surroundings ------------------------------------------------------------------


@fuse
def test_exit_codes(nodes: Nodes) -> None:
    x = nodes.mount("a") / "dom/x"
    assert locked(x, "sh", "-c", "exit 7").returncode == 7
    assert locked(x, "--", "sh", "-c", "kill -KILL $$").returncode == 137
    assert locked(x, "-c", "exit 9").returncode == 9
    missing = locked(x, "no-such-program")
    assert (missing.returncode, missing.stderr.count("\n")) == (127, 1)
    refused = locked(x, "/etc/passwd")
    assert (refused.returncode, refused.stderr.count("\n")) == (126, 1)
    assert "no-such-program" in missing.stderr
    script = nodes.folder / "script"
    script.write_text("exit 5\n")
    script.chmod(0o755)
    assert locked(x, script).returncode == 5
    outside = locked(nodes.folder / "x", "true")
    assert (outside.returncode, outside.stderr.count("\n")) == (64, 1)
    assert not (nodes.folder / "x").exists()
    long = locked(x.parent / ("n" * 256), "true")
    assert long.returncode == 64
    assert "the name of a lock has up to 255 bytes, this one has 256" in long.stderr
    assert len(long.stderr) < 250
    assert locked("--help").returncode == 0


@fuse
def test_it_is_called_after_its_command(nodes: Nodes) -> None:
    """Where it is told of by name: else all that wait and hold would be one `dlmfs`."""
    a = nodes.mount("a")
    done = locked(a / "dom/x", "--", *DLMFS, "status", str(a))
    name = f"lock:{os.path.basename(DLMFS[0])}"[:15]
    assert re.search(rf"held by +EX +pid \d+ {re.escape(name)} ", done.stdout), done.stdout


@fuse
def test_in_vain_it_says_where_and_what_tells_more(nodes: Nodes) -> None:
    a = nodes.mount("a", "holder=file")
    name = os.fsdecode(b"\xff\n\x1b[31m")
    shown = r"\xff\n\x1b[31m"
    path = a / "dom" / name
    inner = [*DLMFS, "lock", "--verbose", "-n", str(path), "true"]
    done = locked(path, *inner)
    assert done.returncode == 1
    assert done.stderr == (
        f"dlmfs: {a}/dom/{shown} is in use (`dlmfs why {a}/dom/{shown}` says who is in the way)\n"
    )
    both = [str(a / "dom/x"), str(a / "dom/y")]
    several = locked(path.parent / "x", "--", *inner[:-2], *both, "--", "true")
    assert "`dlmfs why` says who" in several.stderr
    assert locked(path, *(w for w in inner if w != "--verbose")).stderr == ""


@fuse
def test_the_environment_and_the_standard_streams(nodes: Nodes) -> None:
    a = nodes.mount("a")
    odd = a / "dom/a  b\n"
    done = locked(odd, "-c", 'printf %s "$DLMFS_LOCK/$DLMFS_MODE/$DLMFS_TOKEN"')
    path, mode, token = done.stdout.rsplit("/", 2)
    assert (path, mode) == (str(odd), "EX")
    assert int(locked("-s", odd, "printenv", "DLMFS_TOKEN").stdout) > 0
    assert locked("-s", odd, "printenv", "DLMFS_MODE").stdout == "PR\n"
    assert int(token) > 0
    paths = [a / "dom/y", a / "dom/x", a / "other/x", a / "dom/x"]
    done = locked(*paths, "--", "sh", "-c", 'echo "$DLMFS_LOCK"; echo "$DLMFS_TOKEN"')
    told = done.stdout.split()
    assert told[:3] == [str(a / p) for p in ("dom/x", "dom/y", "other/x")]
    assert all(int(token) for token in told[3:])
    assert len(told) == 6
    done = subprocess.run(
        [*DLMFS, "lock", str(odd), "cat"], input="through", capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "through"


@fuse
def test_a_relative_path_is_below_the_current_folder_or_the_only_mount(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()

    def where(path: str, cwd: Path, mount: str = "") -> str:
        done = subprocess.run(
            [*DLMFS, "lock", path, "printenv", "DLMFS_LOCK"],
            cwd=cwd, env={**os.environ, "DLMFS_MOUNT": mount}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        return done.stdout.rstrip("\n")

    assert where("x", a / "dom") == str(a / "dom/x")
    assert where("../new/x", a / "dom") == str(a / "new/x")
    assert where("dom/x", nodes.folder, str(a)) == str(a / "dom/x")
    assert where("a/dom/x", nodes.folder) == str(a / "dom/x")


def signals_of(report: str) -> dict[str, int]:
    """What /proc/PID/status says about signals; without 32 and 33, which are the C library's."""
    told = dict(line.split(":") for line in report.splitlines())
    keys = ("SigBlk", "SigIgn", "SigCgt")
    return {key: int(told[key], 16) & ~0x180000000 for key in keys}


@fuse
def test_the_command_gets_the_signals_as_they_were(nodes: Nodes) -> None:
    x = nodes.mount("a") / "dom/x"
    command = ["grep", "^Sig", "/proc/self/status"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert signals_of(locked(x, *command).stdout) == signals_of(plain)


@fuse
def test_without_standard_streams_the_lock_is_not_taken_for_one(nodes: Nodes) -> None:
    x = nodes.mount("a") / "dom/x"
    words = " ".join([*DLMFS, "lock", str(x), "ls", "-l", "/proc/self/fd"])
    done = subprocess.run(
        ["sh", "-c", f"exec {words} <&-"], capture_output=True, text=True, timeout=60, check=True
    )
    ours = [line.split()[-3] for line in done.stdout.splitlines() if line.endswith(f"-> {x}")]
    assert len(ours) == 1
    assert int(ours[0]) > 2


@fuse
def test_the_command_inherits_the_lock_unless_closed(nodes: Nodes, start: Start) -> None:
    """What it leaves in the background goes on protected, as under flock(1)."""
    x = nodes.mount("a", "holder=file") / "dom/x"
    for options, code in (([], 1), (["-o"], 0)):
        job = start(*options, x, "--", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!")
        sleeper = int(job.line())
        assert job.over()[0] == 0
        try:
            assert locked("-n", x, "true").returncode == code
        finally:
            os.kill(sleeper, signal.SIGKILL)
        assert ended(sleeper)


# -- excluding ----------------------------------------------------------------------------------------


@fuse
@pytest.mark.parametrize("rule", ["node", "file"])
def test_it_excludes_its_like_on_the_same_node_and_on_others(
    nodes: Nodes, start: Start, rule: str
) -> None:
    a, b = nodes.pair(f"holder={rule}")
    holder = start(a / "dom/x", "-c", "echo has; read _")
    assert holder.line() == "has"
    for where in (a, b):
        assert locked("-n", where / "dom/x", "true").returncode == 1
        assert locked("-n", "-E", 33, where / "dom/x", "true").returncode == 33
        assert locked("-w", "0.2", "-E", 34, where / "dom/x", "true").returncode == 34
        assert locked("-s", "-n", where / "dom/x", "true").returncode == 1
        assert locked("-n", where / "dom/other", "true").returncode == 0
    told = locked("-n", "--verbose", a / "dom/x", "true")
    assert "in use" in told.stderr
    waiting = [start(where / "dom/x", "echo", "has") for where in (a, b)]
    holder.let_go()
    for waiter in waiting:
        assert waiter.line() == "has"
        assert waiter.over()[0] == 0


@fuse
@pytest.mark.parametrize("rule", ["node", "file"])
def test_shared_is_with_shared_only(nodes: Nodes, start: Start, rule: str) -> None:
    a, b = nodes.pair(f"holder={rule}")
    holder = start("-s", a / "dom/x", "-c", "echo has; read _")
    assert holder.line() == "has"
    for where in (a, b):
        assert locked("-s", "-n", where / "dom/x", "true").returncode == 0
        assert locked("-n", where / "dom/x", "true").returncode == 1


CRITICAL = 'cd "$1" && for n in 1 2 3 4 5; do "$2" "$3" lock "$4" "$5" -- "$6" "$1"; done'
INSIDE = '#!/bin/sh\nset -e\nmkdir "$1/inside"\nexec rmdir "$1/inside"\n'


@fuse
def test_opposite_orders_of_several_locks_neither_deadlock_nor_overlap(nodes: Nodes) -> None:
    """On one node and on two, under holder=node."""
    a, b = nodes.pair()
    inside = nodes.folder / "inside.sh"
    inside.write_text(INSIDE)
    inside.chmod(0o755)
    ways = [(a, "x", "y"), (a, "y", "x"), (b, "y", "x"), (b, "x", "y")]
    runs = [
        subprocess.Popen(
            [
                *("sh", "-ec", CRITICAL, "sh", str(nodes.folder), *DLMFS),
                *(str(where / "dom" / first), str(where / "dom" / second), str(inside)),
            ]
        )
        for where, first, second in ways
    ]
    nodes.children += runs
    assert [run.wait(100) for run in runs] == [0, 0, 0, 0]


@fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("to", ["front", "behind", "group"])
def test_a_waiting_one_ends_by_a_signal(
    nodes: Nodes, start: Start, number: signal.Signals, to: str
) -> None:
    """As flock(1) does, whichever of its two processes it is sent to."""
    x = nodes.mount("a") / "dom/x"
    holder = start(x, "-c", "echo has; read _")
    assert holder.line() == "has"
    waiter = start(x, "true")
    behind = waiter.behind()
    until(lambda: in_a_wait(behind))
    if to == "group":
        os.killpg(waiter.process.pid, number)
    else:
        os.kill(behind if to == "behind" else waiter.process.pid, number)
    assert waiter.over()[0] == -number
    assert ended(behind)


@fuse
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_it_ends_as_the_process_that_has_the_lock(
    nodes: Nodes, start: Start, number: signal.Signals
) -> None:
    """And so does the command, its detached processes too: nobody looks after the lock any more, and
    with -o another has it at once."""
    x = nodes.mount("a") / "dom/x"
    job = start("-o", x, "--", "sh", "-c", DETACHED)
    handles = [os.pidfd_open(int(job.line())) for _ in range(2)]
    try:
        os.kill(job.process.pid, signal.SIGIO)  # nobody's word
        os.kill(job.behind(), number)
        assert job.over()[0] == -number
        for handle in handles:
            assert select.select([handle], [], [], 0)[0], "a process of the command lives on"
        assert locked("-n", x, "true").returncode == 0
    finally:
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


DETACHED = "(setsid sh -c 'echo $$; exec sleep 1000' &); echo $$; exec sleep 1000"


@fuse
def test_a_wait_for_a_neighbour_ends_with_the_mount(nodes: Nodes, start: Start) -> None:
    """Under holder=node it stands in flock(2), and whoever has the file locked may not notice."""
    a = nodes.mount("a")
    (a / "dom").mkdir()
    with open(a / "dom/x", "w") as careless:
        fcntl.flock(careless, fcntl.LOCK_EX)
        job = start(a / "dom/x", "true")
        until(lambda: stood_in_line_for(careless.fileno()))
        nodes.kill(a)
        code, errors = job.over()
        assert code == 69, errors
        assert "daemon is gone" in errors


@fuse
def test_what_is_to_be_ignored_ends_no_wait(nodes: Nodes, start: Start) -> None:
    """nohup(1), and what a shell starts in the background."""
    x = nodes.mount("a") / "dom/x"
    holder = start(x, "-c", "echo has; read _")
    assert holder.line() == "has"
    ignoring = [signal.SIGHUP, signal.SIGINT]
    before = [signal.signal(number, signal.SIG_IGN) for number in ignoring]
    try:
        waiter = start("-s", x, "echo", "done")
    finally:
        for number, how in zip(ignoring, before, strict=True):
            signal.signal(number, how)
    until(lambda: in_a_wait(waiter.behind()))
    for number in ignoring:
        os.killpg(waiter.process.pid, number)
    holder.let_go()
    assert waiter.line() == "done"
    assert waiter.over()[0] == 0


@fuse
def test_the_wait_ends_with_the_process_that_was_started(nodes: Nodes, start: Start) -> None:
    x = nodes.mount("a") / "dom/x"
    holder = start(x, "-c", "echo has; read _")
    assert holder.line() == "has"
    waiter = start(x, "true")
    behind = waiter.behind()
    until(lambda: in_a_wait(behind))
    waiter.process.kill()
    assert ended(behind)


def in_a_wait(pid: int) -> bool:
    """Asleep in flock(2), or in open(2), by the kernel's word."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text() in (
            "locks_lock_inode_wait",
            "request_wait_answer",
        )
    return False
