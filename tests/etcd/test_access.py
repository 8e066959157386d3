"""How a mount reaches its etcd: URLs, certificates, users, IPv6, versions."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from dlmfs.config import parse_source
from dlmfs.errors import UsageError
from dlmfs.store.etcd.about import unsound
from tests.etcd.mounts import EtcdNodes, errno_of, put, trylock, value
from tests.etcd.server import PATIENCE_S, Etcd, loopback
from tests.fs.nodes import dlmfs

pytestmark = pytest.mark.fuse

Start = Callable[..., EtcdNodes]
PASSWORD: Final = "open sesame: it is"


def try_mount(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    where = folder / "refused"
    where.mkdir(exist_ok=True)
    done = dlmfs(
        "mount", source, str(where), "-o", ",".join(["ttl=5", "retry=0", *options]), check=False
    )
    assert done.returncode != 0
    assert not where.is_mount()
    return done


@pytest.mark.parametrize(
    "url", ["etcd://root:hunter2@h/prod", "etcd://hunter2@h/prod", "etcd://h/prod?x@hunter2"]
)
def test_a_password_in_the_url_is_refused_and_not_repeated(folder: Path, url: str) -> None:
    done = try_mount(folder, url)
    assert done.returncode == 1
    assert "credentials=FILE" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "url",
    [
        "etcd://",
        "etcd://h",
        "etcd://h/",
        "etcd:///prod",
        "etcd://h:0/prod",
        "etcd://h:65536/prod",
        "etcd://h,,i/prod",
        "etcd://h/a/b",
        "etcd://::1/prod",
        "etcd://h/prod!",
        "etcd://h /prod",
    ],
)
def test_a_malformed_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("version", "sound"),
    [
        ("3.4.37", False),
        ("3.4.38", True),
        ("3.5.1", False),
        ("3.5.22", False),
        ("3.5.23", True),
        ("3.6.4", False),
        ("3.6.5", True),
        ("3.6.0-rc.1", False),
        ("3.7.0", True),
        ("4.0.0", True),
        ("3.3.27", False),
        ("2.3.8", False),
        ("3.10.0", True),
        ("", False),
        ("not a version", False),
    ],
)
def test_versions_with_lease_bugs_are_warned_of(version: str, sound: bool) -> None:
    warning = unsound(version)
    assert (warning is None) == sound
    assert warning is None or version in warning


def test_the_warning_is_said_at_the_mount_and_in_status(nodes: EtcdNodes) -> None:
    where = nodes.folder / "a"
    where.mkdir()
    source = nodes.etcd.source(nodes.cluster)
    nodes.mounts.append(where)
    done = dlmfs("mount", source, str(where), "-o", "node=a,ttl=5")
    nodes.daemons[where] = nodes.pid(where)
    assert "etcd 3.5.1 may renew a lease that it has revoked" in done.stderr
    store = nodes.status(where)["store"]
    assert store["version"] == "3.5.1"
    assert "3.5.23" in store["warning"]


def test_ipv6(folder: Path, start: Start) -> None:
    try:
        port = free_pair("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 on the loopback: {error.strerror}")
    nodes = start(Etcd(folder, hosts=["::1"], port=port))
    assert nodes.etcd.source().startswith("etcd://[::1]:")
    a, b = nodes.pair()
    put(a / "dom/x", b"six")
    assert trylock(b / "dom/x") == 0


def free_pair(host: str) -> int:
    """Two free ports in a row, below the ephemeral ones."""
    for port in range(20000 + os.getpid() % 5000 * 2, 32000, 2):
        with contextlib.suppress(OSError):
            for number in (port, port + 1):
                socket.create_server((host, number), family=socket.AF_INET6).close()
            return port
    raise OSError(0, "no free port")


# -- certificates -------------------------------------------------------------------------------


class Certificates:
    """An authority, and what it has signed, as files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self._openssl(
            *("req", "-x509", *self._key("ca"), "-out", self.path("ca.crt")),
            *("-days", "2", "-subj", f"/CN=authority {name}"),
        )

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def _key(self, name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        return [*curve, "-nodes", "-keyout", self.path(f"{name}.key")]

    def _openssl(self, *args: str) -> None:
        subprocess.run(["openssl", *args], capture_output=True, timeout=PATIENCE_S, check=True)

    def sign(self, name: str, *hosts: str) -> None:
        """`name`.key and `name`.crt, good for these addresses."""
        request, extra = self.path(f"{name}.csr"), self.path(f"{name}.ext")
        names = ",".join(f"IP:{host}" for host in hosts)
        Path(extra).write_text(f"subjectAltName={names}\n")
        self._openssl("req", *self._key(name), "-out", request, "-subj", f"/CN={name}")
        self._openssl(
            *("x509", "-req", "-in", request, "-out", self.path(f"{name}.crt"), "-days", "2"),
            *("-CA", self.path("ca.crt"), "-CAkey", self.path("ca.key"), "-CAcreateserial"),
            *("-extfile", extra),
        )

    def etcd(self, folder: Path, *hosts: str) -> Etcd:
        """Servers that let in only who has a certificate of this authority."""
        self.sign("server", *hosts)
        self.sign("client", *hosts)
        options = {
            "cert-file": self.path("server.crt"),
            "key-file": self.path("server.key"),
            "trusted-ca-file": self.path("ca.crt"),
            "client-cert-auth": "true",
        }
        control = [f"--{o}" for o in ("cacert", "cert", "key")]
        files = (self.path(f) for f in ("ca.crt", "client.crt", "client.key"))
        pairs = [word for pair in zip(control, files, strict=True) for word in pair]
        return Etcd(folder, hosts=hosts, options=options, control=pairs)


FILES: Final = {"cert": "client.crt", "key": "client.key"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_tls(folder: Path, start: Start) -> None:
    ours, foreign = Certificates(folder, "ours"), Certificates(folder, "foreign")
    host = loopback()
    nodes = start(ours.etcd(folder, host))
    source = nodes.etcd.source()
    foreign.sign("client", host)
    ca, cert, key = (ours.path(name) for name in ("ca.crt", "client.crt", "client.key"))
    good = (f"ca={ca}", f"cert={cert}", f"key={key}")
    long = "retry=600"
    foreign_pair = tuple(f"{o}={foreign.path(f)}" for o, f in FILES.items())
    for options, code, words in (
        ((), 32, ""),
        # At once, though they would wait: waiting mends no certificate.
        ((f"ca={foreign.path('ca.crt')}", *good[1:], long), 32, "its certificate is not accepted"),
        ((good[0], *foreign_pair, long), 32, "refuses this node's certificate (bad certificate)"),
        ((good[0], foreign_pair[0], f"key={key}"), 1, "do not belong together"),
        ((f"ca={key}", *good[1:]), 1, "no whole certificate"),
        (good[:2], 1, "cert= and key= go together"),
        (good[1:], 1, "need ca="),
        ((*good[:2], "key=/nonexistent"), 1, "key=/nonexistent: No such file"),
    ):
        done = try_mount(folder, source, *options)
        assert done.returncode == code, (options, done.stderr)
        assert words in done.stderr
        assert done.stderr.splitlines()[-1].startswith("dlmfs: ")
        assert "internal error" not in done.stderr
    a, b = nodes.pair(*good)
    put(a / "dom/x", b"sealed")
    assert trylock(b / "dom/x") == 0
    nodes.etcd.restart(nodes.etcd.members[0])
    assert trylock(a / "dom/x") == 0


# -- users ----------------------------------------------------------------------------------------


def with_users(etcd: Etcd) -> None:
    """From now on only known users are let in; `dlm` may use our part of the store."""
    for command in (
        ["user", "add", f"root:{PASSWORD}"],
        ["user", "grant-role", "root", "root"],
        ["role", "add", "locks"],
        ["role", "grant-permission", "locks", "readwrite", "--prefix=true", "dlmfs/"],
        ["user", "add", f"dlm:{PASSWORD}"],
        ["user", "grant-role", "dlm", "locks"],
        ["user", "add", f"nobody:{PASSWORD}"],
        ["auth", "enable"],
    ):
        etcd.ctl(*command)
    etcd.control = [*etcd.control, "--user", f"root:{PASSWORD}"]


def credentials(folder: Path, user: str, password: str = PASSWORD, mode: int = 0o600) -> str:
    path = folder / f"{user}-{len(list(folder.iterdir()))}"
    path.write_text(f"{user}:{password}\n")
    path.chmod(mode)
    return f"credentials={path}"


def test_a_mount_without_the_credentials_that_it_needs_says_so(folder: Path, start: Start) -> None:
    nodes = start()
    with_users(nodes.etcd)
    done = try_mount(folder, nodes.etcd.source())
    assert "credentials=FILE" in done.stderr
    assert done.returncode == 1


def test_users_and_passwords(folder: Path, start: Start) -> None:
    nodes = start(Etcd(folder, options={"auth-token-ttl": "1"}))
    with_users(nodes.etcd)
    source = nodes.etcd.source()
    for option, code, words in (
        (credentials(folder, "dlm", "wrong"), 1, "does not know this user and password"),
        (credentials(folder, "stranger"), 1, "does not know this user and password"),
        (credentials(folder, "nobody"), 1, "refuses this user"),
        (credentials(folder, "dlm", mode=0o644), 1, "chmod 600"),
        (credentials(folder, "", ""), 1, "must be user:password"),
        ("credentials=/nonexistent", 1, "credentials=/nonexistent: No such file"),
    ):
        done = try_mount(folder, source, option)
        assert words in done.stderr, (option, done.stderr)
        assert done.returncode == code, (option, done.stderr)
        assert PASSWORD not in done.stderr
    good = credentials(folder, "dlm")
    a, b = nodes.pair(good, "ttl=15")
    put(a / "dom/x", b"known")
    fd = os.open(a / "dom/x", os.O_RDWR)
    waiter = nodes.queue(b / "dom/x")
    # The server forgets all tokens; an idle one is forgotten sooner than its next use, too.
    nodes.etcd.restart(nodes.etcd.members[0])
    os.close(fd)
    assert waiter.wait() == "held"
    waiter.release()
    nodes.etcd.ctl("user", "add", "another:x")  # and a token of an older revision is refused
    put(a / "dom/x", b"still known")
    assert value(b / "dom/x") == b"still known"
    assert [nodes.fences(where) for where in (a, b)] == [0, 0]
    assert errno_of(a / "dom/new") == 0
    for where in (a, b):
        nodes.umount(where)
    assert nodes.etcd.all_keys() == []
