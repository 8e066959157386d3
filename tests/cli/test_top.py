"""`dlmfs top`: its table in a terminal, its keys, and what scripts get."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from dlmfs.cli.top import View
from tests.cli.programs import Opener, queued, until
from tests.cli.terminal import Terminal
from tests.etcd.server import state_of
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes, dlmfs

nodes = _nodes
pytestmark = pytest.mark.fuse


def look(where: Path, *options: str) -> dict[str, Any]:
    done = dlmfs("top", "--json", "-d", "0", *options, str(where))
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def names(seen: dict[str, Any]) -> list[str]:
    return [row["name"] for row in seen["locks"]]


def busy(nodes: Nodes) -> tuple[Path, Path, Opener]:
    """x is held at a and awaited by two at b; y is held at b; z is idle."""
    a, b = nodes.pair("holder=file")
    holder = Opener(nodes, ("x", a / "dom/x")).has(1)
    Opener(nodes, ("x", b / "dom/y")).has(1)
    (a / "dom/z").touch()
    for _ in range(2):
        Opener(nodes, ("x", b / "dom/x"))
    queued(a / "dom/x", 2)
    return a, b, holder


# -- for scripts ------------------------------------------------------------------------------------


def test_one_look(nodes: Nodes) -> None:
    a, b, holder = busy(nodes)
    seen = look(a)
    assert names(seen) == ["dom/x"]
    (row,) = seen["locks"]
    assert (row["node"], row["holder"]["pid"], row["holders"]) == ("a", holder.pid, 1)
    assert row["wanted_by"] == ["b"]
    assert row["waiters"] == 1, "a knows that node b waits, not for how many"
    assert row["grants_per_s"] is None, "nothing was counted before"
    seen = look(b)
    assert names(seen) == ["dom/x", "dom/y"]
    assert (seen["locks"][0]["waiters"], seen["locks"][0]["node"]) == (2, "a")
    assert seen["locks"][0]["longest_s"] > 0
    assert names(look(a, "-a", "-s", "name")) == ["dom/x", "dom/z"]
    assert names(look(b, "-f", "OM/Y")) == ["dom/y"]
    assert names(look(b, "-r")) == ["dom/y", "dom/x"]
    text = dlmfs("top", "-b", "-n", "1", "-d", "0", str(b)).stdout
    head, columns, first, second = text.splitlines()
    assert head == "nodes here: b  busy locks: 2  by waiters"
    assert columns.split() == ["WAIT", "LONGEST", "GRANTS/S", "HELD", "SINCE", "LOCK"]
    assert re.fullmatch(r" +2 +[0-9.]+s +\S+ +0 +-  dom/x +node a", first), first
    assert re.search(r"dom/y +pid \d+ python\d* \(node b\)$", second), second


def test_mounts_of_one_lock_space_are_one_row(nodes: Nodes) -> None:
    a, _, holder = busy(nodes)
    done = dlmfs("top", "--once", "--json", "-d", "0")
    rows = [
        row for row in json.loads(done.stdout)["locks"] if row["source"].endswith(str(nodes.state))
    ]
    (x,) = [row for row in rows if row["name"] == "dom/x"]
    assert (x["waiters"], x["holder"]["pid"], x["node"]) == (2, holder.pid, "a")
    assert x["mountpoint"] in (str(a), str(a.parent / "b"))


def test_grants_per_second(nodes: Nodes) -> None:
    """Of a lock that is hardly ever held when it is looked at."""
    a = nodes.mount("a")
    (a / "dom").mkdir()
    end = threading.Event()

    def churn() -> None:
        while not end.wait(0.01):
            os.close(os.open(a / "dom/x", os.O_RDWR | os.O_CREAT))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        until(lambda: (a / "dom/x").exists(), "it opens")
        done = dlmfs("top", "--json", "-n", "1", "-d", "0.5", str(a))
    finally:
        end.set()
        thread.join()
    (row,) = json.loads(done.stdout)["locks"]
    assert 1 <= row["grants_per_s"] <= 100
    until(lambda: look(a)["locks"] == [], "an idle lock is shown for ever")


def test_what_is_not_well_is_said_and_the_rest_shown(nodes: Nodes) -> None:
    a, b, _ = busy(nodes)
    pid = nodes.pid(b)
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: state_of(pid) == "T", "it stops")
        done = dlmfs("top", "--once", "-d", "0")
        assert f"{b}: the daemon of {b} (pid {pid}, stopped) does not answer" in done.stdout
        assert "dom/x" in done.stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    nodes.kill(a)
    until(
        lambda: "is gone" in dlmfs("top", "--once", "-d", "0", str(a), check=False).stdout, "gone"
    )


def test_mistakes(nodes: Nodes) -> None:
    for args in (
        ["-d", "-1"],
        ["-d", "nan"],
        ["-d", "1e10"],
        ["-n", "0"],
        ["-s", "size"],
        ["/tmp"],
    ):
        done = dlmfs("top", "-b", *args, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
    where = nodes.mount("a")
    command = [*DLMFS, "top", str(where)]
    with Terminal(["env", "TERM=dumb", *command]) as terminal:
        assert terminal.ended() == 2
        assert b"use `dlmfs top -b`" in terminal.all


def test_a_reader_that_goes_away(nodes: Nodes) -> None:
    where = nodes.mount("a")
    process = subprocess.Popen(
        [*DLMFS, "top", "-b", "-d", "0.01", str(where)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 141
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_orders() -> None:
    def row(name: str, waiters: int, longest: float | None, grants: float | None) -> dict[str, Any]:
        return {"name": name, "waiters": waiters, "longest_s": longest, "grants_per_s": grants}

    rows = [
        row("b", 1, 9.0, None),
        row("a", 0, None, 50.0),
        row("c", 3, 2.0, 1.0),
        row("d", 0, None, None),
    ]
    for sort, order in (
        ("waiters", "cbad"),
        ("longest", "bcad"),
        ("grants", "acbd"),
        ("name", "abcd"),
    ):
        for reverse in (False, True):
            view = View(sort, "", reverse=reverse, idle=False)
            shown = "".join(r["name"] for r in view.ordered(rows))
            assert shown == (order[::-1] if reverse else order)


# -- in a terminal -------------------------------------------------------------------------------------


def live(where: Path, *options: str, rows: int = 24, columns: int = 100) -> Terminal:
    return Terminal([*DLMFS, "top", "-d", "0.2", *options, str(where)], rows, columns)


def order(text: str) -> list[str]:
    """The locks on the screen, from above."""
    return re.findall(r"dom/(\w+)", text)


def test_the_table_and_its_keys(nodes: Nodes) -> None:
    a, b, holder = busy(nodes)
    with live(b) as terminal:
        text = terminal.until(lambda t: order(t) == ["x", "y"], "by waiters")
        assert "nodes here: b" in text
        assert "WAIT" in text
        terminal.type("r")
        terminal.until(lambda t: order(t) == ["y", "x"], "reversed")
        terminal.type("rn")
        terminal.until(lambda t: "by name" in t and order(t) == ["x", "y"], "by name")
        terminal.type("l")
        terminal.until(lambda t: "by longest" in t and order(t) == ["x", "y"], "by longest wait")
        terminal.type("/Y\r")
        terminal.until(lambda t: order(t) == ["y"] and "with 'Y'" in t, "filtered")
        terminal.type("\x1b")
        terminal.until(lambda t: order(t) == ["x", "y"], "no filter")
        terminal.type("?")
        terminal.until(lambda t: "who blocks whom" in t, "help")
        terminal.type("x")
        terminal.until(lambda t: order(t) == ["x", "y"], "back")
        terminal.type("\r")
        terminal.until(
            lambda t: f"pid {holder.pid} python" in t and "has it exclusively" in t, "why"
        )
        terminal.type("q")
        terminal.until(lambda t: order(t) == ["x", "y"], "back again")
        terminal.type("j\r")
        terminal.until(lambda t: "why dom/y" in t and "nobody waits for it" in t, "the other's why")
        terminal.type("qw")
        holder.end()
        terminal.until(lambda t: re.search(r"(?m)^ +1 .*dom/x", t) is not None, "one less")
        terminal.type(" ")
        terminal.until(lambda t: "stopped, space goes on" in t, "paused")
        terminal.type("q")
        assert terminal.ended() == 0
        assert a.exists()


def test_idle_locks_on_demand(nodes: Nodes) -> None:
    a, _, _ = busy(nodes)
    with live(a) as terminal:
        terminal.until(lambda t: order(t) == ["x"])
        terminal.type("a")
        terminal.until(lambda t: sorted(order(t)) == ["x", "z"], "with the idle one")
        terminal.type("q")
        assert terminal.ended() == 0


@pytest.mark.parametrize("how", ["TERM", "HUP", "INT", "error"])
def test_the_terminal_is_given_back_at_every_end(nodes: Nodes, how: str) -> None:
    a = nodes.mount("a")
    with live(a) as terminal:
        terminal.until(lambda t: "nodes here: a" in t)
        if how == "error":
            nodes.kill(a)  # no error: said, and the screen stays
            terminal.until(lambda t: "is gone" in t, "said")
            terminal.type("\x03")
            assert terminal.ended() == 130
            return
        terminal.process.send_signal(getattr(signal, f"SIG{how}"))
        assert terminal.ended() == (130 if how == "INT" else 128 + getattr(signal, f"SIG{how}"))
        assert b"Traceback" not in terminal.all


def test_ctrl_z_and_back(nodes: Nodes) -> None:
    a = nodes.mount("a")
    with live(a) as terminal:
        terminal.until(lambda t: "nodes here: a" in t)
        terminal.process.send_signal(signal.SIGTSTP)
        until(lambda: state_of(terminal.process.pid) in "TS", "it stops, or cannot (no shell)")
        terminal.process.send_signal(signal.SIGCONT)
        terminal.type("\x0c")
        terminal.until(lambda t: "nodes here: a" in t, "it is back")
        terminal.type("q")
        assert terminal.ended() == 0


def test_any_size(nodes: Nodes) -> None:
    a, _, _ = busy(nodes)
    for number in range(40):
        (a / f"dom/idle{number}").touch()
    with live(a, "-a", "-s", "name") as terminal:
        terminal.until(lambda t: len(order(t)) > 15)
        for rows, columns in ((5, 30), (1, 1), (2, 2), (3, 200), (50, 120)):
            terminal.resize(rows, columns)
            terminal.type("\x0c")
            terminal.pull(0.3)
            assert terminal.process.poll() is None, terminal.all[-2000:]
        terminal.until(lambda t: len(order(t)) == 42, "all fit")
        terminal.resize(10, 80)
        terminal.type("j" * 50 + "\x0c")
        terminal.until(lambda t: "dom/z" in t and len(order(t)) == 7, "the last ones")
        terminal.type("q")
        assert terminal.ended() == 0
        assert b"Traceback" not in terminal.all


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_narrow_terminal_shows_the_lock_and_the_whole_story(nodes: Nodes) -> None:
    a, _, _ = busy(nodes)
    with live(a) as terminal:
        terminal.until(lambda t: "GRANTS/S" in t)
        terminal.resize(15, 40)
        terminal.type("\x0c")
        shown = terminal.until(lambda t: "GRANTS/S" not in t and "dom/x" in t)
        assert "WAIT  LONGEST  LOCK" in shown
        terminal.type("\r")
        terminal.until(lambda t: "see what it does on" in words(t) and "`ps -o pid," in words(t))
        terminal.type("x?")
        terminal.until(lambda t: "grants per second, name" in words(t))
        terminal.type("xq")
        assert terminal.ended() == 0


def test_odd_names_are_shown(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    for name in (b"with space", b"new\nline", b"\xff\xfe", b"\x1b[2J"):
        Opener(nodes, ("x", os.fsencode(a / "dom") + b"/" + name)).has(1)
    text = dlmfs("top", "--once", "-d", "0", str(a)).stdout
    assert "\x1b" not in text
    assert len(text.splitlines()) == 6
    with live(a) as terminal:
        shown = terminal.until(lambda t: t.count("dom/") == 4)
        assert "dom/with space" in shown
        assert "dom/new\\nline" in shown
        assert "dom/\\xff\\xfe" in shown
        terminal.type("q")
        assert terminal.ended() == 0
