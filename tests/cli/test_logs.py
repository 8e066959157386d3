"""Where a daemon's log goes, and that nobody waits for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from dlmfs.cli import logs
from dlmfs.cli.loglines import JsonFormatter
from dlmfs.cli.logs import File, Log, StandardError, Syslog
from dlmfs.config import MountOptions, parse_options
from dlmfs.errors import BadState, MountFailed, NotPermitted, UsageError


def record(text: str, level: int = logging.WARNING, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("dlmfs.node", level, "", 0, text, None, None)
    made.__dict__.update(more)
    return made


@pytest.fixture
def syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The system's log, and the names that lead to it."""
    path = tmp_path / "log"
    monkeypatch.setattr(logs, "SYSLOG", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(60)
        yield sock


L = TypeVar("L", bound=Log)
_open: list[Log] = []


def closing(log: L) -> L:
    """Closed after the test."""
    _open.append(log)
    return log


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


# -- syslog ----------------------------------------------------------------------------------------


def test_syslog_has_facility_severity_and_pid_once_and_no_nul(syslog: socket.socket) -> None:
    log = closing(Syslog())
    log.emit(record("fenced\n\x1b[1m", logging.ERROR))
    assert syslog.recv(10_000) == b"<27>dlmfs[%d]: fenced\\n\\x1b[1m" % os.getpid()
    log.emit(record("so", logging.WARNING))
    assert syslog.recv(10_000) == b"<28>dlmfs[%d]: so" % os.getpid()


def test_a_journal_that_stands_still_keeps_nobody_waiting(syslog: socket.socket) -> None:
    log = closing(Syslog())
    for _ in range(10_000):
        log.emit(record("x" * 1000))
    assert log.lost
    while log.lost:
        for _ in range(2):  # for the number of those that were lost, and for this one
            syslog.recv(10_000)
        log.emit(record("again"))
    syslog.settimeout(0)
    last: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            last.append(syslog.recv(10_000))
    assert b"records before this one could not be written" in last[-2]
    assert last[-1].endswith(b": again")


def test_a_system_log_that_was_started_anew(syslog: socket.socket) -> None:
    log = closing(Syslog())
    syslog.close()
    Path(logs.SYSLOG).unlink()
    log.emit(record("to nobody"))
    assert log.lost == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as new:
        new.bind(logs.SYSLOG)
        log.emit(record("back"))
        assert b"1 records before this one" in new.recv(10_000)
        assert new.recv(10_000).endswith(b": back")


def test_no_system_log_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "none"))
    with pytest.raises(MountFailed, match=r"log=syslog: .*No such file.*log=stderr, or log=FILE"):
        Syslog()


# -- a file ----------------------------------------------------------------------------------------


def test_a_file_is_followed_through_rotations(tmp_path: Path) -> None:
    path = tmp_path / "dlmfs.log"
    log = closing(File(str(path)))
    log.emit(record("one"))
    path.rename(tmp_path / "dlmfs.log.1")
    log.emit(record("two"))
    assert "one" in (tmp_path / "dlmfs.log.1").read_text()
    assert "two" not in (tmp_path / "dlmfs.log.1").read_text()
    assert path.read_text().endswith(f"dlmfs[{os.getpid()}]: WARNING: two\n")
    assert path.read_text()[:2] == "20"
    assert path.stat().st_mode & 0o777 == 0o640
    os.truncate(path, 0)  # copytruncate
    log.emit(record("three"))
    assert path.read_text().count("\n") == 1


def test_what_was_put_in_its_place_meanwhile_gets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dlmfs.log"
    log = closing(File(str(path)))
    other = tmp_path / "other"
    other.touch()
    tricks: list[Callable[[], None]] = [lambda: os.link(other, path), lambda: os.mkfifo(path)]
    for trick in tricks:
        path.rename(tmp_path / "dlmfs.log.1")
        trick()
        log.emit(record("three"))
        assert "three" in (tmp_path / "dlmfs.log.1").read_text()
        path.unlink()
        (tmp_path / "dlmfs.log.1").rename(path)
    assert other.read_text() == ""


def test_files_that_are_not_this_users_alone(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    os.link(tmp_path / "other", tmp_path / "link")
    with pytest.raises(NotPermitted, match="is not a file of this user alone"):
        File(str(tmp_path / "link"))
    with pytest.raises((NotPermitted, MountFailed)):
        File("/dev/null")
    with pytest.raises(MountFailed, match="No such file"):
        File(str(tmp_path / "no" / "where"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(BadState, match="others can write"):
        File(str(tmp_path / "open" / "log"))


# -- standard error --------------------------------------------------------------------------------


@contextlib.contextmanager
def stderr() -> Iterator[int]:
    """What comes out of descriptor 2."""
    kept, (reading, writing) = os.dup(2), os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield reading
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(reading)


def test_a_full_pipe_keeps_nobody_waiting() -> None:
    log = StandardError(marked=False)
    with stderr() as said_to:
        for _ in range(200):
            log.emit(record("x" * 1000))
        assert log.lost
        os.read(said_to, 1 << 20)
        log.emit(record("again"))
        said = os.read(said_to, 1 << 20).decode()
    assert "could not be written" in said
    assert said.endswith(f"dlmfs[{os.getpid()}]: WARNING: again\n")


def test_systemd_is_told_each_thing_once(
    syslog: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It notes program and process by itself, and reads standard error and syslog, both."""
    log = StandardError(marked=True)
    with stderr() as said:
        log.emit(record("a lease", logging.ERROR))
        assert os.read(said, 1 << 20) == b"<3>a lease\n"
    info = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
    assert begun(MountOptions()) == ("syslog", [Syslog])
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    assert begun(MountOptions()) == ("syslog", [StandardError, Syslog])


def begun(options: MountOptions, *, foreground: bool = False) -> tuple[str, list[type[Log]]]:
    """Where the log goes, and through whom."""
    found: list[logging.Handler] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "basicConfig", lambda **how: found.extend(how["handlers"]))
        patch.setattr(sys, "stderr", sys.__stderr__)
        to = logs.begin(options, "/m", verbose=False, foreground=foreground)
    for each in found:
        each.close()
    return to, [type(each) for each in found]  # type: ignore[misc]


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "none"))
    file = str(tmp_path / "file")
    assert begun(MountOptions()) == ("nowhere", [StandardError])
    assert begun(MountOptions(), foreground=True) == ("stderr", [StandardError])
    assert begun(parse_options([f"log={file}"])) == (file, [StandardError, File])
    assert begun(parse_options([f"log={file}"]), foreground=True) == (file, [File])
    assert begun(parse_options(["log=stderr"])) == ("stderr", [StandardError])


@pytest.mark.parametrize("wrong", ["log=file", "log=", "log-level=loud", "log-format=xml"])
def test_what_is_no_place_level_or_format(wrong: str) -> None:
    with pytest.raises(UsageError, match="choose"):
        parse_options([wrong])


# -- JSON ------------------------------------------------------------------------------------------


def test_json_is_one_object_a_line_whatever_is_in_it() -> None:
    nasty = "a\n\x1b[0m\x00\udc80\u2028"
    line = JsonFormatter(f"/m{nasty}").format(
        record(nasty, locks=[{"lock": nasty, "mode": "EX", "pid": 7, "command": nasty}])
    )
    assert line.isascii()
    assert "\n" not in line
    told = json.loads(line)
    assert told["level"] == "warning"
    assert told["time"].endswith("Z")
    assert told["locks"][0]["pid"] == 7
    assert not any(ord(char) < 32 for char in told["message"] + told["locks"][0]["lock"])


def test_json_that_is_too_long_is_still_json() -> None:
    rows = [{"lock": "x" * 250, "mode": "EX", "pid": 7, "command": "y" * 15}] * 100
    line = JsonFormatter("/m").format(record("z" * 100_000, locks=rows))
    assert len(line) < 2000
    assert json.loads(line)["message"].startswith("zzz")
