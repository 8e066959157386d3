"""All that is printed goes through one place, and is harmless."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.cli import say
from dlmfs.cli.loglines import LogFormatter
from dlmfs.cli.text import harmless, plain
from tests.fs.nodes import ROOT

SOURCE = ROOT / "src" / "dlmfs"
QUIET = {"flush", "isatty", "fileno", "reconfigure"}
"""What others than `say` may do with the standard streams."""
ODD = "\x1b[31m\r\n\t\0\x7f\x9b\u202e\u2028\ud800\udcff\\"


def loud(tree: ast.AST) -> Iterator[int]:
    """The lines that print by themselves."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                yield node.lineno
            case ast.Attribute(
                value=ast.Attribute(value=ast.Name(id="sys"), attr=stream), attr=what
            ):
                if stream in ("stdout", "stderr") and what not in QUIET:
                    yield node.lineno
            case ast.Call(func=ast.Attribute(attr=what)) if what.startswith("print_"):
                yield node.lineno  # of traceback, of argparse
            case ast.Call(func=ast.Attribute(attr="write"), args=[ast.Constant(value=1 | 2), *_]):
                yield node.lineno
            case ast.keyword(arg="file"):
                yield node.value.lineno


def test_nobody_else_prints() -> None:
    """But for the campaign's workers, whose output is a pipe to the command."""
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "cli" / "say.py" and path.parts[-2:] != ("sim", "worker.py")
        for line in loud(ast.parse(path.read_bytes()))
    ]
    assert found == []


def test_the_look_at_the_source_finds_who_prints() -> None:
    lines = (
        "print(x)", "sys.stdout.write(x)", "sys.stderr.buffer", "traceback.print_exc()",
        "os.write(2, b'')", "f(file=sys.stderr)",
    )  # fmt: skip
    assert all(list(loud(ast.parse(line))) for line in lines)
    assert not list(loud(ast.parse("sys.stdout.flush(); sys.stderr.isatty(); os.write(fd, b'')")))


@given(st.text() | st.text(ODD))
def test_a_line_stays_one_line_of_what_can_be_seen(text: str) -> None:
    out = io.StringIO()
    before, sys.stdout = sys.stdout, out
    try:
        say.say(text, plain(text))
        say.say_json({text: text})
    finally:
        sys.stdout = before
    first, second, third, end = out.getvalue().split("\n")
    assert (first + second + third).isprintable()
    assert end == ""
    assert third.isascii()
    assert json.loads(third) == {text: text}
    assert harmless(plain(text)) == plain(text), "a name that is plain already stays as it is"


def test_plain_names_are_told_apart() -> None:
    names = [ODD, repr(ODD), "\n", "\\n", "\\", "\\\\", "\x1b", "\\x1b"]
    assert len({plain(name) for name in names}) == len(names)


def test_complaints_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say.complain(f"the node {ODD} is gone")
    say.remark(ODD)
    say.progress(ODD, last=True)
    err = capsys.readouterr().err
    assert err.count("\n") == 3
    assert err.startswith("dlmfs: the node \\x1b[31m")
    assert err.replace("\n", "").replace("\r", "").isprintable()


def test_without_streams_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    say.say("x")
    say.say_json([])
    say.complain("x")


def test_a_value_is_raw_for_a_script_and_harmless_on_a_terminal(tmp_path: Path) -> None:
    value = b"\x1b[31m\xff\n"
    master, slave = os.openpty()
    with open(tmp_path / "out", "w+") as file, open(slave, "w") as terminal:
        shown = b""
        for stream in (file, terminal):
            before, sys.stdout = sys.stdout, stream
            try:
                say.say_bytes(value)
            finally:
                sys.stdout = before
        shown = os.read(master, 1000)
    os.close(master)
    assert (tmp_path / "out").read_bytes() == value + b"\n"
    assert shown == b"\\x1b[31m\\xff\\n\r\n"


def test_a_log_record_is_one_line() -> None:
    record = logging.LogRecord("dlmfs", 30, "", 0, "evicted by %s", (f"n\ndlmfs[1]: {ODD}",), None)
    text = LogFormatter().format(record)
    assert text.isprintable()
    try:
        raise ValueError("x\ndlmfs[1]: ERROR: all is lost \x1b")
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *further = LogFormatter().format(record).split("\n")
    assert first == text
    assert all(line.startswith("  ") and line.isprintable() for line in further)
