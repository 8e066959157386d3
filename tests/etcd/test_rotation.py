"""Passwords and certificates that are changed under running nodes: half of the way, late, by others."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from dlmfs.config import parse_options, parse_source
from dlmfs.errors import NotPermitted, UsageError
from dlmfs.store.etcd.access import access
from dlmfs.store.etcd.files import Files
from dlmfs.store.etcd.rpc import Access
from tests.etcd.mounts import EtcdNodes, errno_of, put, take, trylock, value
from tests.etcd.server import loopback
from tests.etcd.test_access import PASSWORD, Certificates, Start, with_users
from tests.etcd.test_access import credentials as file_of
from tests.etcd.test_secrets import STRANGER, needs_root
from tests.fs.nodes import dlmfs

OTHER: Final = "another-one"
pytestmark = pytest.mark.allow_warnings
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the program openssl"
)


def rewrite(option: str, text: str) -> None:
    """As an editor does: another file in its place."""
    path = Path(option.partition("=")[2])
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text(text)
    new.replace(path)


def fences(nodes: EtcdNodes) -> list[int]:
    return [nodes.fences(where) for where in nodes.daemons]


# -- passwords ----------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_password_is_changed_and_nobody_notices(folder: Path, start: Start) -> None:
    """On the server first, and in the file first; the server forgets all tokens meanwhile."""
    nodes = start()
    etcd = nodes.etcd
    with_users(etcd)
    option = file_of(folder, "dlm")
    a, b = nodes.pair(option, "ttl=15")
    put(a / "dom/x", b"one")
    fd = os.open(a / "dom/held", os.O_RDWR | os.O_CREAT)
    etcd.passwd("dlm", OTHER)
    rewrite(option, f"dlm:{OTHER}\n")
    put(b / "dom/x", b"two")
    rewrite(option, "dlm:third\n")
    etcd.restart(etcd.members[0])
    put(a / "dom/x", b"three")
    etcd.passwd("dlm", "third")
    put(b / "dom/x", b"four")
    assert value(a / "dom/x") == b"four"
    assert os.pwrite(fd, b"held", 0) == 4
    os.close(fd)
    assert fences(nodes) == [0, 0]


@pytest.mark.fuse
def test_who_has_the_wrong_password_is_back_with_the_right_one(folder: Path, start: Start) -> None:
    nodes = start()
    etcd = nodes.etcd
    with_users(etcd)
    option = file_of(folder, "dlm")
    a = nodes.mount("a", option)
    (a / "dom").mkdir()
    put(a / "dom/x", b"before")
    etcd.passwd("dlm", OTHER)
    nodes.until_told(a, "REJOINING")
    nodes.until_told(a, "does not know this user and password")
    assert "does not know this user and password" in nodes.reason(a)
    rewrite(option, "dlm")  # half of it
    nodes.until_told(a, "its first line must be user:password; what was read before stays in use")
    said = dlmfs("status", str(a), check=False).stdout
    assert "its first line must be user:password" in said
    assert "does not know this user and password" in said
    found = dlmfs("doctor", str(a), check=False).stdout
    assert "mend credentials=" in found
    assert "it is read again by itself" in found
    rewrite(option, f"dlm:{OTHER}\n")
    take(a / "dom/x")
    assert value(a / "dom/x") == b"before"
    status = nodes.status(a)
    assert status["lease"]["reason"] is None
    assert status["store"]["trouble"] is None
    assert status["store"]["files"] is None
    assert PASSWORD not in str(status)
    assert OTHER not in str(status)


@pytest.mark.fuse
def test_who_has_no_user_is_told_when_the_cluster_asks_for_one(start: Start) -> None:
    nodes = start()
    a = nodes.mount("a")
    (a / "dom").mkdir()
    put(a / "dom/x", b"before")
    with_users(nodes.etcd)
    nodes.until_told(a, "REJOINING")
    nodes.until_told(a, "wants a user and a password: give -o credentials=FILE")
    assert "wants a user and a password" in nodes.reason(a)
    nodes.etcd.ctl("auth", "disable")
    take(a / "dom/x")
    assert value(a / "dom/x") == b"before"


# -- certificates -------------------------------------------------------------------------------------


@needs_openssl
@pytest.mark.fuse
def test_everybodys_certificates_are_renewed(folder: Path, start: Start) -> None:
    """By another authority, while nothing but the connection goes on with the old ones."""
    old, new = Certificates(folder, "old"), Certificates(folder, "new")
    host = loopback()
    nodes = start(old.etcd(folder, host))
    new.sign("server", host)
    new.sign("client", host)
    mine = {option: folder / option for option in ("ca", "cert", "key")}
    place(old, mine)
    a, b = nodes.pair(*(f"{option}={path}" for option, path in mine.items()), "ttl=15")
    fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"sealed", 0)
    waiter = nodes.queue(b / "dom/x")
    place(new, mine)
    for name in ("server.crt", "server.key", "ca.crt", "client.crt", "client.key"):
        shutil.copy(new.path(name), old.path(name))  # where the server and etcdctl look
    nodes.etcd.restart(nodes.etcd.members[0])
    assert os.pread(fd, 6, 0) == b"sealed"
    os.close(fd)
    assert waiter.wait() == "held"
    waiter.release()
    assert trylock(a / "dom/x") == 0
    assert fences(nodes) == [0, 0]
    for where in (a, b):
        nodes.umount(where)


def place(signed: Certificates, mine: dict[str, Path]) -> None:
    """Put certificates where the mount looks. What is no secret may be somebody else's, and closed:
    root's daemon can read it as it could when it began."""
    for option, name in (("key", "client.key"), ("cert", "client.crt"), ("ca", "ca.crt")):
        new = mine[option].with_suffix(".new")
        shutil.copy(signed.path(name), new)
        new.chmod(0o600)
        if option != "key" and os.geteuid() == 0:
            os.chown(new, STRANGER, -1)
        new.replace(mine[option])


@needs_openssl
@pytest.mark.fuse
def test_a_refused_certificate_is_told_and_mended(folder: Path, start: Start) -> None:
    old, new = Certificates(folder, "old"), Certificates(folder, "new")
    host = loopback()
    nodes = start(old.etcd(folder, host))
    new.sign("client", host)
    mine = {option: folder / option for option in ("ca", "cert", "key")}
    place(old, mine)
    a = nodes.mount("a", *(f"{option}={path}" for option, path in mine.items()))
    (a / "dom").mkdir()
    shutil.copy(new.path("ca.crt"), folder / "clients")
    for member in nodes.etcd.members:
        member.options = {**member.options, "trusted-ca-file": str(folder / "clients")}
    files = {"cacert": "ca.crt", "cert": "client.crt", "key": "client.key"}
    authority = {"cacert": old.path("ca.crt")}
    nodes.etcd.control = [
        word
        for option, name in files.items()
        for word in (f"--{option}", authority.get(option, new.path(name)))
    ]
    nodes.etcd.restart(nodes.etcd.members[0])
    nodes.until_told(a, "it refuses this node's certificate (bad certificate)")
    nodes.until_told(a, "'state': 'REJOINING'")
    assert "it refuses this node's certificate" in nodes.reason(a)
    shutil.copy(new.path("client.crt"), mine["cert"])
    nodes.until_told(a, "do not belong together")
    shutil.copy(new.path("client.key"), mine["key"])
    mine["key"].chmod(0o600)
    take(a / "dom/x")
    assert errno_of(a / "dom/y") == 0


# -- files ----------------------------------------------------------------------------------------------


class Given:
    """Files of a mount, and what is read of them again."""

    def __init__(self, folder: Path) -> None:
        self.ours = Certificates(folder, "ours")
        self.ours.sign("client", "127.0.0.1")
        self.folder = folder / "given"
        self.folder.mkdir(mode=0o755)
        self.paths = {option: self.folder / option for option in ("ca", "cert", "key")}
        place(self.ours, self.paths)
        self.secret = self.folder / "secret"
        self.secret.touch(0o600)
        self.secret.write_text("user:password\n")
        self.paths["credentials"] = self.secret

    def read(self, *, again: bool = True) -> Access:
        options = [f"{option}={path}" for option, path in self.paths.items()]
        source = parse_source("etcd://h/c")
        return access(source, parse_options(options), again=again)  # type: ignore[arg-type]

    def watched(self, test: Callable[[Files], None], rounds: int = 1) -> Files:
        """Look at them after each of what `test` does to them."""

        async def main() -> Files:
            files = Files(asyncio.get_running_loop(), self.read(again=False), self.read)
            for _ in range(rounds):
                test(files)
                await files.look()
            return files

        return asyncio.run(main())


@pytest.fixture
def files(folder: Path) -> Given:
    return Given(folder)


@needs_openssl
def test_what_is_half_written_is_read_later(files: Given) -> None:
    whole = {option: path.read_bytes() for option, path in files.paths.items()}
    good = files.read()
    assert good.password == "password"
    for option, path in files.paths.items():
        for part in (0, 1, len(whole[option]) // 2, len(whole[option]) - 20):
            if option == "credentials" and part > 5:
                continue  # a shorter password is one, too
            text = whole[option][: max(part, 0)]
            told = files.watched(lambda _, path=path, text=text: path.write_bytes(text))  # type: ignore[misc]
            path.write_bytes(whole[option])
            assert told.access == good, (option, part)
            assert told.trouble is not None
            assert "what was read before stays in use" in told.trouble
            assert option in told.trouble


@needs_openssl
def test_what_is_whole_again_is_used(files: Given) -> None:
    texts = iter(["", "user:other\n"])
    told = files.watched(lambda _: rewrite(f"x={files.secret}", next(texts)), rounds=2)
    assert told.access.password == "other"
    assert told.trouble is None


@needs_openssl
def test_files_that_are_mounted_into_a_container_are_followed(files: Given) -> None:
    """As Kubernetes changes them: links to links, in a folder that all may write, with the sticky bit."""
    volume = files.folder.parent / "volume"
    volume.mkdir()
    volume.chmod(0o1777)
    for name, password in (("..1", "password"), ("..2", "other")):
        (volume / name).mkdir()
        secret = volume / name / "secret"
        secret.touch(0o600)
        secret.write_text(f"user:{password}\n")
    (volume / "..data").symlink_to("..1")
    (volume / "secret").symlink_to("..data/secret")
    files.paths["credentials"] = volume / "secret"

    def change(_: Files) -> None:
        (volume / "..new").symlink_to("..2")
        (volume / "..new").replace(volume / "..data")

    told = files.watched(change)
    assert told.trouble is None
    assert told.access.password == "other"


def _folders_owner(files: Given) -> None:
    os.chown(files.folder, STRANGER, -1)


def _folders_mode(files: Given) -> None:
    files.folder.chmod(0o777)


def _owner(files: Given) -> None:
    os.chown(files.secret, STRANGER, -1)


def _mode(files: Given) -> None:
    files.secret.chmod(0o644)


def _link(files: Given) -> None:
    """A stranger's link in a folder like /tmp leads to a file of root's."""
    place = files.folder.parent / "tmp"
    place.mkdir()
    place.chmod(0o1777)
    link = place / "secret"
    link.symlink_to(files.secret)
    os.lchown(link, STRANGER, -1)
    files.paths["credentials"] = link


@needs_root
@needs_openssl
@pytest.mark.parametrize("change", [_folders_owner, _folders_mode, _owner, _mode, _link])
def test_root_reads_nothing_again_that_another_could_have_put_there(
    files: Given, change: Callable[[Given], None]
) -> None:
    change(files)
    files.secret.write_text("user:other\n")
    with pytest.raises((NotPermitted, UsageError), match="credentials="):
        files.read()


@needs_openssl
def test_a_file_system_that_stands_still_stops_nobody(
    files: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlmfs.store.etcd.files.PATIENCE_S", 0.01)
    stuck = threading.Event()
    readers: list[int] = []
    good = files.read()

    def read() -> Access:
        readers.append(threading.get_ident())
        assert stuck.wait(60)
        return files.read()

    async def main() -> None:
        made = Files(asyncio.get_running_loop(), good, read)
        await made.look()
        assert made.access is good
        assert "it takes too long" in str(made.trouble)
        await made.look()
        assert len(readers) == 1, "one thread is enough to wait there"
        monkeypatch.setattr("dlmfs.store.etcd.files.PATIENCE_S", 60.0)
        rewrite(f"x={files.secret}", "user:other\n")
        stuck.set()
        await made.look()
        assert made.access.password == "other"
        assert made.trouble is None

    asyncio.run(main())
