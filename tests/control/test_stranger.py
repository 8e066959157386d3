"""Each door has the locks of the mount: what the modes keep from a user, no question tells him."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs import proc
from dlmfs.fs.tree import Directory, Tree
from dlmfs.fuse import mountinfo
from dlmfs.handlers import _TABLE
from dlmfs.modes import Modes
from dlmfs.permission import READ, SEARCH, WRITE, Asker, Sight, hides_processes, may
from tests.cli.programs import Opener, queued
from tests.control.asking import STRANGER, Facts, acting, asked, raw, refused, told
from tests.fs.nodes import Nodes

pytestmark = [pytest.mark.fuse, pytest.mark.root]

GROUP = 4711
VALUE = b"root-db-password=hunter2"
MARKED = "thespooler"
SECRETS = (VALUE, VALUE.hex().encode(), b"shut", b"payroll", MARKED.encode())
"""The value of a lock of mode 0600; a domain of mode 0700, a lock in it, and who holds that one."""
NAMED = ("info", "why")
PLACES = (("open", "seen"), ("open", "hush"), ("shut", "payroll"), ("shut", "none"), ("none", "x"))
QUESTIONS: dict[str, list[dict[str, object]]] = {
    "status": [{}, {"all": True}],
    "info": [{"domain": domain, "lock": lock} for domain, lock in PLACES],
    "hindrance": [{"domain": domain, "lock": lock} for domain, lock in PLACES],
    "nodes": [{}],
    "why": [{"domain": domain, "lock": lock} for domain, lock in PLACES],
    "health": [{}],
    "top": [{}, {"idle": True}, {"idle": True, "filter": "pay"}],
    "evict": [{"node": "a"}],
    "remove-domain": [{"domain": "shut"}],
}
"""Of every kind of question all that a stranger may think of."""

HOLDER = """
import os, sys
open("/proc/self/comm", "w").write(sys.argv[3])
held = os.open(sys.argv[1], os.O_RDWR)
print("held", flush=True)
sys.stdin.readline()
os.open(sys.argv[2], os.O_RDWR)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir="/dev/shm"))
    folder.chmod(0o755)
    made = Nodes(folder)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def where(nodes: Nodes) -> Path:
    """Two nodes. `open`, 0755, has `seen` (0644) and `hush` (0600, with a value); `shut`, 0700, has
    `payroll`, whose holder waits for `hush`; who holds `seen`, at the other node, waits for `payroll`."""
    a, b = nodes.mount("a", "holder=file"), nodes.mount("b", "holder=file")
    for node in (a, b):
        (node / "open").mkdir()
        (node / "shut").mkdir(mode=0o700)
        for name, mode in (("open/seen", 0o644), ("open/hush", 0o600), ("shut/payroll", 0o644)):
            os.close(os.open(node / name, os.O_RDWR | os.O_CREAT, mode))
    (a / "open/hush").write_bytes(VALUE)
    (a / "shut/payroll").write_bytes(VALUE)
    for one, then, name in (
        (a / "shut/payroll", a / "open/hush", MARKED),
        (b / "open/seen", b / "shut/payroll", "someone"),
    ):
        holder = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOLDER, one, then, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        nodes.children.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
    Opener(nodes, ("x", a / "open/hush")).has(1)
    for holder in nodes.children[:2]:
        assert holder.stdin is not None
        holder.stdin.write(b"\n")
        holder.stdin.flush()
    queued(a / "shut/payroll", 1)
    queued(a / "open/hush", 1)
    return a


def test_every_kind_of_question_is_put_here() -> None:
    assert set(QUESTIONS) == set(_TABLE)


@pytest.mark.parametrize("command", sorted(_TABLE))
def test_a_stranger_is_told_nothing_that_is_closed_to_him(where: Path, command: str) -> None:
    for more in QUESTIONS[command]:
        answer = raw(where, json.dumps({"cmd": command, **more}).encode())
        found = [secret for secret in SECRETS if secret in answer]
        assert not found, (more, answer)
        assert b"internal error" not in answer


def test_root_is_told(where: Path) -> None:
    """All those secrets are there to be told."""
    questions = [{"cmd": command, **more} for command in NAMED for more in QUESTIONS[command][:3]]
    questions += [{"cmd": "status"}, {"cmd": "nodes"}, {"cmd": "health"}, {"cmd": "top"}]
    answers = b"".join(raw(where, json.dumps(q).encode(), uid=0) for q in questions)
    assert [s for s in SECRETS if s not in answers] == [VALUE]  # it goes as hexadecimal
    for command in ("status", "nodes", "health", "top"):
        assert b"shut" in raw(where, json.dumps({"cmd": command}).encode(), uid=0), command


def test_what_is_hidden_is_counted(where: Path) -> None:
    status = told(where, cmd="status")
    assert status["hidden_domains"] == 1
    (domain,) = status["domains"]
    assert (domain["name"], domain["hidden"], domain["count"]) == ("open", 1, 1)
    assert [lock["name"] for lock in domain["locks"]] == ["seen"]
    top = told(where, cmd="top", idle=True)
    assert [row["lock"] for row in top["locks"]] == ["seen"]
    assert top["hidden"] == 2
    assert {row["node"]: row["more_domains"] for row in told(where, cmd="nodes")} == {
        "a": 1,
        "b": 1,
    }
    (only,) = told(where, cmd="health")["domains"]
    assert (only["domain"], only["locks"]) == ("open", 0), "none of them is his own"


def test_a_chain_ends_at_a_lock_that_is_closed(where: Path) -> None:
    """Who holds `seen` waits for `payroll`; that is for root to know."""
    chain = told(where, cmd="why", domain="open", lock="seen")
    assert [lock["lock"] for lock in chain["locks"]] == ["seen"]
    assert (chain["hidden"], chain["waits"]) == (1, [])
    whole = told(where, uid=0, cmd="why", domain="open", lock="seen")
    assert {lock["lock"] for lock in whole["locks"]} == {"seen", "payroll", "hush"}
    assert whole["hidden"] == 0


def test_refusals_do_not_tell_what_is_there(where: Path) -> None:
    """The same words for a lock that is there and one that is not."""
    for command in NAMED:
        there, missing, elsewhere = (
            asked(where, cmd=command, domain=domain, lock=lock)
            for domain, lock in (("shut", "payroll"), ("shut", "none"), ("none", "payroll"))
        )
        assert there == missing == elsewhere
        assert there["error"]["class"] == "NotPermitted"
        assert refused(where, cmd=command, domain="open", lock="hush") == "NotPermitted"
        for domain, lock in (
            ("", "payroll"),
            ("shut/payroll", ""),
            ("shut", "a/b"),
            ("x" * 64, "y"),
        ):
            assert refused(where, cmd=command, domain=domain, lock=lock) == "UsageError"
    for command in ("evict", "remove-domain"):
        assert refused(where, cmd=command, node="a", domain="shut") == "NotPermitted"


def test_modes_and_owners_are_those_of_now(where: Path) -> None:
    """A group that gets in, a file's new owner, a file that opens itself."""
    os.chown(where / "shut", 0, GROUP)
    os.chmod(where / "shut", 0o750)
    try:
        asking: Facts = {"cmd": "info", "domain": "shut", "lock": "payroll"}
        assert told(where, STRANGER, [GROUP], **asking)["lvb_hex"].startswith(VALUE.hex())
        assert refused(where, **asking) == "NotPermitted"
        os.chmod(where / "shut", 0o710)  # known by name, not listed
        assert "ok" in asked(where, STRANGER, [GROUP], **asking)
        (_, shut) = told(where, STRANGER, [GROUP], cmd="status")["domains"]
        assert (shut["locks"], shut["hidden"]) == ([], 1)
        asking = {"cmd": "info", "domain": "open", "lock": "hush"}
        os.chown(where / "open/hush", STRANGER, 0)
        assert told(where, **asking)["lvb_hex"].startswith(VALUE.hex())
        (only,) = told(where, cmd="health")["domains"]
        assert only["locks"] == 1
    finally:
        os.chown(where / "open/hush", 0, 0)
        os.chmod(where / "shut", 0o700)
        os.chown(where / "shut", 0, 0)


# -- the rule itself ----------------------------------------------------------------------------------


def test_may_is_the_kernels_rule(where: Path) -> None:
    """Every mode, for the owner, the group and others, against what the kernel answers on this mount."""
    tree = Tree(0, 0)
    domain = tree.add(tree.root, b"open", 0o40755, 0, 0)
    assert isinstance(domain, Directory)
    file = tree.add(domain, b"probe", 0o100644, 0, 0)
    real = where / "open/probe"
    os.close(os.open(real, os.O_RDWR | os.O_CREAT))
    try:
        for uid, gid in ((STRANGER, 1), (1, GROUP), (1, STRANGER), (1, 1)):
            os.chown(real, uid, gid)
            file.uid, file.gid = uid, gid
            asker = Asker(STRANGER, STRANGER, frozenset({GROUP}))
            for mode in (0o604, 0o064, 0o046, 0o420, 0o042, 0o204, 0o666, 0o000):
                os.chmod(real, mode)
                file.mode = 0o100000 | mode
                with acting(STRANGER, [GROUP]):
                    for want, how in ((READ, os.R_OK), (WRITE, os.W_OK)):
                        allowed = os.access(real, how, effective_ids=True)
                        assert may(asker, file, want) == allowed, (uid, gid, oct(mode))
    finally:
        real.unlink()


def test_a_folder_that_cannot_be_searched_closes_what_is_below() -> None:
    tree = Tree(0, 0, Modes(mode=0o711))
    domain = tree.add(tree.root, b"dom", 0o40766, 0, 0)
    assert isinstance(domain, Directory)
    file = tree.add(domain, b"x", 0o100666, 0, 0)
    stranger, root = Asker(5, 5), Asker(0, 0, trusted=True)
    assert not may(stranger, file, READ)
    assert may(root, file, READ | WRITE | SEARCH)
    domain.mode = 0o40711
    assert may(stranger, file, READ)
    sight = Sight(stranger, tree)
    assert sight.knows(b"dom", b"x")
    assert not sight.lists(b"dom")(b"x"), "the folder cannot be listed"
    assert not sight.names(b"dom"), "nor can the mount's root"
    tree.root.mode = 0o40755
    assert sight.names(b"dom")
    assert not sight.lists(b"dom")(b"x"), "the folder still cannot"
    tree.root.mode = 0o40711
    assert not sight.knows(b"dom", b"new"), "he cannot make it"
    assert not sight.knows(b"other", b"new")
    domain.mode = tree.root.mode = 0o41777
    assert sight.knows(b"dom", b"new")
    assert sight.knows(b"other", b"new")


# -- processes ----------------------------------------------------------------------------------------


def test_hidden_processes_stay_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is mounted with hidepid= a user is told of his own processes only."""
    claim = {"mode": "EX", "pid": os.getpid(), "command": "mine", "token": 1}
    blank = {"mode": "EX", "pid": 0, "command": "", "token": 1}
    me, other = Asker(STRANGER, 1), Asker(1, 1)
    monkeypatch.setattr(proc, "user", lambda _pid: STRANGER)
    assert Sight(other, Tree()).claim(claim) == claim
    assert Sight(me, Tree(), secret=True).claim(claim) == claim
    assert Sight(other, Tree(), secret=True).claim(claim) == blank
    assert Sight(Asker(0, 0, trusted=True), Tree(), secret=True).claim(claim) == claim
    # Another host's users are not this one's.
    assert Sight(me, Tree()).claim(claim, elsewhere=True, secret=True) == blank


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ("rw", False),
        ("rw,hidepid=0", False),
        ("rw,hidepid=2", True),
        ("rw,hidepid=invisible", True),
    ],
)
def test_the_mount_table_tells_whether_they_are(
    monkeypatch: pytest.MonkeyPatch, options: str, hidden: bool
) -> None:
    line = f"22 1 0:21 / /proc rw,nosuid shared:1 - proc proc {options}".encode()
    monkeypatch.setattr(mountinfo, "mounts", lambda: mountinfo.parse(line))
    assert hides_processes() is hidden


def test_extended_attributes_need_the_same_right(where: Path) -> None:
    """The kernel asks for the right to read a file before it passes on a question for its attributes."""
    with acting(STRANGER), pytest.raises(PermissionError) as refusal:
        os.getxattr(where / "open/hush", "user.dlmfs.holders")
    assert refusal.value.errno == errno.EACCES
