"""/proc holds other people's bytes: whatever they are, it is read, or it counts as not told."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlmfs import fstype, proc
from dlmfs.fs import kin
from dlmfs.fuse import mountinfo

SOURCE = Path(proc.__file__).parent

PID, THREAD, HOLDER, INO = 40, 41, 50, 7
HERE = "0:99"
ASKED = kin.Question(PID, frozenset({HOLDER}), INO, b"/dom/x", HERE)
MOUNT = b"31 1 0:99 / /mnt rw - fuse.dlmfs local rw\n"


class Played:
    """A folder that stands for /proc, with one process of two threads in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("status", b"Name:\tx\nTgid:\t40\nPPid:\t1\nSigPnd:\t0\nShdPnd:\t0\nState:\tS\n")
        self.write("stat", b"40 (x) S 1 " + b"0 " * 17 + b"77 0")
        self.write("comm", b"x\n")
        self.write("mountinfo", MOUNT)
        for thread in (PID, THREAD):
            self.write(f"task/{thread}/children", b"")
        (root / str(THREAD)).symlink_to(str(PID))
        (root / "self").symlink_to(str(PID))
        (root / str(PID) / "fd").mkdir()

    def write(self, name: str, content: bytes) -> None:
        path = self.root / str(PID) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def opened(self, fd: int, path: bytes = b"/mnt/dom/x", *, flags: int = 0o100000) -> None:
        link = os.fsencode(self.root / str(PID) / "fd" / str(fd))
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(path, link)
        told = f"pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t31\nino:\t{INO}\n"
        self.write(f"fdinfo/{fd}", told.encode())

    def is_kin(self) -> bool:
        return kin.is_kin(ASKED)


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setattr(proc, "ROOT", str(tmp_path))
    return Played(tmp_path)


def test_an_open_descriptor_makes_kin(played: Played) -> None:
    assert not played.is_kin()
    played.opened(3)
    assert played.is_kin()


def test_a_mount_point_that_is_no_utf8_is_read_past(played: Played) -> None:
    """Anybody may mount something there, and so may a USB stick with a name in Latin-1."""
    played.opened(3)
    played.write("mountinfo", b"30 1 0:98 / /media/M\374ller\r rw - vfat /dev/sdb rw\n" + MOUNT)
    assert played.is_kin()
    assert fstype.fs_type(Path("/mnt")) == "fuse.dlmfs"
    assert [entry.mountpoint for entry in mountinfo.mounts()] == ["/media/M\udcfcller\r", "/mnt"]


def test_a_name_that_is_cut_in_the_middle_of_a_letter_is_read_past(played: Played) -> None:
    name = "lock:sicherungü".encode()[:15]
    fields = b"Name:\t" + name + b"\nTgid:\t40\nPPid:\t1\nState:\tS (sleeping)\n"
    played.write("status", fields)
    played.write("comm", name + b"\n")
    assert proc.group(THREAD) == PID
    assert kin.process(PID) == (PID, "lock:sicherung\udcc3", "S")
    assert proc.command(PID) == "lock:sicherung\udcc3"


def test_a_name_passes_for_no_other_field(played: Played) -> None:
    """The kernel escapes the end of a line in it, and nothing else that Python takes for one."""
    played.write("status", b"Name:\ta\rTgid:\t1\x0bb\nTgid:\t40\nPPid:\t1\n")
    assert proc.group(PID) == PID
    played.write("stat", b"40 (x) Z 1 ) T 2 " + b"0 " * 17 + b"77 0")
    assert proc.is_stopped(PID)


def test_a_descriptor_of_a_path_alone_holds_nothing(played: Played) -> None:
    """O_PATH does not open the file: who may only look at it would pass the queue."""
    played.opened(3, flags=0o100000 | proc.O_PATH)
    assert not played.is_kin()


def test_so_many_descriptors_are_looked_at_and_no_more(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fd in range(3 * kin.DESCRIPTORS_MAX):
        played.opened(fd, b"/elsewhere")
    looked: list[int] = []
    link = proc.link

    def looks(pid: proc.Pid, fd: int) -> bytes | None:
        looked.append(fd)
        return link(pid, fd)

    monkeypatch.setattr(proc, "link", looks)
    assert not played.is_kin()
    assert len(looked) == kin.DESCRIPTORS_MAX


def test_so_much_of_a_table_of_mounts_is_read_and_no_more(played: Played) -> None:
    line = b"30 1 0:98 / /" + b"m" * 100 + b" rw - tmpfs tmpfs rw\n"
    played.opened(3)
    played.write("mountinfo", line * (proc.TABLE_MAX // len(line) + 1) + MOUNT)
    assert not played.is_kin()


def test_who_holds_it_by_the_daemons_own_account_needs_no_looking(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_parts: object, **_more: object) -> None:
        raise AssertionError("/proc was asked")

    monkeypatch.setattr(proc, "read", nothing)
    assert kin.is_kin(ASKED._replace(pid=HOLDER))


ODD = st.one_of(
    st.binary(max_size=64),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"", b"\xff", b"\r", b"Tgid:\t-1", b"Tgid:\t" + b"9" * 5000, b"\0" * 32]),
)
FILES = ("status", "stat", "comm", "mountinfo", "fdinfo/3", f"task/{PID}/children", "auxv")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), odd=ODD, at=st.integers(0, 200), link=ODD)
def test_no_bytes_raise_anything(
    played: Played, name: str, odd: bytes, at: int, link: bytes
) -> None:
    """Whatever stands in any of its files, in the place of what should or in the middle of it."""
    played.opened(3, link.replace(b"\0", b"")[:200] or b"x")
    path = played.root / str(PID) / name
    before = path.read_bytes() if path.exists() else b""
    try:
        for content in (odd, before[:at] + odd + before[at:]):
            played.write(name, content)
            assert played.is_kin() in (True, False)
            kin.fate(PID)
            kin.process(THREAD)
            kin.family(PID, 10)
            proc.command(PID)
            proc.is_stopped(PID)
            proc.is_64_bit(PID)
            proc.children(PID, PID)
            proc.open_file(PID, 3)
            mountinfo.mounts()
            fstype.fs_type(Path("/mnt"))
    finally:
        played.write(name, before)


def test_a_number_as_long_as_you_like_is_none() -> None:
    assert proc.number(b"9" * 5000) is None
    assert proc.number(b"1_0") in (None, 10)


def test_this_process_is_one_of_64_bits_where_it_is() -> None:
    assert proc.is_64_bit(os.getpid()) == (os.sysconf("SC_LONG_BIT") == 64)


def test_a_program_of_32_bits_is_known(played: Played) -> None:
    assert not proc.is_64_bit(PID)
    played.write("auxv", (32).to_bytes(4, "little") + (0xF7FC1000).to_bytes(4, "little"))
    assert not proc.is_64_bit(PID)
    played.write("auxv", (33).to_bytes(8, "little") + (0x7FFF1000).to_bytes(8, "little"))
    assert proc.is_64_bit(PID)


# -- nobody else reads it -----------------------------------------------------------------------------

LOOKS = frozenset({"open", "listdir", "scandir", "readlink", "stat", "exists", "read_text", "Path"})
ELSEWHERE = {
    "cli/lock.py": "writes its own name",
    "launch/namespace.py": "writes the maps of its own user namespace",
    "deadline.py": "the number of a namespace",
    "identity.py": "the number of a namespace",
    "launch/statfs.py": "whether it may have a program's memory",
}
"""Who may name /proc in a call all the same."""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name | ast.Attribute):
                yield node, function.id if isinstance(function, ast.Name) else function.attr


def begins(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    if isinstance(node, ast.Constant):
        value = node.value
        return value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return ""


def as_text(call: ast.Call, function: str) -> bool:
    """Whether a file is opened as text, in whatever encoding the environment says."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if function == "open" and isinstance(call.func, ast.Name):
        mode = call.args[1] if len(call.args) > 1 else ast.Constant("r")
        return isinstance(mode, ast.Constant) and "b" not in begins(mode)
    return len(call.args) < {"read_text": 1, "write_text": 2}.get(function, 0)


def test_proc_is_read_in_one_module_and_nothing_as_text_by_accident() -> None:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for call, function in calls(ast.parse(path.read_bytes())):
            elsewhere = name != "proc.py" and name not in ELSEWHERE and function in LOOKS
            if elsewhere and any(begins(word).startswith("/proc/") for word in call.args):
                found.append(f"{name}:{call.lineno} looks into /proc")
            if as_text(call, function):
                found.append(f"{name}:{call.lineno} opens a file as text, in whatever encoding")
    assert found == []
