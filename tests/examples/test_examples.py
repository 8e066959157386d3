"""Every example runs as it stands, on real mounts, on two nodes where that is the point."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import PATIENCE_S, ROOT, Nodes
from tests.robust.helpers import kill
from tests.waiting.agents import until, waiting

nodes = _nodes
pytestmark = pytest.mark.fuse

EXAMPLES = ROOT / "examples"
MORE_THAN_A_PIPE = bytes(1 << 20)


def environment(node: Path) -> dict[str, str]:
    """As if this node's mount were the only one, and dlmfs installed."""
    path = f"{ROOT / 'scripts'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "DLMFS_MOUNT": str(node), "PYTHONPATH": str(ROOT / "src"), "PATH": path}


def command(name: str, *args: object) -> list[str]:
    words = [str(EXAMPLES / name), *map(str, args)]
    return [sys.executable, *words] if name.endswith(".py") else words


def run(node: Path, name: str, *args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *args), env=environment(node), capture_output=True, text=True,
        timeout=PATIENCE_S, check=False, **more,
    )  # fmt: skip


class Running:
    """An example that goes on until it is ended."""

    def __init__(self, node: Path, name: str, *args: object) -> None:
        self.process = subprocess.Popen(
            command(name, *args),
            env=environment(node),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )

    def line(self) -> str:
        out = self.process.stdout
        assert out is not None
        assert select.select([out], [], [], PATIENCE_S)[0], "it says nothing"
        return out.readline().decode().rstrip("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_all_are_here_and_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    here = {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh")}
    assert all(f"]({name})" in table for name in here)
    text = Path(__file__).read_text()
    assert all(f'"{name}"' in text for name in here)


@pytest.mark.parametrize(
    "words",
    [
        ("nightly.py", "nope", "--", "true"),
        ("leader.py", "nope"),
        ("rolling_restart.py", "nope", "v1", "--", "true"),
        ("shared_config.py", "watch", "nope"),
        ("guard_file.py", "nope", "/dev/null"),
        ("guard_sql.py", "nope", ":memory:", "apples", "1"),
        ("guard_http.py", "put", "nope", "http://localhost/", "x"),
    ],
)
def test_a_mistake_gets_a_line(nodes: Nodes, words: tuple[str, ...]) -> None:
    done = run(nodes.mount("a"), *words)
    assert done.returncode != 0
    assert "is not a lock" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nightly(nodes: Nodes, tmp_path: Path, stack: ExitStack) -> None:
    """Both nodes' cron starts it at once; it runs on one, and again when that one failed."""
    a, b = nodes.pair()
    log = tmp_path / "log"
    job = ["--", "sh", "-c", f"echo ran >> {log}; exit $(cat {tmp_path}/code)"]
    (tmp_path / "code").write_text("3")
    assert run(a, "nightly.py", "jobs/report", *job).returncode == 3
    (tmp_path / "code").write_text("0")
    both = [stack.enter_context(Running(n, "nightly.py", "jobs/report", *job)) for n in (a, b)]
    assert [one.process.wait(PATIENCE_S) for one in both] == [0, 0]
    assert run(b, "nightly.py", "jobs/report", *job).returncode == 0
    assert log.read_text() == "ran\nran\n"


def test_leader(nodes: Nodes, stack: ExitStack) -> None:
    """The next one leads when the leader dies; with its node, it ends by an error."""
    a, b = nodes.pair()
    first = stack.enter_context(Running(a, "leader.py", "jobs/leader"))
    token = int(first.line().removeprefix("leading with token "))
    second = stack.enter_context(Running(b, "leader.py", "jobs/leader"))
    until(lambda: (b / "jobs/leader").exists() and waiting(b / "jobs/leader"), "it waits")
    first.process.send_signal(signal.SIGKILL)
    assert int(second.line().removeprefix("leading with token ")) > token
    kill(b)
    assert second.process.wait(PATIENCE_S) == 1
    assert second.process.stderr is not None
    told = second.process.stderr.read()
    assert told.startswith(b"leader.py: ")
    assert b" was lost" in told


def test_rolling_restart(nodes: Nodes, tmp_path: Path, stack: ExitStack) -> None:
    a, b = nodes.pair()
    alone = ["--", "sh", "-ec", f"mkdir {tmp_path}/down; echo up >> {tmp_path}/log; rmdir {tmp_path}/down"]  # fmt: skip  # noqa: E501
    four = [
        stack.enter_context(Running(n, "rolling_restart.py", "deploy/web", "v1", *alone))
        for n in (a, b, a, b)
    ]
    assert [one.process.wait(PATIENCE_S) for one in four] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "up\n" * 4
    assert run(a, "rolling_restart.py", "deploy/web", "v2", "--", "false").returncode == 1
    done = run(b, "rolling_restart.py", "deploy/web", "v2", *alone)
    assert (done.returncode, "has failed on another node" in done.stderr) == (1, True)
    assert run(b, "rolling_restart.py", "deploy/web", "v3", *alone).returncode == 0


def test_shared_config(nodes: Nodes, stack: ExitStack) -> None:
    a, b = nodes.pair()
    assert run(a, "shared_config.py", "set", "config/limit", "100").returncode == 0
    readers = [
        stack.enter_context(Running(n, "shared_config.py", "watch", "config/limit"))
        for n in (a, a, b)
    ]
    assert [reader.line() for reader in readers] == ["100"] * 3
    for value in ("250", "300"):
        assert run(b, "shared_config.py", "set", "config/limit", value).returncode == 0
        assert [reader.line() for reader in readers] == [value] * 3


def test_backup(nodes: Nodes, tmp_path: Path) -> None:
    a, b = nodes.pair()
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "file").write_text("text")
    (source / "x.tmp").touch()
    tokens = []
    for node in (a, b, a):
        done = run(node, "backup.sh", node / "dom", source, target)
        assert (done.returncode, done.stderr) == (0, "")
        tokens.append(int((target / ".token").read_text()))
    assert tokens == sorted(set(tokens))
    assert sorted(p.name for p in target.iterdir()) == [".token", "file"]


def test_guard_file(nodes: Nodes, tmp_path: Path, stack: ExitStack) -> None:
    """A writer that outlives its node's loss comes too late."""
    a, b = nodes.pair()
    report = tmp_path / "report"
    late = subprocess.Popen(
        command("guard_file.py", "jobs/report", report),
        env=environment(a),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stack.callback(late.kill)
    assert late.stdin is not None
    late.stdin.write(MORE_THAN_A_PIPE)  # which returns when it reads: it has its lock and its token
    kill(a)  # and the writer, in the middle of its input, does not look
    done = run(b, "guard_file.py", "jobs/report", report, input="new")
    assert (done.returncode, report.read_text()) == (0, "new")
    _, errors = late.communicate(b"old", timeout=PATIENCE_S)
    assert (late.returncode, report.read_text()) == (75, "new")
    assert b"too late" in errors


def test_guard_http(nodes: Nodes, tmp_path: Path, stack: ExitStack) -> None:
    a, b = nodes.pair()
    server = stack.enter_context(Running(a, "guard_http.py", "serve", 0, tmp_path / "tokens"))
    url = f"http://127.0.0.1:{server.line().removeprefix('serving on port ')}/"
    for node, word in ((a, "one"), (b, "two")):
        assert run(node, "guard_http.py", "put", "jobs/store", url, word).returncode == 0
        fetch = subprocess.run(
            [sys.executable, "-c", FETCH, url], capture_output=True, check=True, timeout=PATIENCE_S
        )
        assert fetch.stdout == word.encode()
    late = subprocess.run(
        [sys.executable, "-c", LATE, url], capture_output=True, check=True, timeout=PATIENCE_S
    )
    assert late.stdout == b"412"


FETCH = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"
LATE = """
import sys, urllib.error, urllib.request as u
try: u.urlopen(u.Request(sys.argv[1], b"late", {"DlmfsToken": "1"}, method="PUT"))
except urllib.error.HTTPError as error: print(error.code, end="")
"""


def test_guard_sql(nodes: Nodes, tmp_path: Path, stack: ExitStack) -> None:
    import sqlite3
    from contextlib import closing

    a, b = nodes.pair()
    database = tmp_path / "stock.db"
    runs = [
        stack.enter_context(Running(n, "guard_sql.py", "jobs/stock", database, "apples", 5))
        for n in (a, b, a, b)
    ]
    assert [one.process.wait(PATIENCE_S) for one in runs] == [0, 0, 0, 0]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT * FROM stock").fetchall() == [("apples", 20)]
        connection.execute("UPDATE dlmfs_guard SET token = token * 2")  # a later holder was here
        connection.commit()
        done = run(a, "guard_sql.py", "jobs/stock", database, "apples", 5)
        assert (done.returncode, "too late" in done.stderr) == (75, True)
        assert connection.execute("SELECT * FROM stock").fetchall() == [("apples", 20)]
