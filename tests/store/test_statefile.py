"""Where the state may be: what is refused, and that it is left as it was."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlmfs import fstype
from dlmfs.errors import BadState, DlmfsError, NotPermitted, StoreFull, UsageError
from dlmfs.store import schema, statefile
from dlmfs.store.base import Get, KeyValue, Put, Range, Txn
from dlmfs.store.sqlite import SqliteStore
from tests.store.drivers import Client, SqliteDriver


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE theirs (x)")
    conn.close()


def _foreign_id(path: Path) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA application_id=4711")
    conn.close()


def _text(path: Path) -> None:
    path.write_text("not a database\n" * 1000)


def _short(path: Path) -> None:
    path.write_text("x\n")


def _later_version(path: Path) -> None:
    path.touch(0o600)
    schema.connect(path, volatile=True, timeout_s=10).close()
    with sqlite3.connect(path) as conn:
        conn.execute(f"PRAGMA user_version={schema.FORMAT + 1}")
    conn.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_foreign, "another program's"),
        (_foreign_id, "another program's"),
        (_text, "not a sound state file"),
        (_short, "not a sound state file"),
        (_later_version, "state format 2, this program reads format 1"),
    ],
)
def test_a_file_that_is_not_ours_stays_as_it_was(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "state.db"
    make(path)
    before = path.read_bytes()
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(BadState, match=message) as caught:
            SqliteStore(path, loop)
    finally:
        loop.close()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_damaged_state_file_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.touch(0o600)
    schema.connect(path, volatile=True, timeout_s=10).close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(BadState):
            SqliteStore(path, loop)
    finally:
        loop.close()


def test_an_empty_file_becomes_a_state(tmp_path: Path) -> None:
    """As left by a process that died between creating and filling it."""
    driver = SqliteDriver(tmp_path)
    driver.path.touch()
    try:
        Client(driver).txn(Txn((), (Put(b"a", b""),)))
    finally:
        driver.close()


def test_the_state_survives_its_users(tmp_path: Path) -> None:
    for expected in (0, 1):
        driver = SqliteDriver(tmp_path)
        try:
            client = Client(driver)
            (found,) = client.txn(Txn((), (Range(b"a"),))).responses
            assert isinstance(found, tuple)
            assert len(found) == expected
            client.txn(Txn((), (Put(b"a", b""), Put(b"l", b"", client.session.lease))))
            assert client.get(client.session.close) is None
            assert client.txn(Txn((), (Range(b"l"),))).responses == ((),)
        finally:
            driver.close()


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "x" * 65, "a b", "a\n", "ä", "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError):
        statefile.default_path(name)


@pytest.mark.parametrize("name", ["a", "x" * 64, "a.b", "-", "A_1-2."])
def test_good_names(name: str) -> None:
    assert statefile.default_path(name).name == name + ".db"


def test_the_default_path_depends_on_the_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = statefile.default_path("a")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert statefile.default_path("a") == here
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert statefile.default_path("a").parent.name == "dlmfs-4711"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert statefile.default_path("a").parent.name == "dlmfs"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "ceph", "virtiofs", "fuse.sshfs"])
def test_network_file_systems_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(fstype, "fs_type", lambda _folder: kind)
    with pytest.raises(BadState, match=kind):
        statefile.prepare(tmp_path / "x.db", default=False)
    assert os.listdir(tmp_path) == []


def test_the_file_system_is_found_by_its_mount_point(tmp_path: Path) -> None:
    assert fstype.fs_type(Path("/proc/self")) == "proc"
    assert fstype.fs_type(tmp_path / "missing") == fstype.fs_type(tmp_path)
    (tmp_path / "link").symlink_to("/proc")
    assert fstype.fs_type(tmp_path / "link") == "proc"


def test_places_that_are_no_folder_or_no_file(tmp_path: Path) -> None:
    refused: list[tuple[Path, str]] = [
        (tmp_path / "none" / "x.db", "does not exist"),
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "file" / "x.db", "is not a folder"),
    ]
    (tmp_path / "file").touch()
    for path, message in refused:
        with pytest.raises(UsageError, match=message):
            statefile.prepare(path, default=False)


@pytest.mark.parametrize("below", ["file/folder/x.db", "loop/x.db", "n" * 300 + "/x.db"])
def test_folders_that_cannot_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DlmfsError):
        statefile.prepare(tmp_path / below, default=False)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o770, 0o720, 0o702])
def test_a_default_folder_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(BadState, match="only this user"):
        statefile.prepare(folder / "x.db", default=True)
    with pytest.raises(BadState, match=f"others can write {folder}.*chmod go-w {folder}"):
        statefile.prepare(folder / "x.db", default=False)
    assert os.listdir(folder) == []


def test_the_default_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    statefile.prepare(folder / "x.db", default=True)
    assert folder.stat().st_mode & 0o022 == 0


def test_a_read_only_file_system_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(NotPermitted, match="no permission to write"):
        statefile.prepare(tmp_path / "x.db", default=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one megabyte."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_takes_nothing_and_recovers(tiny: Path) -> None:
    ballast = tiny / "ballast"
    ballast.write_bytes(bytes(400_000))
    driver = SqliteDriver(tiny)
    try:
        client = Client(driver)
        assert client.store.describe()["filesystem"] == "tmpfs"
        before = client.txn(Txn((), (Put(b"a", b"1"),))).revision
        large = Txn((), (Put(b"a", b"2"), Put(b"big", bytes(700_000))))
        assert isinstance(client.fails(large), StoreFull)
        (kv,) = client.txn(Txn((), (Get(b"a"),))).responses
        assert kv == KeyValue(b"a", b"1", before, before)
        assert client.txn(Txn((), (Range(b"big"),))).revision == before
        assert client.lost == []
        ballast.unlink()
        assert client.txn(Txn((), (Put(b"a", b"3"),))).revision == before + 1
    finally:
        driver.close()


@pytest.mark.root
def test_no_space_for_a_new_state(tiny: Path) -> None:
    with open(tiny / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, os.statvfs(tiny).f_bavail * 4096)
    assert os.statvfs(tiny).f_bavail == 0
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(StoreFull):
            SqliteStore(tiny / "state.db", loop)
    finally:
        loop.close()
