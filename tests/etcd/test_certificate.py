"""How long certificates are good, read by hand; no server."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from dlmfs.cli.certificates import DAY_S, told
from dlmfs.store.etcd.certificate import BEGIN, END, Lifetime, lifetimes

NOW: Final = 1_800_000_000.0


def field(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    return bytes([tag, 0x82]) + size.to_bytes(2, "big") + content


def when(at: float) -> bytes:
    moment = time.gmtime(at)
    if moment.tm_year < 2050:
        return field(0x17, time.strftime("%y%m%d%H%M%SZ", moment).encode())
    return field(0x18, time.strftime("%Y%m%d%H%M%SZ", moment).encode())


def certificate(begins: float, ends: float, *, version: bool = True) -> bytes:
    """As much of one as is read, and some more behind it."""
    parts = [
        field(0xA0, field(2, b"\2")) if version else b"",
        field(2, b"\1" * 20),
        field(0x30, b"\0" * 200),
        field(0x30, b"\0" * 9),
        field(0x30, when(begins) + when(ends)),
        field(0x30, b"\0" * 300),
    ]
    der = field(0x30, field(0x30, b"".join(parts)) + b"\0" * 40)
    text = base64.encodebytes(der).decode()
    return f"{BEGIN}\n{text}{END}\n".encode()


@pytest.mark.parametrize("version", [True, False])
@pytest.mark.parametrize("ends", [0.0, NOW, 2_524_607_999.0, 2_524_608_000.0, 4e9])
def test_a_lifetime_is_read(ends: float, version: bool) -> None:
    chain = b"some words\n" + certificate(1000.0, ends, version=version) + certificate(0.0, NOW)
    assert lifetimes(chain) == [Lifetime(1000.0, ends), Lifetime(0.0, NOW)]


def test_what_is_no_certificate_says_nothing() -> None:
    good = certificate(0.0, NOW)
    der = base64.b64decode(b"".join(good.splitlines()[1:-1]))
    for cut in range(len(der)):
        for other in (der[:cut], der[:cut] + b"\xff" + der[cut + 1 :]):
            text = base64.encodebytes(other).decode()
            assert len(lifetimes(f"{BEGIN}\n{text}{END}\n".encode())) <= 1
    for odd in (b"", BEGIN.encode(), good[:50], b"\xff" * 50, f"{BEGIN}%{END}".encode()):
        assert lifetimes(odd) == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_as_openssl_reads_it(tmp_path: Path) -> None:
    made = tmp_path / "made.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/dev/null"]
    command += ["-out", str(made), "-days", "40000", "-subj", "/CN=some/O=body"]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    show = ["openssl", "x509", "-in", str(made), "-noout", "-enddate"]
    end = subprocess.run(show, capture_output=True, check=True, text=True, timeout=60).stdout
    (found,) = lifetimes(made.read_bytes())
    assert (
        time.strftime("%b %e %H:%M:%S %Y GMT", time.gmtime(found.ends)) == end.split("=")[1].strip()
    )


@pytest.mark.parametrize(
    ("days", "left_days", "words"),
    [
        (365, 31, None),
        (365, 29, "ends in 29 days"),
        (90, 23, None),
        (90, 22, "ends in 22 days"),
        (1, 8 / 24, None),
        (1, 5 / 24, "ends in 5.0 hours"),
        (365, -1, "has ended"),
    ],
)
def test_who_renews_in_time_is_not_warned(days: float, left_days: float, words: str | None) -> None:
    ends = NOW + left_days * DAY_S
    row = {"option": "cert=", "begins": ends - days * DAY_S, "ends": ends}
    said = told([row], NOW)
    assert [over for _, over in said] == ([] if words is None else [left_days < 0])
    assert words is None or words in said[0][0]
