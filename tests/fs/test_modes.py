"""Whose folders and locks are, and their modes: the rules, and several users on real mounts."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dlmfs.client import Lock
from dlmfs.config import ID_MAX, parse_options
from dlmfs.errors import UsageError
from dlmfs.fs.tree import Directory, Tree
from dlmfs.modes import DEFAULT, Modes
from dlmfs.permission import Asker, Sight
from tests.fs.nodes import ROOT, Nodes, dlmfs
from tests.fs.test_limits import NOBODY, as_nobody, create

GROUP = 4711
OTHER_USER = 4712


# -- the rules -----------------------------------------------------------------------------------------


def test_without_options_all_is_as_in_the_kernels_dlmfs() -> None:
    assert DEFAULT.root() == 0o755
    assert DEFAULT.domain(0o777, 0o22) == 0o755
    assert DEFAULT.domain(0o1777, 0) == 0o1777
    assert DEFAULT.lock(0o666, 0o22, 0o777) == 0o644
    assert DEFAULT.lock(0o6777, 0, 0o755) == 0o6777
    assert DEFAULT.owner(5, 6) == (5, 6)


@pytest.mark.parametrize(
    ("modes", "root", "domain", "lock"),
    [
        (Modes(umask=0o007), 0o770, 0o770, 0o660),
        (Modes(umask=0), 0o777, 0o777, 0o666),
        (Modes(mode=0o1777), 0o1777, 0o700, 0o600),
        (Modes(mode=0o1777, umask=0o22), 0o1777, 0o755, 0o644),
        (Modes(dmode=0o1777), 0o1777, 0o1777, 0o600),
        (Modes(dmode=0o2775, fmode=0o664), 0o2775, 0o2775, 0o664),
        (Modes(dmode=0o2770, umask=0), 0o2770, 0o2770, 0o666),
        (Modes(fmode=0o640), 0o755, 0o700, 0o640),
    ],
)
def test_what_is_made_under_a_umask_of_077(modes: Modes, root: int, domain: int, lock: int) -> None:
    assert modes.root() == root
    assert modes.domain(0o777, 0o77) == domain
    assert modes.lock(0o666, 0o77, domain) == lock


def test_nothing_is_more_open_than_was_asked_for() -> None:
    for modes in (Modes(umask=0), Modes(dmode=0o1777, fmode=0o666), Modes(gid=5, umask=0o7)):
        assert modes.domain(0o700, 0) & 0o777 == 0o700
        assert modes.lock(0o600, 0, 0o777) == 0o600
    assert Modes(gid=5).lock(0o6777, 0, 0o777) == 0o777  # no set-ID bit for somebody else's


@pytest.mark.parametrize(
    ("domain", "lock"),
    [(0o770, 0o1660), (0o1777, 0o1666), (0o755, 0o1644), (0o2770, 0o1660), (0o700, 0o1600)],
)
def test_a_transient_lock_has_the_bits_of_its_domain(domain: int, lock: int) -> None:
    asked = stat.S_ISVTX | 0o666
    for umask in (0, 0o22, 0o77):
        assert DEFAULT.lock(asked, umask, domain) == lock
    assert Modes(fmode=0o640).lock(asked, 0, domain) == lock & 0o1640
    assert Modes(umask=0o27).lock(asked, 0, domain) == lock & ~0o27
    assert Modes(gid=5).lock(asked, 0o77, domain) == lock
    assert DEFAULT.lock(stat.S_ISVTX | 0o600, 0, domain) == 0o1600


def test_options() -> None:
    modes = parse_options(["uid=0,gid=7,umask=027,mode=1777,dmode=2770,fmode=0660"]).modes
    assert modes == Modes(0, 7, 0o1777, 0o27, 0o2770, 0o660)
    assert parse_options(["uid=root,gid=root"]).modes == Modes(0, 0)
    assert parse_options([f"uid={ID_MAX}"]).modes.uid == ID_MAX
    assert parse_options(["gid=" + "0" * 40 + "7"]).modes.gid == 7
    assert parse_options([]).modes == DEFAULT
    for text, says in (
        ("uid=no-such-user", "no such user"),
        ("gid=no-such-group", "no such group"),
        ("uid=", "no such user"),
        ("gid=-1", "no such group"),
        (f"uid={ID_MAX + 1}", f"up to {ID_MAX}"),
        ("gid=" + "9" * 5000, f"up to {ID_MAX}"),
        ("umask=8", "octal"),
        ("umask=1777", "octal number up to 777"),
        ("umask=0o22", "octal"),
        ("dmode=4777", "octal number up to 3777"),
        ("fmode=1666", "octal number up to 777"),
        ("mode=", "octal"),
        ("mode=\u0667", "octal"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_options([text])


def test_a_folder_gives_its_group_to_what_is_made_in_it() -> None:
    tree = Tree(0, 0, Modes(dmode=0o2770))
    tree.root.gid = GROUP
    domain = tree.add(tree.root, b"d", stat.S_IFDIR | 0o777, 5, 5)
    assert isinstance(domain, Directory)
    lock = tree.add(domain, b"x", stat.S_IFREG | 0o666, 6, 6)
    assert (domain.uid, domain.gid, domain.mode & 0o7777) == (5, GROUP, 0o2770)
    assert (lock.uid, lock.gid) == (6, GROUP)


def test_nothing_is_told_of_a_lock_that_he_could_make_and_not_read() -> None:
    """What he would make may belong to somebody else."""
    he = Asker(NOBODY, NOBODY)
    for modes, knows in (
        (Modes(mode=0o777), True),
        (Modes(mode=0o777, fmode=0), True),  # his own, and he may chmod it
        (Modes(uid=0, umask=0), True),
        (Modes(uid=0, dmode=0o777, fmode=0o600), False),
        (Modes(uid=0, gid=GROUP, dmode=0o777, fmode=0o660), False),
        (Modes(uid=0, gid=NOBODY, dmode=0o777, fmode=0o660), True),
        (Modes(uid=0, mode=0o777, dmode=0o755), False),  # no lock can be made in such a domain
    ):
        tree = Tree(0, 0, modes)
        assert Sight(he, tree).knows(b"d", b"x") == knows, modes
        tree.add(tree.root, b"d", stat.S_IFDIR | 0o777, NOBODY, NOBODY)
        assert Sight(he, tree).knows(b"d", b"x") == knows, modes


# -- on real mounts ------------------------------------------------------------------------------------


fuse = pytest.mark.fuse
root = pytest.mark.root


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def facts(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return oct(stat.S_IMODE(status.st_mode)), status.st_uid, status.st_gid


@fuse
@root
def test_locks_are_made_as_their_domain_whatever_the_umask(nodes: Nodes) -> None:
    where = nodes.mount("a")
    for mode, made in ((0o770, "0o1660"), (0o1777, "0o1666"), (0o755, "0o1644"), (0o700, "0o1600")):
        domain = where / f"d{mode:o}"
        domain.mkdir()
        domain.chmod(mode)
        with umask(0o077):
            name = str(domain / "by-command")
            told = dlmfs("lock", name, "--", "stat", "-c", "0o%a %u %g", name).stdout
            assert told == f"{made} 0 0\n"
            with Lock(domain / "by-library", shared=True):
                assert facts(domain / "by-library") == (made, 0, 0)
            dlmfs("value", "set", str(domain / "by-value"), "x")
            assert os.umask(0o077) == 0o077, "the program's own was changed"
        assert facts(domain / "by-value") == (made, 0, 0)
        with umask(0o027):
            os.close(create(domain / "by-open"))
            os.close(os.open(domain / "by-code", os.O_RDWR | os.O_CREAT, 0o6711))
        assert facts(domain / "by-open")[0] == "0o640", "the kernel's rule"
        assert facts(domain / "by-code")[0] == "0o6710"


@fuse
@root
def test_all_belongs_to_one_user_and_limits_count_the_maker(nodes: Nodes) -> None:
    nodes.folder.chmod(0o755)
    where = nodes.mount("a", f"uid={OTHER_USER},umask=0,max_domains=2")
    assert facts(where) == ("0o777", OTHER_USER, 0)
    assert as_nobody(os.mkdir, where / "one") == 0
    assert facts(where / "one") == ("0o777", OTHER_USER, NOBODY)
    assert as_nobody(os.chmod, where / "one", 0o700) == errno.EPERM
    assert as_nobody(os.mkdir, where / "two") == errno.EDQUOT


@fuse
@root
def test_modes_come_back_with_the_mount(nodes: Nodes) -> None:
    seen = set()
    for _ in range(2):
        where = nodes.mount("a", f"gid={GROUP}", "dmode=2775", "fmode=664")
        (where / "dom").mkdir(0o777)
        os.close(create(where / "dom/x"))
        seen.add((facts(where), facts(where / "dom"), facts(where / "dom/x")))
        dlmfs("umount", str(where))
    folder = ("0o2775", 0, GROUP)
    assert seen == {(folder, folder, ("0o664", 0, GROUP))}


@fuse
def test_many_that_make_one_lock_at_once_all_get_it(nodes: Nodes) -> None:
    """Between the look, the making and the open others make it, too."""
    where = nodes.mount("a", "holder=file")
    (where / "dom").mkdir(0o755)
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from dlmfs.client import Lock
os.umask(0o77)
for n in range(20):
    with Lock("dom/lock%d" % n, mount={str(where)!r}) as lock:
        assert os.stat(lock.path).st_mode & 0o7777 == 0o1644
"""
    both = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [child.wait(120) for child in both] == [0] * 4
