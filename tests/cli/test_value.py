"""`dlmfs value` on real mounts: what it prints, when it waits, what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.programs import Opener, queued, run, until
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes
from tests.robust.helpers import stopped
from tests.waiting.agents import stood_in_line_for

nodes = _nodes
pytestmark = pytest.mark.fuse


def value(*args: str | bytes | Path, stdin: bytes = b"", code: int = 0) -> bytes:
    done = subprocess.run(
        [os.fsencode(arg) for arg in (*DLMFS, "value", *args)],
        input=stdin, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    if code:
        assert done.stdout == b""
        assert done.stderr.startswith(b"dlmfs: ")
        assert done.stderr.count(b"\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def test_what_is_set_at_one_node_is_got_at_another(nodes: Nodes) -> None:
    a, b = nodes.pair()
    assert value("get", a / "dom/x") == b"\n", "a new value is empty"
    value("set", a / "dom/x", "primary=web1")
    assert value("get", b / "dom/x") == b"primary=web1\n"
    value("set", b / "dom/x", "short")
    assert value("get", a / "dom/x") == b"short\n", "the rest of a longer value stays"
    assert value("get", "--hex", a / "dom/x") == b"short".ljust(64, b"\0").hex().encode() + b"\n"
    value("set", "--hex", a / "dom/x", "00ff 0a")
    assert value("get", "--hex", b / "dom/x").startswith(b"00ff0a00")
    told = json.loads(value("get", "--json", b / "dom/x"))
    assert told["hex"].startswith("00ff0a")
    assert (told["text"], told["stale"], told["abandoned"]) == (None, False, None)
    assert told["token"] > 0


def test_standard_input(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    path = a / "dom/x"
    for given, got in (
        (b"text", b"text"),
        (b"line\n", b"line"),
        (b"two\n\n", b"two\n"),
        (b"", b""),
    ):
        value("set", path, stdin=given)
        assert value("get", path) == got + b"\n"
    value("set", path, stdin=b"x" * 64 + b"\n")
    assert value("get", path) == b"x" * 64 + b"\n"
    for bad in (b"y" * 65, b"y" * 10_000, b"y" * 64 + b"\n\n"):
        assert b"too long" in value("set", path, stdin=bad, code=2)
    assert b"too long" in value("set", path, "z" * 65, code=2)
    assert b"not hexadecimal" in value("set", "--hex", path, "xy", code=2)
    assert value("get", path) == b"x" * 64 + b"\n", "a refused value was written"


def test_those_who_set_it_on_one_node_exclude_each_other(nodes: Nodes) -> None:
    """Under holder=node the node holds the lock, for both: each would find what it expects."""
    path = nodes.mount("a", "holder=node") / "dom/x"
    path.parent.mkdir()
    value("set", path, "0")
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX)  # as one that has looked and not yet written
        assert b"busy" in value("set", "-n", path, "2", "--expect", "0", code=1)
        assert b"not free within" in value("set", "-w", "0.1", path, "2", "--expect", "0", code=1)
        waiter = subprocess.Popen(
            [*DLMFS, "value", "set", path, "2", "--expect", "0"], stderr=subprocess.DEVNULL
        )
        until(lambda: stood_in_line_for(fd), "it waits")
        os.pwrite(fd, b"1", 0)
    finally:
        os.close(fd)
    assert waiter.wait(PATIENCE_S) == 1
    assert value("get", path) == b"1\n"


def test_expect_compares_before_it_writes(nodes: Nodes) -> None:
    a, b = nodes.pair()
    value("set", a / "dom/x", "1", "--expect", "")
    value("set", b / "dom/x", "2", "--expect", "1")
    assert b"has the value '2'" in value("set", a / "dom/x", "3", "--expect", "1", code=1)
    assert value("set", a / "dom/x", "3", "--expect", "1", "-E", "9", code=9)
    assert value("get", a / "dom/x") == b"2\n"


def test_token_refuses_a_lock_that_was_granted_anew(nodes: Nodes) -> None:
    """As in the environment of a program that has the lock, under holder=node."""
    a, b = nodes.pair()
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    value("set", a / "dom/x", "mine", "--token", str(holder.token))
    holder.release()
    value("set", b / "dom/x", "theirs")
    assert b"granted anew" in value(
        "set", a / "dom/x", "late", "--token", str(holder.token), code=1
    )
    assert value("get", a / "dom/x") == b"theirs\n"


def test_busy_locks_are_waited_for_as_long_as_told(nodes: Nodes) -> None:
    a, b = nodes.pair()
    value("set", a / "dom/x", "before")
    holder = Opener(nodes, ("x", a / "dom/x")).has(1)
    assert b"is busy" in value("get", "-n", b / "dom/x", code=1)
    assert b"is busy" in value("set", "-w", "0", b / "dom/x", "new", code=1)
    assert b"not free within 0.2 s" in value("get", "-w", "0.2", b / "dom/x", code=1)
    assert b"not free within 0.2 s" in value(
        "set", "-w", "0.2", "-E", "7", b / "dom/x", "new", code=7
    )
    assert value("get", "--stale", b / "dom/x") == b"before\n"
    assert json.loads(value("get", "--stale", "--json", b / "dom/x"))["stale"] is True
    queued(b / "dom/x", 0)  # nothing of them stands in the queue
    waiting = subprocess.Popen([*DLMFS, "value", "set", "-w", "30", str(b / "dom/x"), "after"])
    nodes.children.append(waiting)
    queued(b / "dom/x", 1)
    holder.end()
    assert waiting.wait(PATIENCE_S) == 0
    assert value("get", a / "dom/x") == b"after\n"


@pytest.mark.parametrize("read", [False, True], ids=["not read", "read"])
def test_a_stopped_daemon_does_not_stop_the_clock(nodes: Nodes, read: bool) -> None:
    """A signal does not end an open(2) there: the time must be over all the same. Once the daemon has
    read the request not even SIGKILL does."""
    a = nodes.mount("a", "holder=file")
    (a / "dom").mkdir()
    x = a / "dom/x"
    value("set", x, "1")
    holder = Opener(nodes, ("x", x)).has(1)

    def begin() -> subprocess.Popen[bytes]:
        command = [*DLMFS, "value", "set", "-w", "3", str(x), "2"]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    waiter = begin() if read else None
    if waiter is not None:
        queued(x, 1)
    with stopped(a):
        waiter = waiter or begin()
        _, errors = waiter.communicate(timeout=PATIENCE_S)
        assert waiter.returncode == 1
        assert b"not free within 3 s" in errors
        holder.end()
    assert value("get", x) == b"1\n", "written after the command had failed"


def test_a_value_of_a_dead_holder_is_called_doubtful(nodes: Nodes) -> None:
    a, b = nodes.pair()
    value("set", a / "dom/x", "half")
    Opener(nodes, ("x", a / "dom/x")).has(1)
    nodes.kill(a)
    done = subprocess.run(
        [*DLMFS, "value", "get", str(b / "dom/x")], capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b"half\n"
    assert b"doubtful: node a died" in done.stderr
    assert json.loads(value("get", "--json", b / "dom/x"))["abandoned"]["node"] == "a"
    value("set", b / "dom/x", "whole")
    assert json.loads(value("get", "--json", b / "dom/x"))["abandoned"] is None


def test_mistakes(nodes: Nodes, tmp_path: Path) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    other = tmp_path / "file"
    other.write_text("secret")
    assert b"not on a dlmfs mount" in value("get", other, code=2)
    assert b"mkdir it first" in value("get", a / "no/x", code=2)
    assert b"is not a lock" in value("get", a / "dom", code=2)
    assert b"cannot be a lock" in value("get", a / "dom" / ("x" * 256), code=2)
    assert b"get|set|watch" in value(code=2)
    assert b"-w SECS" in value("get", "-w", "-1", a / "dom/x", code=2)
    assert b"-E CODE" in value("get", "-E", "256", a / "dom/x", code=2)
    assert b"-w" in value("get", "-w", "soon", a / "dom/x", code=2)
    nodes.kill(a)
    until(lambda: b"is gone" in value("get", a / "dom/x", code=69), "it dies")


@pytest.mark.parametrize("name", [b"with space", b"new\nline", b"\xff\xfe", b"-n"])
def test_odd_names_and_values(nodes: Nodes, name: bytes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    path = os.fsencode(a / "dom") + b"/" + name
    value("set", path, b"\xfe\nodd")
    assert value("get", path) == b"\xfe\nodd\n"
    assert b"has the value" in value("set", path, "x", "--expect", "other", code=1)


# -- watch -----------------------------------------------------------------------------------------------


class Watching:
    def __init__(self, nodes: Nodes, path: Path, *options: str) -> None:
        self._errors = nodes.folder / f"watching{len(nodes.children)}"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*DLMFS, "value", "watch", *options, str(path)],
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        nodes.children.append(self.process)
        self.rest = b""

    def line(self) -> bytes:
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            assert left > 0
            assert select.select([self.process.stdout], [], [], left)[0], "no value came"
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, "it has ended"
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    @property
    def errors(self) -> bytes:
        return self._errors.read_bytes()

    def end(self) -> int:
        """By Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)


@pytest.mark.parametrize("rule", ["node", "file"])
def test_watch_prints_each_new_value(nodes: Nodes, rule: str) -> None:
    a, b = nodes.pair(f"holder={rule}")
    value("set", a / "dom/x", "0")
    watching = Watching(nodes, b / "dom/x")
    assert watching.line() == b"0"
    for number in range(1, 6):
        where = (a, b)[number % 2]  # also from its own node
        value("set", where / "dom/x", str(number))
        assert watching.line() == str(number).encode()
    value("set", a / "dom/x", "5")  # nothing new
    value("set", a / "dom/x", "6")
    assert watching.line() == b"6"
    assert watching.end() == 130
    assert watching.errors == b""


def test_watch_ends_after_so_many(nodes: Nodes) -> None:
    a, b = nodes.pair()
    value("set", a / "dom/x", "0")
    watching = Watching(nodes, b / "dom/x", "--count", "2", "--json")
    assert json.loads(watching.line())["text"] == "0"
    value("set", a / "dom/x", "1")
    assert json.loads(watching.line())["text"] == "1"
    assert watching.process.wait(PATIENCE_S) == 0


def test_watch_ends_with_its_reader(nodes: Nodes) -> None:
    """Though nothing is written to it any more."""
    a = nodes.mount("a")
    (a / "dom").mkdir()
    watching = Watching(nodes, a / "dom/x")
    watching.line()
    assert watching.process.stdout is not None
    watching.process.stdout.close()
    assert watching.process.wait(PATIENCE_S) == 141
    assert watching.errors == b""


def test_watch_says_that_it_lost_the_lock_and_comes_back(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    value("set", a / "dom/x", "0")
    watching = Watching(nodes, a / "dom/x")
    assert watching.line() == b"0"
    nodes.kill(a)
    until(lambda: b"trying again" in watching.errors, "it says nothing")
    nodes.mount("a")
    (a / "dom").mkdir()
    value("set", a / "dom/x", "1")
    assert watching.line() == b"1"
    watching.end()


def test_help_names_everything() -> None:
    for verb in ("get", "set", "watch"):
        assert "--wait" in run("value", verb, "--help")
