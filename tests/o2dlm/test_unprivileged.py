"""`dlmfs o2dlm-run` as an ordinary user: in a user namespace, and without any."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S
from tests.o2dlm.conftest import Begin
from tests.o2dlm.programs import TYPE, Programs, Run
from tests.tools.private import USER, Private, missing, private

pytestmark = [pytest.mark.fuse, pytest.mark.root]

EX_NOPERM = 77


@pytest.fixture(scope="module")
def here(programs: Programs) -> Iterator[Private]:
    """One place for the tests of this module; the programs are in its folder `host`."""
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
    with private(programs.folder) as made:
        if made.run("unshare", "--user", "--mount", "true").returncode:
            if os.environ.get("DLMFS_NO_SKIP"):
                pytest.fail("no user namespaces for ordinary users here")
            pytest.skip("no user namespaces for ordinary users here")
        yield made


@pytest.fixture
def pair(here: Private) -> Iterator[tuple[Path, Path]]:
    """Two mounts of USER, and a folder `at` in the place of /dlm."""
    here.sh(f"mkdir -p {here.home}/at", check=True)
    made = here.mount("a"), here.mount("b")
    try:
        yield made
    finally:
        for where in made:
            here.dlmfs("umount", "-l", where)


def command(here: Private, *args: str | Path) -> list[str]:
    return here.command(here.python, "-I", here.base / "repo/scripts/dlmfs", "o2dlm-run", *args)


@contextlib.contextmanager
def started(here: Private, *args: str | Path, linked: str = "static") -> Iterator[Run]:
    run = Run(command(here, *args, "--", here.base / "host" / f"prog-{linked}"))
    try:
        yield run
    finally:
        run.close()


def test_all_calls_between_two_nodes(here: Private, pair: tuple[Path, Path], linked: str) -> None:
    """Type, fixed place, notices, values: nothing that root prepared but FUSE itself."""
    at = here.home / "at"
    options = [("-m", where, "--at", at) for where in pair]
    with started(here, *options[0], linked=linked) as one, started(here, *options[1]) as other:
        for run in (one, other):
            assert run.ask(f"statfs {at}").split()[1] == TYPE
            assert run.ask("caps") == "ok 1 1"
            assert run.ask(f"init {at} dom") == "ok"
        assert one.ask("bast x ex") == "ok"
        assert one.ask("write x hello") == "ok"
        assert other.ask("lock x ex try") == "TRYLOCK_FAILED"
        other.tell("lock x ex")
        assert one.ask(f"poll {int(PATIENCE_S * 1000)}") == "ok 1"
        assert one.ask("unlock x") == "ok"
        assert other.heard() == "ok"
        assert other.ask("read x") == "ok 64 hello"
        for run in (one, other):
            assert run.ask("destroy") == "ok"


def test_the_program_is_who_its_caller_is(
    begin: Begin, here: Private, pair: tuple[Path, Path]
) -> None:
    """No right is gained in the namespace, and the files it makes are the caller's."""
    at = here.home / "at"
    script = f"id -u; id -g; grep CapEff /proc/self/status; mkdir {at}/mine; umount {at}"
    run = begin(command(here, "-m", pair[0], "--at", at, "--", "sh", "-c", script))
    code, out, err = run.output()
    assert out.split() == [str(USER), str(USER), "CapEff:", "0" * 16]
    assert (code != 0, "umount" in err) == (True, True)
    assert here.sh(f"stat -c %u {pair[0]}/mine").stdout == f"{USER}\n"


def test_a_place_that_is_missing(begin: Begin, here: Private, pair: tuple[Path, Path]) -> None:
    """Only root can make it, and the message says what to do."""
    run = begin(command(here, "-m", pair[0], "--at", "/nosuch-dlm", "--", "true"))
    code, out, err = run.output()
    assert (code, out, err.count("\n")) == (EX_NOPERM, "", 1)
    assert "`mkdir /nosuch-dlm` once as root" in err


def test_without_a_namespace(here: Private, pair: tuple[Path, Path], linked: str) -> None:
    """--bare: the type only, and no notices; set-user-ID programs give nothing."""
    with started(here, "-m", pair[0], "--bare", linked=linked) as run:
        assert run.ask("caps") == "ok 0 0"
        assert run.ask(f"init {pair[0]} dom") == "ok"
        assert run.ask("bast x ex") == "BAST_UNSUPPORTED"
        assert run.ask("lock x ex") == "ok"
        status = Path(f"/proc/{inner(run)}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status


def inner(run: Run) -> int:
    """The program's process: what nsenter became, or the child it waits for."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text()
    return int(children.split()[0]) if children else run.process.pid


def test_where_namespaces_are_forbidden(
    begin: Begin, here: Private, pair: tuple[Path, Path]
) -> None:
    """Said, with what to do; a user namespace that may hold no further one is such a place."""
    args = command(here, "-m", pair[0], "--at", here.home / "at", "--", "true")
    forbid = "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all "
    forbid += '--inh-caps=-all setpriv --no-new-privs "$@"'
    words = here.command("unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh")
    code, out, err = begin([*words, *args[args.index(here.python) :]]).output()
    assert (code, out) == (EX_NOPERM, ""), err
    assert "`--bare` does without" in err


REFUSED = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from dlmfs.errors import NotPermitted
from dlmfs.launch import seccomp, statfs
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
try:
    with statfs.start(sys.argv[2]) as supervisor:
        statfs.hand_over(supervisor, seccomp.install(statfs.numbers()))
except NotPermitted as error:
    print(error)
"""
"""A process that nobody may look into (PR_SET_DUMPABLE), as with Yama's ptrace_scope 2."""


def test_a_supervisor_that_may_not_answer_says_so(here: Private, pair: tuple[Path, Path]) -> None:
    done = here.py(REFUSED, here.base / "repo/src", pair[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "may not write to the program's memory" in done.stdout
