"""Where a user's daemons keep what must outlive his sessions, and what is said where that cannot be."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from dlmfs import folders, fstype, home, rundir
from dlmfs.errors import BadState
from dlmfs.store import highwater, statefile
from dlmfs.store.sqlite import SqliteStore

UID = 4711
BOB = "bob"


class Passwd(NamedTuple):
    pw_name: str
    pw_uid: int
    pw_gid: int
    pw_dir: str


class Group(NamedTuple):
    gr_name: str
    gr_mem: list[str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user, who this process is then."""
    where = tmp_path / "home"
    where.mkdir()
    os.chown(where, UID, UID)
    line = Passwd(BOB, UID, UID, str(where))

    def known(uid: int) -> Passwd:
        return {UID: line}[uid]

    monkeypatch.setattr(pwd, "getpwuid", known)
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: Group(BOB, []))
    monkeypatch.setattr(os, "getuid", lambda: UID)
    monkeypatch.setattr(os, "geteuid", lambda: UID)
    monkeypatch.setattr(home, "LENGTH_MAX", 4096)  # the tests' own folder has a long path
    return where


pytestmark = pytest.mark.root


def own(*paths: Path) -> None:
    for path in paths:
        os.chown(path, UID, UID)


def made(place: Path) -> Path:
    """The folder of this boot."""
    at = home.of_this_boot(UID)
    assert at.why is None
    above = place
    for part in Path(at.folder).relative_to(place).parts:
        above /= part
        above.mkdir(mode=0o700)
        own(above)
    return above


def test_it_follows_from_the_list_of_users(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    at = home.of_this_boot(UID)
    assert at.why is None
    assert at.folder.startswith(f"{place}/.local/state/dlmfs/boot-")
    assert statefile.default_path("a") == Path(at.folder, "a.db")
    assert rundir.places(UID)[0] == f"{at.folder}/ctl"
    assert highwater.of_user().folder == Path(at.folder).parent
    assert os.listdir(place) == []


def test_each_boot_has_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of before a reboot is not taken for one of now, and does not stay for ever; the mark of
    the tokens does."""
    here = made(place)
    (here / "a.db").touch()
    (here.parent / "tokens.db").touch()
    monkeypatch.setattr(home, "_boot", lambda: "boot-of-the-next")
    assert statefile.default_path("a") == here.parent / "boot-of-the-next" / "a.db"
    next_one = made_again(here)
    home.make(str(next_one))
    assert sorted(os.listdir(here.parent)) == ["boot-of-the-next", "tokens.db"]


def made_again(here: Path) -> Path:
    next_one = Path(home.of_this_boot(UID).folder)
    next_one.mkdir(mode=0o700)
    own(next_one)
    return next_one


def test_a_kernel_that_does_not_say_which_boot_it_is(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.is_dir()
    monkeypatch.setattr(home, "_boot", lambda: "")
    assert home.of_this_boot(UID).why is not None
    assert not home.is_of_this_boot(Path("/x/.local/state/dlmfs/"))


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "9p", "virtiofs"])
def test_a_home_that_others_have_too(
    place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.is_dir()
    monkeypatch.setattr(fstype, "fs_type", lambda _folder: kind)
    assert f"network or FUSE file system ({kind})" in (home.of_this_boot(UID).why or "")
    assert statefile.default_path("a").parent.name == f"dlmfs-{UID}"


def test_homes_that_cannot_be_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(place, UID + 1, UID)
    assert "cannot be written" in (home.of_this_boot(UID).why or "")
    own(place)
    place.chmod(0o777)
    assert "others can write" in (home.of_this_boot(UID).why or "")
    place.rmdir()
    assert home.of_this_boot(UID).why == f"the home {place} is not there"
    monkeypatch.setattr(home, "folder_of", lambda _uid: f"/{'x' * 4096}/{home.BELOW}")
    assert "too long a path" in (home.of_this_boot(UID).why or "")
    monkeypatch.setattr(home, "folder_of", lambda _uid: None)
    assert home.of_this_boot(UID).why == "this user has no home"


def test_the_longest_path_is_one_of_a_socket() -> None:
    """struct sockaddr_un has room for 107 bytes (unix(7))."""
    longest = "x" * home.LENGTH_MAX + "/ctl/" + rundir.name("4095:1048575", "sock")
    assert len(longest) <= 107


def test_a_users_private_group_is_nobody_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where users have umask 002, as on Debian, their folders are like that."""
    place.chmod(0o775)
    os.close(folders.enter(str(place)))
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: Group(BOB, [BOB]))
    os.close(folders.enter(str(place)))
    for others in (Group(BOB, ["eve"]), Group("staff", [])):
        monkeypatch.setattr(grp, "getgrgid", lambda _gid, others=others: others)
        with pytest.raises(BadState, match="others can write"):
            folders.enter(str(place))
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: Group(BOB, []))
    os.chown(place, UID, UID + 1)
    with pytest.raises(BadState, match="others can write"):
        folders.enter(str(place))
    own(place)
    place.chmod(0o777)
    with pytest.raises(BadState, match="others can write"):
        folders.enter(str(place))


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """What the kernel keeps as system.posix_acl_access: tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_who_is_in_an_access_control_list_is_somebody_else(place: Path) -> None:
    none, eve = 0xFFFFFFFF, 54321
    listed = access_list(
        (0x01, 7, none), (0x02, 7, eve), (0x04, 0, none), (0x10, 7, none), (0x20, 5, none)
    )
    try:
        os.setxattr(place, "system.posix_acl_access", listed)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    assert place.stat().st_mode & 0o020
    with pytest.raises(BadState, match="others can write"):
        folders.enter(str(place))


async def _synchronous(path: Path) -> int:
    store = SqliteStore(path, asyncio.get_running_loop())
    try:
        (value,) = store._worker.fast.execute("PRAGMA synchronous").fetchone()
        return int(value)
    finally:
        store.close()


def test_what_is_over_with_the_boot_need_not_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fstype, "fs_type", lambda _folder: "ext4")
    here = tmp_path / home.BELOW / home._boot()
    here.mkdir(parents=True, mode=0o700)
    assert asyncio.run(_synchronous(here / "a.db")) == 0
    assert asyncio.run(_synchronous(here.parent / "a.db")) == 2


class Logout(NamedTuple):
    """Somebody whose home is not there, unless it is `fit`."""

    uid: int = UID
    logind: bool = True
    conf: str = ""
    lingers: bool = False
    fit: bool = False


@pytest.mark.parametrize(
    ("what", "loses"),
    [
        (Logout(), True),
        (Logout(fit=True), False),
        (Logout(lingers=True), False),
        (Logout(logind=False), False),
        (Logout(uid=999), False),
        (Logout(conf="#RemoveIPC=no\n"), True),
        (Logout(conf="[Login]\nRemoveIPC=no\n"), False),
        (Logout(conf="RemoveIPC=no\nRemoveIPC = yes\n"), True),
    ],
)
def test_who_would_lose_what_he_has_at_logout_is_told(
    place: Path, tmp_path: Path, what: Logout, loses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not what.fit:
        place.rmdir()
    for name in ("seats", "linger", "logind.conf.d"):
        (tmp_path / name).mkdir()
    (tmp_path / "logind.conf.d" / "own.conf").write_text(what.conf)
    if what.lingers:
        (tmp_path / "linger" / BOB).touch()
    monkeypatch.setattr(home, "LOGIND", str(tmp_path / ("seats" if what.logind else "none")))
    monkeypatch.setattr(home, "LINGER", str(tmp_path / "linger"))
    monkeypatch.setattr(home, "CONF", str(tmp_path / "logind.conf"))
    lost = home.lost_at_logout(what.uid)
    assert (lost is not None) is loses
    if lost is not None:
        assert f"since the home {place} is not there" in lost[0]
        assert "enable-linger" in lost[1]
