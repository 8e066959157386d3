"""Ways that somebody else could change while we go them; and what he could put there."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs import folders
from dlmfs.errors import BadState, NotPermitted
from dlmfs.store import statefile
from dlmfs.store.sqlite import SqliteStore
from tests.fs.nodes import ROOT
from tests.store.drivers import Client, SqliteDriver

OTHER = 54321


def is_refused(path: Path) -> str:
    """Why the place is not trusted."""
    with pytest.raises(BadState) as caught:
        os.close(folders.walk(str(path)).fd)
    return str(caught.value)


def leads_to(path: Path) -> tuple[str, str]:
    found = folders.walk(str(path))
    try:
        assert os.path.samestat(os.fstat(found.fd), os.stat(found.folder))
    finally:
        os.close(found.fd)
    return found.folder, found.name


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """As /tmp is."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def test_links_and_steps_back_lead_to_the_real_place(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "far").symlink_to(tmp_path / "link/deep")
    (tmp_path / "file").symlink_to("far/../state.db")
    for path in ("real/state.db", "link/state.db", "far/../state.db", "file", "real/./state.db"):
        assert leads_to(tmp_path / path) == (str(tmp_path / "real"), "state.db")
    with pytest.raises(FileNotFoundError):
        leads_to(tmp_path / "real/none/../state.db")
    assert leads_to(tmp_path / "far/..") == (str(tmp_path / "real"), "")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        leads_to(tmp_path / "loop/x")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o770, 0o720, 0o702, 0o1777, 0o3770])
def test_who_may_write_the_folder_may_put_anything_there(tmp_path: Path, mode: int) -> None:
    """With the sticky bit too: SQLite's own files would lie beside the state, whoever made them first."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    assert f"others can write {folder} " in is_refused(folder / "state.db")
    if not mode & stat.S_ISVTX:
        (folder / "mine").mkdir(mode=0o700)
        assert f"others can write {folder} " in is_refused(folder / "mine/state.db")


def test_a_folder_of_ones_own_in_one_of_everybodys(shared: Path) -> None:
    (shared / "mine").mkdir(mode=0o700)
    assert leads_to(shared / "mine/state.db") == (str(shared / "mine"), "state.db")


@pytest.mark.root
def test_root_goes_through_nobody_elses_folder(tmp_path: Path, shared: Path) -> None:
    """Nor by a link of somebody else's, from wherever it may be."""
    theirs, target = shared / "theirs", tmp_path / "target"
    for folder in (theirs, target, theirs / "roots"):
        folder.mkdir(mode=0o700)
    os.chown(theirs, OTHER, OTHER)
    says = f"{theirs} belongs to another user \\(uid {OTHER}\\)"
    for path in (theirs / "state.db", theirs / "roots/state.db", theirs):
        with pytest.raises(BadState, match=says if path != theirs else ".*"):
            statefile.prepare(path / "x" if path == theirs else path, default=False)
    link = shared / "link"
    link.symlink_to(target)
    os.lchown(link, OTHER, OTHER)
    assert f"{link} belongs to another user" in is_refused(link / "state.db")
    assert os.listdir(target) == []


@pytest.mark.root
def test_a_state_file_that_is_somebodys_link_is_not_made(tmp_path: Path, shared: Path) -> None:
    for number, folder in enumerate((shared, tmp_path)):
        link, target = folder / "state.db", tmp_path / f"target{number}"
        link.symlink_to(target)
        os.lchown(link, OTHER, OTHER)
        loop = asyncio.new_event_loop()
        with pytest.raises(BadState, match="belongs to another user"):
            SqliteStore(link, loop)
        loop.close()
        assert not target.exists()


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_link_in_place_of_sqlites_own_files(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "target"
    (tmp_path / f"state.db{suffix}").symlink_to(target)
    loop = asyncio.new_event_loop()
    with pytest.raises(BadState, match="is a link"):
        SqliteStore(tmp_path / "state.db", loop)
    loop.close()
    assert not target.exists()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def closed_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_all_of_a_state_is_its_users_alone(tmp_path: Path, open_umask: None) -> None:
    """Whatever the umask is, and whatever a file of before was."""
    assert open_umask is None
    folder = tmp_path / "before"
    folder.mkdir(mode=0o700)
    for name in ("state.db", "state.db-wal"):
        (folder / name).touch(mode=0o666)
    for place in (folder, tmp_path):
        driver = SqliteDriver(place)
        try:
            Client(driver)
            modes = {
                path.name: stat.S_IMODE(path.lstat().st_mode)
                for path in (*place.glob("state.db*"), *place.glob("state.db.d/*"))
            }
            assert modes.pop("state.db.d") == 0o700
            assert len(modes) == 5
            assert set(modes.values()) == {0o600}, modes
        finally:
            driver.close()


def test_a_socket_that_is_swapped_for_a_link_changes_no_other_files_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and whatever is done to it next."""
    victim = tmp_path / "shadow"
    victim.touch(mode=0o600)
    bind = socket.socket.bind

    def swapped(self: socket.socket, address: str) -> None:
        bind(self, address)
        os.unlink(address)
        os.symlink(victim, address)

    monkeypatch.setattr(socket.socket, "bind", swapped)
    driver = SqliteDriver(tmp_path)
    try:
        Client(driver)
        assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    finally:
        driver.close()
    assert victim.exists()


def test_a_folder_that_is_swapped_for_a_link_is_left_alone(tmp_path: Path) -> None:
    """The sessions' files are made where the state was looked at, or nowhere."""
    here, victim = tmp_path / "here", tmp_path / "victim"
    for folder in (here, victim):
        folder.mkdir(mode=0o700)
    place = statefile.prepare(here / "state.db", default=False)
    here.rename(tmp_path / "gone")
    here.symlink_to(victim)
    statefile.secure(place)
    os.close(folders.make(place.folder, f"{place.path}.d", 0o700))
    os.close(place.folder)
    assert os.listdir(victim) == []
    assert sorted(os.listdir(tmp_path / "gone")) == ["state.db", "state.db.d"]


@pytest.mark.root
def test_set_mode_follows_no_link_and_touches_nothing_of_others(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch(mode=0o600)
    (tmp_path / "link").symlink_to(victim)
    folder = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(NotPermitted):
            folders.set_mode(folder, "link", 0o666)
        os.chown(victim, OTHER, OTHER)
        with pytest.raises(NotPermitted):
            folders.set_mode(folder, "victim", 0o666)
    finally:
        os.close(folder)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


def test_modes_and_owners_are_changed_in_one_place_only() -> None:
    """chmod(2) and chown(2) follow links, and whoever can write the folder can put one there."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in (ROOT / "src/dlmfs").rglob("*.py")
        if path.name != "folders.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("chmod", "chown", "lchown", "lchmod")
    ]
    assert found == []


# -- a user's folder where everybody may make folders -----------------------------------------------


def settled(shared: Path) -> Path:
    return Path(folders.settle(str(shared / "dlmfs-1"), 0o700))


def test_a_users_folder_is_the_same_for_all_his_processes(shared: Path) -> None:
    first = settled(shared)
    assert first == shared / "dlmfs-1"
    assert [settled(shared) for _ in range(2)] == [first] * 2
    assert folders.owned(str(first), os.geteuid()) == [str(first)]
    assert folders.owned(str(first), OTHER) == []


@pytest.mark.parametrize("taken", [False, True])
def test_what_is_for_all_can_be_reached_by_all_whatever_the_umask(
    shared: Path, closed_umask: None, taken: bool
) -> None:
    """From a root shell that hides what it makes, the deadline and the socket were hidden from users."""
    assert closed_umask is None
    if taken:
        (shared / "dlmfs").touch()
    own = Path(folders.settle(str(shared / "dlmfs"), 0o755))
    assert (own.name == "dlmfs") is not taken
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (own, own / folders.CONTROL)]
    assert modes == [0o755, 0o755]


@pytest.mark.root
@pytest.mark.parametrize("what", ["folder", "link", "file"])
def test_what_others_made_first_stops_nobody(shared: Path, what: str) -> None:
    """Nor does it change anything for who has settled when it goes."""
    theirs = shared / "dlmfs-1"
    match what:
        case "folder":
            theirs.mkdir()
        case "link":
            theirs.symlink_to("/etc")
        case "file":
            theirs.touch()
    os.lchown(theirs, OTHER, OTHER)
    first = settled(shared)
    assert first != theirs
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    theirs.rename(shared / "gone")
    assert settled(shared) == first
    assert folders.owned(str(theirs), os.geteuid()) == [str(first)]


SETTLE = """
import sys
sys.path.insert(0, sys.argv[1])
from dlmfs import folders
print("ready", flush=True)
sys.stdin.readline()
print(folders.settle(sys.argv[2], 0o700))
"""


@pytest.mark.root
def test_processes_that_begin_at_once_meet_whatever_others_do(shared: Path) -> None:
    """Another user makes and removes the folder's name all the time, to part them."""
    path = shared / "dlmfs-1"
    for _ in range(3):
        command = [sys.executable, "-I", "-c", SETTLE, str(ROOT / "src"), str(path)]
        children = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(6)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        folder = os.open(shared, os.O_PATH)
        os.seteuid(OTHER)  # made as root and given away, it would be ours for a moment
        try:
            while any(child.poll() is None for child in children):
                with contextlib.suppress(OSError):
                    os.mkdir(path.name, dir_fd=folder)
                    os.rmdir(path.name, dir_fd=folder)
        finally:
            os.seteuid(0)
            os.close(folder)
        found = {child.communicate()[0] for child in children}
        assert len(found) == 1, found
        shutil.rmtree(found.pop().strip())
