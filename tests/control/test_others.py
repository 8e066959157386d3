"""Another user's mount neither decides what a command means nor breaks, floods, stalls or colours it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmfs import control
from dlmfs.cli.main import main
from dlmfs.client.place import find_mount, place
from dlmfs.errors import NoAnswer, Unavailable, UsageError
from tests.control.asking import STRANGER, Facts
from tests.control.others import Impostor, impostor
from tests.fs.conftest import nodes as _nodes
from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs

nodes = _nodes
pytestmark = [pytest.mark.fuse, pytest.mark.root]

Capture = pytest.CaptureFixture[str]
COLOUR = "e\x1b[31mRED\u202e\n"


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Impostor]:
    with impostor(tmp_path / COLOUR, STRANGER) as made:
        yield made


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    """A command in this process: its exit code and what it printed."""
    code = main(list(words))
    done = capsys.readouterr()
    return code, done.out, done.err


def commands(where: str) -> list[list[str]]:
    """All that ask a named mount."""
    lock = f"{where}/dom/x"
    return [
        ["status", where], ["status", "--json", where], ["top", "--once", "-d", "0", where],
        ["top", "--json", "-d", "0", where], ["info", lock], ["info", "--json", lock], ["why", lock],
        ["why", "--json", lock], ["nodes", where], ["nodes", "--json", where],
        ["value", "get", "--stale", lock], ["evict", "n", where], ["domain", "rm", "d", where],
    ]  # fmt: skip


# -- what a path means ------------------------------------------------------------------


def test_a_relative_path_means_what_it_meant(
    nodes: Nodes, theirs: Impostor, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below our only mount, though another user has one, and leads a link in this very folder to it."""
    with pytest.raises(Unavailable, match="1 of other users have to be named"):
        find_mount()
    ours = nodes.mount("a")
    assert dlmfs("lock", "jobs/backup", "--", "true").returncode == 0
    assert (ours / "jobs/backup").exists()
    os.symlink(theirs.where, nodes.folder / "jobs")
    os.symlink(f"{theirs.where}/dom", nodes.folder / "deep")
    monkeypatch.chdir(nodes.folder)
    (ours / "deep").mkdir()
    for path in ("jobs/backup", "deep/x"):
        assert place(path, near=True).mountpoint == str(ours)
        code, out, _ = run(capsys, "info", "--json", path)
        assert (code, json.loads(out)["lock"]) == (0, path.partition("/")[2])
    with pytest.raises(UsageError):
        place("deep", near=True)
    assert run(capsys, "info", "deep/x/..")[0] == 2
    assert run(capsys, "info", "./deep/../deep/x")[0] == 2
    assert theirs.asked == 0
    assert place(f"{theirs.where}/dom/x").mountpoint == theirs.where
    monkeypatch.setenv("DLMFS_MOUNT", theirs.where)
    assert find_mount().mountpoint == theirs.where


# -- without being named ------------------------------------------------------------------


def test_others_are_one_line_and_not_asked(
    theirs: Impostor, tmp_path: Path, capsys: Capture
) -> None:
    with impostor(tmp_path / "more", STRANGER + 1):
        line = f"2 mounts of other users ({STRANGER}, {STRANGER + 1}) not asked: name one to ask it"
        assert run(capsys, "status") == (1, line + "\n", "")
        code, out, _ = run(capsys, "top", "--once", "-d", "0")
        assert (code, out.splitlines()[1]) == (1, line)
        code, out, _ = run(capsys, "doctor")
        assert f"mounts: {line}" in out
        assert COLOUR not in out
        told = json.loads(run(capsys, "status", "--json")[1])
        assert [row["refused"] for row in told] == [True, True]
        assert json.loads(run(capsys, "top", "--json", "-d", "0")[1])["others"] == line
    assert theirs.asked == 0


def test_doctor_looks_whether_anothers_daemon_lives(theirs: Impostor, capsys: Capture) -> None:
    """And believes nothing: what it would advise is done as root."""
    theirs.says(b'{"ok": {"store": {"waiting_for_pid": 1}}}\n')
    _, out, _ = run(capsys, "doctor", theirs.where)
    (line,) = [line for line in out.splitlines() if "RED" in line]
    assert line.endswith(f"user {STRANGER} mounted it; its daemon (pid {os.getpid()}) lives")
    assert "kill" not in out
    assert theirs.asked == 0


# -- named ------------------------------------------------------------------


def deep(size: int) -> bytes:
    return b'{"ok": ' + b"[" * size + b"]" * size + b"}\n"


ODD: dict[str, bytes] = {
    "nothing": b"",
    "an empty line": b"\n",
    "no JSON": b"\x1b[31m\n",
    "no object": b"[]\n",
    "neither answer nor error": b"{}\n",
    "an empty answer": b'{"ok": {}}\n',
    "null": b'{"ok": null}\n',
    "deep": deep(200_000),
    "not so deep": deep(900),
    "an error without words": b'{"error": 7}\n',
    "an error of no class": b'{"error": {"class": {}, "message": []}}\n',
    "no number": b'{"ok": NaN}\n',
    "a long number": b'{"ok": ' + b"9" * 10_000 + b"}\n",
    "of another version": b'{"ok": {"version": "\\u001b[31m99"}}\n',
}


@pytest.mark.parametrize("uid", [STRANGER, 0])
def test_an_answer_that_is_none(tmp_path: Path, capsys: Capture, uid: int) -> None:
    """One line of plain words, whoever mounted it."""
    with impostor(tmp_path / COLOUR, uid) as playing:
        for kind, answer in ODD.items():
            playing.says(answer)
            for words in commands(playing.where):
                code, out, err = run(capsys, *words)
                said = out + err
                assert code in ((0, 69) if words[0] == "top" else (69,)), (kind, words, said)
                assert "internal error" not in said, (kind, words, said)
                assert "not understood" in said or "does not answer" in said, (kind, words, said)
                assert said.count("\n") <= 4, (kind, words, said)
                assert not set(said) & set("\x1b\u202e"), (kind, words, said)
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "they would speak later"


def test_no_number_passes_where_no_field_is_known(theirs: Impostor) -> None:
    """It would be printed for programs, whose JSON has no NaN."""
    theirs.says(b'{"ok": {"node": "n", "how": "left", "after_s": 1.0, "more": NaN}}\n')
    with pytest.raises(Unavailable, match="not understood"):
        control.ask(theirs.entry, {"cmd": "evict", "node": "n"})


def test_an_error_in_words_is_told_harmless(theirs: Impostor, capsys: Capture) -> None:
    told = {"class": "Unavailable", "message": "\x1b[2Jgone\ndlmfs: all is well"}
    theirs.says(json.dumps({"error": told}).encode() + b"\n")
    for words in commands(theirs.where):
        _, out, err = run(capsys, *words)
        assert "\x1b" not in out + err
        assert not any(line.startswith("dlmfs: all") for line in (out + err).splitlines())


def test_whose_word_it_is_is_said(theirs: Impostor, capsys: Capture) -> None:
    theirs.says(b'{"ok": []}\n')
    code, out, err = run(capsys, "nodes", theirs.where)
    assert (code, out) == (0, "")
    assert f"is user {STRANGER}'s mount: what is told of it is what his program says" in err


def dribbles(sock: socket.socket, _question: bytes) -> None:
    while True:
        sock.sendall(b" ")
        time.sleep(0.02)  # it plays a slow program: no event is waited for


def floods(sock: socket.socket, _question: bytes) -> None:
    while True:
        sock.sendall(b"[" * (1 << 16))


@pytest.mark.parametrize(
    ("play", "error", "says"),
    [(dribbles, NoAnswer, "does not answer"), (floods, Unavailable, "longer than 1048576 bytes")],
)
def test_an_answer_without_end(
    theirs: Impostor, play: Callable[..., None], error: type[Exception], says: str
) -> None:
    """Its whole time is bounded, and its size."""
    theirs.play = play
    with pytest.raises(error, match=says):
        control.ask(
            theirs.entry, {"cmd": "status"}, timeout_s=0.3 if play is dribbles else PATIENCE_S
        )


# -- our own ------------------------------------------------------------------


def test_a_daemon_that_answers_is_not_to_be_killed(tmp_path: Path, capsys: Capture) -> None:
    """Whatever it answers: it lives, and its locks with it. One that says nothing may be."""
    with impostor(tmp_path / "ours", 0) as ours:
        busy: Facts = {"class": "Unavailable", "message": "the daemon answers as many as it takes"}
        for answer in (json.dumps({"error": busy}).encode(), b"[]", b'{"ok": {}}'):
            ours.says(answer + b"\n")
            code, out, _ = run(capsys, "doctor", "-q", ours.where)
            assert code == 69
            assert "kill" not in out
        ours.says(b"")
        _, out, _ = run(capsys, "doctor", "-q", ours.where)
        assert f"kill {os.getpid()} if that lasts" in out


def test_a_daemon_that_lets_nobody_in_is_not_dead(tmp_path: Path, capsys: Capture) -> None:
    """Strangers have filled its queue: `umount` must not take a living mount for a dead one."""
    with impostor(tmp_path / "ours", 0) as ours:
        ours._listener.listen(0)
        crowd = []
        try:
            while True:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.setblocking(False)
                crowd.append(sock)
                try:
                    sock.connect(str(control.control_path(ours.entry)))
                except BlockingIOError:
                    break
                # It is busy with the first, which asks nothing.
                assert ours.accepted.wait(PATIENCE_S)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(control, "CONNECT_S", 0.1)
                with pytest.raises(NoAnswer):
                    control.daemon_pid(ours.entry)
                code, _, err = run(capsys, "umount", ours.where)
            assert (code, "lets nobody in" in err) == (32, True)
        finally:
            for sock in crowd:
                sock.close()
