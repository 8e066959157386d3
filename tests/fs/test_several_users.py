"""Several users on one mount, each with processes of his own; and the page about it, word for word."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.fs.nodes import ROOT
from tests.tools.private import OTHER, USER, Done, Private, missing, private

pytestmark = [pytest.mark.fuse, pytest.mark.root]

GROUP = 4711
EX_NOPERM = 77
PAGE = ROOT / "docs/users.md"


@pytest.fixture(scope="module")
def here() -> Iterator[Private]:
    """One place for the tests of this module; each uses names of its own."""
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
    with private() as made:
        yield made


class Users:
    """Root's mount in there, used by anybody, whose umask lets nobody else in."""

    def __init__(self, here: Private, name: str, options: str) -> None:
        self.here = here
        self.where = here.home / name
        here.sh(f"mkdir -p {self.where}", check=True)
        source = f"local:{name}"
        done = here.dlmfs("mount", source, self.where, "-o", f"holder=file,{options}", uid=None)
        assert (done.returncode, done.stderr) == (0, "")

    def run(self, uid: int, groups: str, *command: str) -> Done:
        who = ["setpriv", f"--reuid={uid}", f"--regid={uid}"]
        who += [f"--groups={groups}"] if groups else ["--clear-groups"]
        mask = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
        return self.here.run(*who, *mask, *command, uid=None)

    def dlmfs(self, uid: int, groups: str, *command: str) -> Done:
        program = str(self.here.base / "repo/scripts/dlmfs")
        return self.run(uid, groups, self.here.python, "-I", program, *command)

    def lock(self, uid: int, groups: str, lock: str) -> Done:
        """Says the mode and owners of the lock's file, which may be gone a second later."""
        path = f"{self.where}/{lock}"
        look = ["stat", "-c", "%a %u %g", path]
        return self.dlmfs(uid, groups, "lock", "-n", path, "--", *look)

    def takes(self, uid: int, groups: str, lock: str) -> str:
        done = self.lock(uid, groups, lock)
        assert done.returncode in {0, EX_NOPERM}, done.stderr
        return done.stdout.strip()

    def facts(self, name: str = "") -> str:
        done = self.here.run("stat", "-c", "%a %u %g", self.where / name, uid=None, check=True)
        return done.stdout.strip()

    def end(self) -> None:
        assert self.here.dlmfs("umount", self.where, uid=None).returncode == 0


def test_a_group_shares_its_locks_whoever_comes_first(here: Private) -> None:
    users = Users(here, "group", f"gid={GROUP},umask=007")
    ours = str(GROUP)
    assert users.facts() == f"770 0 {GROUP}"
    for domain, first, second in (("one", 0, USER), ("two", USER, 0), ("three", USER, OTHER)):
        assert users.takes(first, ours, f"{domain}/x") == f"1660 {first} {GROUP}"
        assert users.facts(domain) == f"770 {first} {GROUP}"
        assert users.run(first, ours, "touch", f"{users.where}/{domain}/stays").returncode == 0
        assert users.takes(second, ours, f"{domain}/stays") == f"660 {first} {GROUP}"
        assert users.takes(second, ours, f"{domain}/y")
        assert users.takes(first, ours, f"{domain}/y")
    refused = users.lock(OTHER, "", "one/x")
    assert refused.returncode == EX_NOPERM
    assert "may not be used by this user" in refused.stderr
    assert "docs/users.md" in refused.stderr
    users.end()


def test_everybody_takes_what_anybody_made(here: Private) -> None:
    users = Users(here, "all", "umask=0")
    for lock in ("one/x", "two/y"):
        for uid in (USER, OTHER, 0):
            assert users.takes(uid, "", lock)
    assert users.run(OTHER, "", "sh", "-c", f"exec 9<>{users.where}/one/z").returncode == 0
    assert users.facts("one/z") == f"666 {OTHER} {OTHER}"
    assert users.run(OTHER, "", "mkdir", "-m", "700", f"{users.where}/secret").returncode == 0
    assert users.facts("secret") == f"700 {OTHER} {OTHER}"
    assert not users.takes(USER, "", "secret/x")
    users.end()


def test_each_users_own_as_below_tmp(here: Private) -> None:
    users = Users(here, "own", "mode=1777")
    assert users.facts() == "1777 0 0"
    assert users.takes(USER, "", "his/x")
    assert users.facts("his") == f"700 {USER} {USER}"
    assert not users.takes(OTHER, "", "his/x")
    assert users.run(0, "", "mkdir", f"{users.where}/roots").returncode == 0
    assert users.run(USER, "", "rmdir", f"{users.where}/roots").returncode != 0
    assert users.run(USER, "", "rm", f"{users.where}/his/x").returncode == 0
    assert users.run(OTHER, "", "rmdir", f"{users.where}/his").returncode != 0
    assert users.run(USER, "", "rmdir", f"{users.where}/his").returncode == 0
    users.end()


def test_what_is_asked_of_the_daemon_follows_the_options(here: Private) -> None:
    users = Users(here, "asked", "uid=0,dmode=0777,fmode=0600")
    assert users.takes(0, "", "dom/x")
    for name in ("dom/x", "dom/never", "never/x"):
        for command in ("info", "why"):
            done = users.dlmfs(USER, "", command, f"{users.where}/{name}")
            assert done.returncode == EX_NOPERM, (name, done.stdout, done.stderr)
    users.end()


def test_an_ordinary_user_gives_nothing_to_others(here: Private) -> None:
    where = here.home / "mine"
    here.sh(f"mkdir -p {where}", check=True)

    def mount(options: str, groups: str = "") -> Done:
        program = [here.python, "-I", str(here.base / "repo/scripts/dlmfs")]
        who = ["setpriv", f"--reuid={USER}", f"--regid={USER}"]
        who += [f"--groups={groups}"] if groups else ["--clear-groups"]
        words = ["mount", "local:mine", str(where), "-o", f"holder=file,{options}"]
        return here.run(*who, *program, *words, uid=None)

    for refused in (f"uid={OTHER}", "uid=0", "uid=root", f"gid={GROUP}", "gid=0"):
        done = mount(refused)
        assert done.returncode == 1, (refused, done.stderr)
        assert "only root" in done.stderr
    done = mount(f"uid={USER},gid={GROUP},dmode=3770,fmode=0660", str(GROUP))
    assert (done.returncode, done.stderr) == (0, "")
    here.sh(f"umask 077; mkdir {where}/d && : >{where}/d/x", check=True)
    told = here.sh(f"stat -c '%a %u %g' {where} {where}/d {where}/d/x", check=True).stdout
    assert told.splitlines() == [f"3770 {USER} {GROUP}"] * 2 + [f"660 {USER} {GROUP}"]
    assert here.dlmfs("umount", where).returncode == 0


def blocks() -> list[str]:
    """What the page says to type or to write, of the section about a group."""
    section = PAGE.read_text().split("## A group shares them\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in found]


MACHINE = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
cp -a /etc /mnt/etc
mkdir /mnt/bin
printf '#!/bin/sh\\nexec %s -I %s "$@"\\n' "$1" "$2" >/mnt/bin/dlmfs
chmod 755 /mnt/bin/dlmfs
mount --bind /mnt/etc /etc
mount --bind /mnt/bin /usr/local/bin
PATH=/usr/local/bin:$PATH
look='stat -c "%a %U:%G" /mnt/locks /mnt/locks/jobs /mnt/locks/jobs/report'
www() {
    setpriv --reuid=www-data --regid=www-data --init-groups "$@"
}
. "$3"
www dlmfs lock -n jobs/report -- sh -c "$look"
dlmfs lock -n jobs/report -- true
umount /mnt/locks
mount /mnt/locks
dlmfs lock -n jobs/report -- sh -c "$look"
www dlmfs lock -n jobs/report -- true
umount /mnt/locks
"""
"""A machine of its own as far as the recipe goes, and what its users then do, before and after a remount,
each of them first once."""


def test_the_pages_recipe_works_as_pasted_and_after_a_remount(here: Private) -> None:
    typed = blocks()[0]
    script = here.base / "tmp/recipe"
    here.sh(f"cat >{script} <<'END'\n{typed}END", uid=None, check=True)
    arguments = [here.python, str(here.base / "repo/scripts/dlmfs"), str(script)]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MACHINE, "sh"]
    done = here.run(*command, *arguments, uid=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *("770 root:locks", "770 www-data:locks", "1660 www-data:locks"),
        *("770 root:locks", "770 root:locks", "1660 root:locks"),
    ]


def test_the_pages_other_forms_say_the_same() -> None:
    typed, _, etcd, unit = blocks()[:4]
    shared = "holder=file,gid=locks,umask=007"
    assert f" fuse.dlmfs {shared},nofail 0 0" in typed
    assert f" fuse.dlmfs {shared},_netdev,nofail 0 0" in etcd
    settings = dict(line.split("=", 1) for line in unit.split())
    assert settings == {"SOURCE": "local", "MOUNTPOINT": "/mnt/locks", "OPTIONS": shared}
    assert f"`Options={shared}`" in PAGE.read_text()
