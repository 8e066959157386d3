"""`dlmfs why` on real mounts: chains, deadlocks, silence, crowds and odd names."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.programs import Opener, letters, queued, run, until, why
from tests.etcd.server import state_of
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes, dlmfs

nodes = _nodes
pytestmark = pytest.mark.fuse


def deadlock(nodes: Nodes, a: Path, b: Path) -> tuple[Opener, Opener]:
    """One at node a has x and waits for y, two at node b has y and waits for x."""
    one = Opener(nodes, ("x", a / "dom/x"), ("x", a / "dom/y")).has(1)
    two = Opener(nodes, ("x", b / "dom/y"), ("x", b / "dom/x")).has(1)
    one.go()
    queued(a / "dom/y", 1)
    assert why(a / "dom/x")["deadlocks"] == [], "one waits for two, who waits for nothing yet"
    two.go()
    queued(a / "dom/x", 1)
    return one, two


def test_a_deadlock_of_two_processes_over_two_locks_on_two_nodes(nodes: Nodes) -> None:
    a, b = nodes.pair()
    one, two = deadlock(nodes, a, b)
    for path in (a / "dom/x", a / "dom/y", b / "dom/x", b / "dom/y"):
        (cycle,) = why(path)["deadlocks"]
        assert cycle["certain"]
        named = {
            (e["waiter"]["pid"], e["lock"], e["node"], e["its"]["pid"]) for e in cycle["edges"]
        }
        assert named == {(one.pid, "y", "a", two.pid), (two.pid, "x", "b", one.pid)}
    text = run("why", b / "dom/x")
    assert text.startswith("DEADLOCK: 2 processes wait for each other; none will ever go on:\n")
    assert f"pid {one.pid} python" in text
    assert f"`kill {two.pid}` on {os.uname().nodename} ends the last that came" in text
    assert letters(nodes.state) == [], "questions stay behind"
    two.end()
    one.has(2)
    assert why(a / "dom/x")["deadlocks"] == []


def test_a_chain_over_three_nodes_is_told_link_by_link(nodes: Nodes) -> None:
    a, b = nodes.pair()
    c = nodes.mount("c")
    (c / "dom").mkdir()
    root = Opener(nodes, ("x", c / "dom/z")).has(1)
    middle = Opener(nodes, ("x", b / "dom/y"), ("s", b / "dom/z")).has(1).go()
    queued(c / "dom/z", 1)
    first = Opener(nodes, ("x", a / "dom/x"), ("x", a / "dom/y")).has(1).go()
    queued(c / "dom/y", 1)
    last = Opener(nodes, ("x", c / "dom/x"))
    queued(c / "dom/x", 1)
    report = why(b / "dom/x")
    assert [lock["lock"] for lock in report["locks"]] == ["x", "y", "z"]
    assert report["deadlocks"] == []
    states = {name: told["state"] for name, told in report["nodes"].items()}
    assert states == dict.fromkeys("abc", "HEALTHY")
    text = run("why", b / "dom/x")
    order = [
        f"pid {first.pid} python",
        f"1. pid {last.pid} python",
        f"-> pid {first.pid} python",
        "dom/y",
        f"pid {middle.pid} python",
        "dom/z",
        f"pid {root.pid} python",
        f"1. pid {middle.pid} python",
        f"-> pid {root.pid} python",
        f"ps -o pid,stat,wchan,args -p {root.pid}",
    ]
    at = 0
    for words in order:
        assert words in text[at:], (words, text)
        at = text.index(words, at) + 1


def test_the_order_of_local_and_remote_waiters(nodes: Nodes) -> None:
    """One waits at the holder's node before the other node's wish came, one after it."""
    a, b = nodes.pair("holder=file")
    Opener(nodes, ("x", a / "dom/x")).has(1)
    order = []
    for number, where in enumerate((a, b, a), 1):
        order.append(Opener(nodes, ("x", where / "dom/x")).pid)
        queued(a / "dom/x", number)
    text = run("why", b / "dom/x")
    assert [int(n) for n in re.findall(r"(?m)^ +\d\. pid (\d+) ", text)] == order


def test_a_deadlock_across_two_mounts_of_one_host(nodes: Nodes) -> None:
    """One has x through node a and waits through node b: the nodes know each half of it."""
    a, b = nodes.pair("holder=file")
    one = Opener(nodes, ("x", a / "dom/x"), ("x", b / "dom/y")).has(1)
    two = Opener(nodes, ("x", b / "dom/y"), ("x", a / "dom/x")).has(1)
    one.go()
    queued(a / "dom/y", 1)
    two.go()
    queued(a / "dom/x", 1)
    (cycle,) = why(a / "dom/x")["deadlocks"]
    assert cycle["certain"]
    assert {edge["waiter"]["pid"] for edge in cycle["edges"]} == {one.pid, two.pid}
    two.end()


def test_a_process_that_waits_for_itself(nodes: Nodes) -> None:
    """Under holder=file each open file is an owner; under holder=node the second open is granted."""
    a = nodes.mount("a", "holder=file")
    (a / "dom").mkdir()
    Opener(nodes, ("x", a / "dom/x"), ("x", a / "dom/x")).has(1).go()
    queued(a / "dom/x", 1)
    assert run("why", a / "dom/x").startswith(
        "DEADLOCK: a process waits for a lock that it has itself"
    )


@pytest.mark.parametrize("inherited", [True, False])
def test_a_child_of_the_holder_waits_for_it(nodes: Nodes, inherited: bool) -> None:
    """A shell script that has a lock and runs a program that wants the same one."""
    a = nodes.mount("a", "holder=file")
    (a / "dom").mkdir()
    closing = "" if inherited else "9>&-"
    path = a / "dom/x"
    wanting = f"{sys.executable} -c \"open('{path}', 'r+')\""
    script = f'exec 9<>"{path}"; exec 0</dev/null 2>&0; {wanting} {closing}'
    path.touch()
    shell = subprocess.Popen(["bash", "-c", script + "; true"], stdin=subprocess.PIPE)
    nodes.children.append(shell)
    queued(path, 1)
    text = run("why", path)
    (cycle,) = why(path)["deadlocks"]
    assert cycle["certain"] is inherited
    assert cycle["edges"][0]["by"] == ("inherited" if inherited else "child")
    assert f"pid {shell.pid} bash" in text
    assert ("will never go on" if inherited else "unless") in text.splitlines()[0]
    assert ("has inherited dom/x from" if inherited else "a descendant of the holder") in text
    (child,) = [edge["waiter"]["pid"] for edge in cycle["edges"]]
    os.kill(child, signal.SIGKILL)
    shell.wait(PATIENCE_S)


def test_free_cached_and_unknown(nodes: Nodes) -> None:
    a, b = nodes.pair()
    assert "nobody has it and nobody waits for it: it is free" in run("why", b / "dom/x")
    holder = nodes.hold(a / "dom/x")
    assert holder.wait() == "held"
    holder.release()
    text = run("why", b / "dom/x")
    assert "nobody uses it at node a, which merely keeps it cached (EX)" in text
    assert run("why", b / "nodom/x", code=2) == ""
    assert run("why", b / "dom", code=2) == ""
    assert run("why", "/tmp/x", code=2) == ""


def test_what_owner_node_means_is_said(nodes: Nodes) -> None:
    a, _ = nodes.pair()
    assert nodes.hold(a / "dom/x").wait() == "held"
    assert nodes.hold(a / "dom/x").wait() == "held"
    text = run("why", a / "dom/x")
    assert text.count(" has it exclusively") == 2
    assert "holder=node at a: the processes of such a node share its locks" in text


def test_a_stopped_program_is_told(nodes: Nodes) -> None:
    a, b = nodes.pair()
    holder = Opener(nodes, ("x", a / "dom/x")).has(1)
    Opener(nodes, ("x", b / "dom/x"))
    queued(a / "dom/x", 1)
    os.kill(holder.pid, signal.SIGSTOP)
    until(lambda: state_of(holder.pid) == "T", "it stops")
    assert f"is stopped (SIGSTOP, Ctrl-Z): `kill -CONT {holder.pid}`" in run("why", b / "dom/x")


def test_a_stopped_node_in_the_chain_is_named(nodes: Nodes) -> None:
    """The way goes from x at a to y at b, whose daemon stands still."""
    a, b = nodes.pair()
    two = Opener(nodes, ("x", b / "dom/y")).has(1)
    Opener(nodes, ("x", a / "dom/x"), ("x", a / "dom/y")).has(1).go()
    queued(a / "dom/y", 1)
    pid = nodes.pid(b)
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: state_of(pid) == "T", "it stops")
        report = why(a / "dom/x", code=69)
        silent = report["nodes"]["b"]["silent"]
        assert (silent["why"], silent["pid"], silent["left_s"]) == ("stopped", pid, None)
        text = run("why", a / "dom/x", code=69)
        assert "node b" in text
        assert f"its daemon (pid {pid}) is stopped" in text
        assert f"`kill -CONT {pid}`" in text
        assert letters(nodes.state) == []
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: "silent" not in why_whatever(a / "dom/x")["nodes"]["b"], "b answers again")
    assert why(a / "dom/x")["locks"][1]["claims"]["b"]["holders"][0]["pid"] == two.pid
    assert letters(nodes.state) == []


def why_whatever(path: Path) -> dict[str, Any]:
    done = subprocess.run([*DLMFS, "why", "--json", str(path)], capture_output=True, timeout=60)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_stopped_asker_and_a_dead_one(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    pid = nodes.pid(a)
    os.kill(pid, signal.SIGSTOP)
    done = dlmfs("why", str(a / "dom/x"), check=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert f"(pid {pid}, stopped) does not answer" in done.stderr
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z", "it dies")
    done = dlmfs("why", str(a / "dom/x"), check=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert "is gone: `dlmfs umount" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_fenced_asker_says_that_it_cannot_ask(nodes: Nodes) -> None:
    a, b = nodes.pair()
    Opener(nodes, ("x", b / "dom/x")).has(1)
    dlmfs("evict", "a", str(b))
    report = why(a / "dom/x", code=69)
    assert report["nodes"]["a"]["state"] == "FENCED"
    assert report["nodes"]["b"]["silent"]["why"] == "unasked"
    text = run("why", a / "dom/x", code=69)
    assert "node b has it (EX), in use or cached, and cannot be heard:" in text
    assert "other nodes cannot be asked now: evicted by b" in text
    assert "node a is FENCED: evicted by b" in text
    assert letters(nodes.state) == []


def test_a_dead_daemon_gives_its_locks_back_and_is_not_asked(nodes: Nodes) -> None:
    a, b = nodes.pair()
    holder = Opener(nodes, ("x", b / "dom/x")).has(1)
    waiter = Opener(nodes, ("x", a / "dom/x"))
    queued(a / "dom/x", 1)
    nodes.kill(b)
    waiter.has(1)
    report = why(a / "dom/x")
    assert list(report["nodes"]) == ["a"]
    assert report["locks"][0]["abandoned"]["node"] == "b"
    assert "node b died having it exclusively" in run("why", a / "dom/x")
    holder.end()


def test_many_waiters_are_counted_and_not_all_told(nodes: Nodes) -> None:
    a, b = nodes.pair("holder=file", "max_lock_waiters=1000")
    Opener(nodes, ("x", a / "dom/x")).has(1)
    code = (
        "import os, sys, threading\n"
        "for _ in range(300):\n"
        "    wait = threading.Thread(target=os.open, args=(sys.argv[1], 66), daemon=True)\n"
        "    wait.start()\n"
        "print('all', flush=True); sys.stdin.read(); os._exit(0)\n"
    )
    crowds = []
    for where in (a, b):
        crowd = subprocess.Popen(
            [sys.executable, "-c", code, str(where / "dom/x")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        nodes.children.append(crowd)
        crowds.append(crowd)
    queued(a / "dom/x", 600)
    text = run("why", b / "dom/x")
    assert len(text.splitlines()) < 60
    assert text.count(" more at node ") == 2
    assert f"pid {crowds[0].pid} python" in text
    assert len(run("why", "--json", b / "dom/x")) < 64 * 1024


@pytest.mark.parametrize(
    "name", [b"with space", b"new\nline", b"\xff\xfe", b"-n", "schl\u00fcssel".encode()]
)
def test_odd_names(nodes: Nodes, name: bytes) -> None:
    a, b = nodes.pair()
    path = os.fsencode(a / "dom") + b"/" + name
    there = os.fsencode(b / "dom") + b"/" + name
    holder = Opener(nodes, ("x", path)).has(1)
    Opener(nodes, ("x", there))
    queued(there, 1)
    assert os.fsencode(why(there)["lock"]) == name
    text = run("why", there)
    shown = {b"new\nline": "new\\nline", b"\xff\xfe": "\\xff\\xfe"}.get(
        name, name.decode("utf-8", "replace")
    )
    assert text.splitlines()[0] == f"dom/{shown}"
    assert f"pid {holder.pid} python" in text
    assert shown in run("status", a)
    assert shown in run("info", path)


def test_a_reader_that_goes_away_gets_no_traceback(nodes: Nodes) -> None:
    a = nodes.mount("a")
    (a / "dom").mkdir()
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as out:
        done = subprocess.run(
            [*DLMFS, "why", str(a / "dom/x")],
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")
