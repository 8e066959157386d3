"""Passwords and keys: whose file they may be in, and whom they are told."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dlmfs.config import parse_options, parse_source
from dlmfs.errors import DlmfsError, NotPermitted, UsageError
from dlmfs.store.etcd.access import access, credentials, is_here
from dlmfs.store.etcd.rpc import Access
from tests.etcd.mounts import EtcdNodes, put, value
from tests.etcd.server import loopback
from tests.etcd.test_access import PASSWORD, Certificates, Start, try_mount, with_users
from tests.etcd.test_access import credentials as file_of
from tests.fs.nodes import dlmfs

STRANGER: Final = 2001
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")


def what(source: str, *options: str) -> Access:
    parsed = parse_source(source)
    return access(parsed, parse_options(list(options)))  # type: ignore[arg-type]


# -- whom they are told -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "here"),
    [
        *(("127.0.0.1:2379", True), ("127.9.8.7:1", True), ("[::1]:2379", True)),
        *(("[::ffff:127.0.0.1]:2379", True), ("10.0.0.1:2379", False), ("[fe80::1]:2379", False)),
        *(
            ("127.0.0.1.example.org:2379", False),
            ("127.example:2379", False),
            ("0.0.0.0:2379", False),
        ),
        *(("etcd.example:2379", False), ("[::]:2379", False), ("127.1:2379", False)),
    ],
)
def test_what_is_here(endpoint: str, here: bool) -> None:
    assert is_here(endpoint) is here


def test_localhost_is_here_if_it_resolves_to_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(*addresses: str) -> bool:
        found = [(0, 0, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        return is_here("localhost:2379")

    assert resolved("127.0.0.1", "::1")
    assert not resolved("127.0.0.1", "10.0.0.1")
    monkeypatch.undo()
    assert not is_here("localhost.example:2379")


@pytest.mark.parametrize(
    "source", ["etcd://10.1.2.3:2379/c", "etcd://127.0.0.1:2379,10.1.2.3:2379/c", "etcd://h/c"]
)
def test_a_password_is_not_sent_in_clear_text(folder: Path, source: str) -> None:
    option = file_of(folder, "dlm")
    with pytest.raises(UsageError, match=r"clear text.*ca=FILE, or insecure-password") as caught:
        what(source, option)
    assert PASSWORD not in str(caught.value)
    assert what(source, option, "insecure-password").password == PASSWORD
    assert what("etcd://127.0.0.1:2379,[::1]:2379/c", option).password == PASSWORD
    authority = Certificates(folder, "ours").path("ca.crt")
    assert what(source, option, f"ca={authority}").password == PASSWORD


def test_a_mount_and_doctor_say_so_before_anything_is_sent(folder: Path) -> None:
    option = file_of(folder, "dlm")
    done = try_mount(folder, "etcd://10.1.2.3:2379/c", option)
    assert done.returncode == 1
    assert "insecure-password" in done.stderr
    assert "10.1.2.3:2379" in done.stderr
    looked = dlmfs("doctor", "etcd://10.1.2.3:2379/c", "-o", option, check=False)
    assert "insecure-password" in looked.stdout
    assert PASSWORD not in looked.stdout + looked.stderr


PROXIES: Final = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "GRPC_PROXY_EXP")


@contextlib.contextmanager
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """An address, and what came to it."""
    got: list[bytes] = []
    with socket.create_server((loopback(), 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    came, _ = server.accept()
                    with came:
                        came.settimeout(5)
                        got.append(came.recv(4096))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host, port = server.getsockname()
        try:
            yield f"http://{host}:{port}", got
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.fuse
def test_no_proxy_of_the_environment_is_told_anything(
    nodes: EtcdNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listener() as (address, got):
        for name in PROXIES:
            monkeypatch.setenv(name, address)
            monkeypatch.setenv(name.upper(), address)
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        where = nodes.mount("a")
        (where / "dom").mkdir()
        put(where / "dom/x", b"direct")
        assert value(where / "dom/x") == b"direct"
        done = dlmfs("doctor", nodes.etcd.source(nodes.cluster), check=False)
        assert "failures: 0" in done.stdout
    assert not got


@pytest.mark.fuse
def test_users_may_be_known_before_they_are_asked_for(folder: Path, start: Start) -> None:
    """First the nodes get their credentials, one by one; then the cluster begins to want them."""
    nodes = start()
    option = file_of(folder, "dlm")
    a, b = nodes.pair(option, "ttl=15")
    put(a / "dom/x", b"anybody")
    store = nodes.status(a)["store"]
    assert (store["user"], store["user_asked_for"]) == ("dlm", False)
    assert "etcd does not ask for users" in dlmfs("status", str(a)).stdout
    with_users(nodes.etcd)
    assert value(b / "dom/x") == b"anybody"
    put(b / "dom/x", b"known")
    assert value(a / "dom/x") == b"known"
    assert nodes.status(a)["store"]["user_asked_for"] is True
    assert [nodes.fences(where) for where in (a, b)] == [0, 0]


# -- whose files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "mode", "good"),
    [
        *((0, 0o600, True), (0, 0o400, True), (0, 0o640, True), (0, 0o440, True)),
        *((0, 0o644, False), (0, 0o660, False), (0, 0o604, False), (0, 0o650, False)),
        *((STRANGER, 0o600, False), (STRANGER, 0o400, False)),
    ],
)
@needs_root
def test_a_secret_is_root_s_or_one_s_own(folder: Path, uid: int, mode: int, good: bool) -> None:
    ours = Certificates(folder, "ours")
    ours.sign("client", "127.0.0.1")
    path = folder / "secret"
    path.write_text("user:password\n")
    key = Path(ours.path("client.key"))
    for secret in (path, key):
        secret.chmod(mode)
        os.chown(secret, uid, -1)
    refused = contextlib.nullcontext() if good else pytest.raises(NotPermitted, match=str(path))
    with refused:
        assert credentials(str(path)) == ("user", "password")
    files = [f"ca={ours.path('ca.crt')}", f"cert={ours.path('client.crt')}"]
    refused = contextlib.nullcontext() if good else pytest.raises(NotPermitted, match="key=")
    with refused:
        assert what("etcd://h/c", *files, f"key={key}").key == key.read_bytes()


@needs_root
def test_an_ordinary_user_s_file_is_his_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0640 is for root's files only."""
    path = folder / "secret"
    path.write_text("user:password\n")
    os.chown(path, STRANGER, -1)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    path.chmod(0o600)
    assert credentials(str(path)) == ("user", "password")
    path.chmod(0o640)
    with pytest.raises(NotPermitted, match="chmod 600"):
        credentials(str(path))


def test_what_is_no_file_is_refused_at_once(folder: Path) -> None:
    os.mkfifo(folder / "fifo", 0o600)
    began = time.monotonic()
    for name in ("fifo", "."):
        with pytest.raises(DlmfsError, match=r"it is no file|Is a directory"):
            credentials(str(folder / name))
    assert time.monotonic() - began < 30


def test_the_file_that_was_opened_is_the_one_that_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can swap the path wins nothing between the look and the reading."""
    bad, good, path = folder / "bad", folder / "good", folder / "path"
    for file, mode in ((bad, 0o666), (good, 0o600)):
        file.write_text("user:password\n")
        file.chmod(mode)
    path.symlink_to(bad)
    real = os.open

    def swapping(name: str, *more: int) -> int:
        fd = real(name, *more)
        path.unlink()
        path.symlink_to(good)
        return fd

    monkeypatch.setattr(os, "open", swapping)
    with pytest.raises(NotPermitted, match="chmod 600"):
        credentials(str(path))
