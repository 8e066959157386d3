"""The filter itself, run by hand: what it lets pass, on each architecture."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dlmfs.errors import Unavailable
from dlmfs.launch import seccomp
from dlmfs.launch.seccomp import ABIS, RET_ALLOW, RET_USER_NOTIF, Abi
from tests.fs.nodes import PATIENCE_S, ROOT

I386, X32 = 0x40000003, 0x40000000


def decide(code: bytes, audit: int, number: int) -> int:
    """What the kernel would do: these few instructions of classic BPF (bpf(4))."""
    steps = list(struct.iter_unpack("=HBBI", code))
    data = struct.pack("=iI", number, audit)
    at, value = 0, 0
    while True:
        kind, yes, no, k = steps[at]
        at += 1
        if kind == seccomp.LOAD:
            (value,) = struct.unpack_from("=I", data, k)
        elif kind == seccomp.JUMP_IF_EQUAL:
            at += yes if value == k else no
        else:
            assert kind == seccomp.RETURN
            return int(k)


@pytest.mark.parametrize("abi", ABIS.values(), ids=ABIS)
def test_it_asks_about_two_calls_and_no_other(abi: Abi) -> None:
    code = seccomp._filter(abi.audit, (abi.statfs, abi.fstatfs))
    asked = [n for n in range(1024) if decide(code, abi.audit, n) == RET_USER_NOTIF]
    assert asked == sorted((abi.statfs, abi.fstatfs))
    others = {known.audit for known in ABIS.values()} - {abi.audit} | {I386}
    for audit in others:
        assert {decide(code, audit, n) for n in range(1024)} == {RET_ALLOW}
    assert {decide(code, abi.audit, X32 | n) for n in range(1024)} == {RET_ALLOW}


def test_the_structures_have_the_kernels_sizes() -> None:
    assert (seccomp.NOTIF.size, seccomp.RESPONSE.size) == (80, 24)
    assert (seccomp.NOTIF_RECV, seccomp.NOTIF_SEND) == (0xC0502100, 0xC0182101)


OLDER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from dlmfs.launch import seccomp
seccomp.FLAG_WAIT_KILLABLE_RECV = 1 << 20
print(os.readlink(f"/proc/self/fd/{seccomp.install((seccomp.abi().statfs,))}"))
"""


def test_a_kernel_that_lacks_the_latest_flag() -> None:
    """It is done without. In a process of its own: a filter is for life."""
    command = [sys.executable, "-I", "-c", OLDER, str(ROOT / "src")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.stdout, done.stderr) == ("anon_inode:seccomp notify\n", "")


@pytest.mark.parametrize(
    ("machine", "release", "says"),
    [
        ("riscv64", "6.1.0", "not on riscv64"),
        ("x86_64", "5.8.0-rc1", "Linux 5.9 or later, not 5.8.0-rc1"),
        ("x86_64", "4.18.0-553.el8", "Linux 5.9 or later"),
        ("x86_64", "5.9-rc1", None),
        ("aarch64", "6.1.0-rpi", None),
    ],
)
def test_where_it_cannot_work_it_says_so(
    monkeypatch: pytest.MonkeyPatch, machine: str, release: str, says: str | None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    if says is None:
        assert seccomp.abi() is ABIS[machine]
    else:
        with pytest.raises(Unavailable, match=says):
            seccomp.abi()
