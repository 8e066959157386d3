"""`dlmfs o2dlm-run`: what the program sees, what it does not, and what becomes of its helpers."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlmfs.launch import seccomp, statfs
from dlmfs.launch.seccomp import Call
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes
from tests.o2dlm.conftest import Begin, Start
from tests.o2dlm.programs import TYPE, Programs, Run, o2dlm_run, supervisors
from tests.tools.bench import until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

FUSE_TYPE = "65735546"
ELSEWHERE = ("/", "/proc", "/sys", "/dev", "/dev/null", "/dev/shm")
EX_USAGE, EX_UNAVAILABLE = 2, 69


@pytest.fixture
def where(nodes: Nodes) -> Path:
    """The mount of one node, with a domain."""
    made = nodes.mount("a")
    (made / "dom").mkdir()
    return made


@pytest.fixture
def outside(begin: Begin, programs: Programs, linked: str) -> Run:
    """The same program, run as any other."""
    return begin([programs.path("prog", linked)])


def shell(begin: Begin, where: Path, at: Path, script: str) -> Run:
    return begin(o2dlm_run("-m", where, "--at", at, "--", "sh", "-c", script))


# -- the file system's type ---------------------------------------------------------------------------


def test_only_the_type_differs(
    outside: Run, start: Start, where: Path, at: Path, linked: str
) -> None:
    """All other fields are the mount's own, in its own place and in the fixed one."""
    inside = start(where, linked)
    for call in ("statfs", "fstatfs"):
        own = outside.ask(f"{call} {where}")
        assert own.startswith(f"ok {FUSE_TYPE} ")
        for path in (where, where / "dom", at, at / "dom"):
            assert inside.ask(f"{call} {path}") == own.replace(FUSE_TYPE, TYPE)


def test_other_file_systems_are_untouched(
    outside: Run, start: Start, where: Path, linked: str
) -> None:
    inside = start(where, linked)
    for path in ELSEWHERE:
        for call in ("statfs", "fstatfs"):
            assert inside.ask(f"{call} {path}") == outside.ask(f"{call} {path}")


def test_relative_paths_and_links(start: Start, where: Path, nodes: Nodes) -> None:
    """As the program means them: from its own folder, through symbolic links."""
    (nodes.folder / "link").symlink_to(where)
    inside = start(where, cwd=where)
    for path in (".", "dom", "dom/..", nodes.folder / "link", nodes.folder / "link/dom"):
        assert inside.ask(f"statfs {path}").split()[1] == TYPE
    assert inside.ask("statfs ..").split()[1] != TYPE


@pytest.mark.parametrize("path", ["AT", "/"])
def test_wrong_addresses_and_names(start: Start, where: Path, at: Path, path: str) -> None:
    """The errno is the kernel's, here as there."""
    expected = [errno.EFAULT] * 3 + [errno.ENOENT, errno.ENAMETOOLONG, errno.ENOENT, errno.EBADF]
    words = " ".join(str(code) for code in expected)
    assert start(where).ask(f"faults {path.replace('AT', str(at))}") == f"ok {words}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one kind of system call here")
def test_calls_of_the_32_bit_kind_are_let_alone(start: Start, where: Path, at: Path) -> None:
    """Their numbers mean other things: the number of fstatfs is there that of setfsuid."""
    assert start(where).ask(f"compat {at}") == "ok 1 0"


# -- the namespace -------------------------------------------------------------------------------------


def test_nothing_is_seen_outside(start: Start, where: Path, at: Path) -> None:
    inside = start(where)
    assert inside.ask("caps") == "ok 1 1"
    assert not os.path.ismount(at)
    assert not Path("/sys/module/ocfs2_dlmfs").exists()


def test_other_modules_stay_where_they_are(begin: Begin, where: Path, at: Path) -> None:
    """All that were there, with their parameters; and nobody can make more."""
    code, out, err = shell(begin, where, at, "ls /sys/module; mkdir /sys/module/x").output()
    assert (code, "Read-only" in err) == (1, True)
    assert set(out.split()) == {*os.listdir("/sys/module"), "ocfs2_dlmfs"}
    parameter = next(Path("/sys/module").glob("*/parameters/*"))
    assert shell(begin, where, at, f"ls {parameter}").output()[1] == f"{parameter}\n"


@pytest.fixture
def dlm() -> Iterator[Path]:
    """/dlm, which is not left behind if it was not there."""
    path = Path("/dlm")
    was = path.exists()
    yield path
    if not was and path.exists():
        path.rmdir()


def test_the_usual_place(begin: Begin, where: Path, programs: Programs, dlm: Path) -> None:
    """/dlm, made where it is missing; the program's files are the mount's."""
    run = begin(o2dlm_run("-m", where, programs.path("prog")))
    assert run.ask("init /dlm usual") == "ok"
    assert (where / "usual").is_dir()
    assert os.listdir(dlm) == []


def test_a_mount_that_is_in_its_place_already(begin: Begin, where: Path) -> None:
    command = o2dlm_run("-m", where, "--at", where, "stat", "-f", "--printf=%t", where)
    assert begin(command).output() == (0, TYPE, "")


SHARED = """
set -e
mount --make-rshared /
mount -t proc proc /proc
dlmfs() { "$PYTHON" "$DLMFS" "$@"; }
dlmfs mount "$SOURCE" "$WHERE" -o holder=node
mkfifo go
exec 3<>go
dlmfs o2dlm-run -m "$WHERE" --at "$AT" -- sh -c 'echo up >up; read line <go' &
until test -s up; do sleep 0.02; done
dlmfs umount "$WHERE" 2>/dev/null || echo refused $?
echo >&3
wait
until dlmfs umount "$WHERE" 2>/dev/null; do sleep 0.02; done
echo gone
"""


def test_a_mount_in_use_is_not_unmounted(nodes: Nodes, at: Path) -> None:
    """Where mounts are shared between namespaces, as under systemd, umount says EBUSY."""
    where = nodes.folder / "w"
    where.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SHARED],
        env=os.environ
        | {"PYTHON": DLMFS[0], "DLMFS": DLMFS[1], "WHERE": str(where), "AT": str(at)}
        | {"SOURCE": f"local:{nodes.state}"},
        cwd=nodes.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused 32\ngone\n", "")


# -- the program takes the command's place ------------------------------------------------------------


def test_exit_codes_and_signals(start: Start, where: Path, at: Path) -> None:
    """Its own: a shell makes 128+n of a signal."""
    run = start(where)
    run.tell("exit 7")
    assert run.end() == (7, "")
    for sign in (signal.SIGTERM, signal.SIGPIPE, signal.SIGKILL):
        run = start(where)
        run.tell(f"raise {sign.value}")
        assert run.end() == (-sign, "")
    run = start(where)
    assert run.ask("caps") == "ok 1 1"
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (-signal.SIGINT, "")
    command = " ".join(o2dlm_run("-m", where, "--at", at, "--", "sh", "-c", "'kill -TERM $$'"))
    done = subprocess.run(["sh", "-c", f"{command}; echo $?"], capture_output=True, check=False)
    assert done.stdout == b"143\n"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], EX_USAGE, "which program?"),
        (["-m", "/", "true"], EX_USAGE, "is not a dlmfs mount"),
        (["--at", "/etc/passwd", "true"], EX_USAGE, "is not a folder"),
        (["--at", "/nosuch/dlm", "true"], EX_USAGE, "cannot be made: No such file"),
        (["--frob", "true"], EX_USAGE, "--frob"),
        (["--at", "/dlm", "--bare", "true"], EX_USAGE, "--bare"),
        (["--bare", "/nosuch"], 127, "/nosuch: No such file"),
        (["--bare", "--", "/etc"], 126, "/etc: Permission denied"),
    ],
)
def test_what_cannot_be_run(
    begin: Begin, where: Path, args: list[str], code: int, says: str
) -> None:
    mine = [] if "-m" in args or not args else ["-m", str(where)]
    got, out, err = begin(o2dlm_run(*mine, *args)).output()
    assert (got, out) == (code, "")
    assert err.startswith("dlmfs: ")
    assert err.count("\n") == 1
    assert says in err


def test_not_twice(begin: Begin, where: Path, at: Path) -> None:
    """The kernel allows one who answers: said, and nothing is run."""
    inner = " ".join(o2dlm_run("-m", where, "--at", at, "--", "echo", "run"))
    code, out, err = shell(begin, where, at, inner).output()
    assert (code, out) == (EX_UNAVAILABLE, "")
    assert "answered by another program already" in err


# -- the supervisor ------------------------------------------------------------------------------------


def test_it_is_not_the_programs_affair(begin: Begin, where: Path, at: Path) -> None:
    """No child of the program's, not in its session, deaf to signals; gone when the program is."""
    script = (
        "import os\ntry: os.wait()\nexcept ChildProcessError: print('none', flush=True)\ninput()"
    )
    run = begin(o2dlm_run("-m", where, "--at", at, "--", sys.executable, "-c", script))
    assert run.heard() == "none"
    (pid,) = supervisors(where)
    assert os.getsid(pid) != os.getsid(run.process.pid)
    for sign in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(pid, sign)
    run.tell("end")
    assert run.end() == (0, "")
    until("it is gone", lambda: supervisors(where) == [])


def test_it_hears_no_signal_while_the_program_runs(start: Start, where: Path, at: Path) -> None:
    run = start(where)
    assert run.ask("caps") == "ok 1 1"
    for sign in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        os.kill(supervisors(where)[0], sign)
    assert run.ask(f"statfs {at}").split()[1] == TYPE


def test_it_keeps_no_lock_that_the_program_inherited(nodes: Nodes, at: Path) -> None:
    """A lock's descriptor, open when the command is started: the program's close releases it."""
    a, b = nodes.pair()
    lock = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    script = f"exec {lock}>&-; echo closed; read line"
    command = o2dlm_run("-m", a, "--at", at, "--", "bash", "-c", script)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=[lock]) as process:
        os.close(lock)
        assert process.stdout is not None
        assert process.stdout.readline() == b"closed\n"
        assert nodes.hold(b / "dom/x").wait() == "held"
        process.communicate(timeout=PATIENCE_S)


def test_it_lives_as_long_as_what_the_program_left_running(
    start: Start, where: Path, at: Path, nodes: Nodes
) -> None:
    """A daemon that the program started is answered after the program's end."""
    base = nodes.folder / "daemon"
    os.mkfifo(f"{base}.fifo")
    run = start(where)
    assert run.ask(f"daemon {base}").startswith("ok ")
    assert run.end() == (0, "")
    assert len(supervisors(where)) == 1
    Path(f"{base}.fifo").write_text(f"{at}\n")
    until(
        "it wrote", lambda: Path(f"{base}.out").exists() and Path(f"{base}.out").read_text() != ""
    )
    assert Path(f"{base}.out").read_text() == f"{TYPE}\n"
    until("the supervisor is gone", lambda: supervisors(where) == [])


def test_without_it_calls_fail_and_nothing_hangs(start: Start, where: Path, at: Path) -> None:
    """Killed: ENOSYS for the two calls from then on; locks that are held go on as they are."""
    run = start(where)
    assert run.ask(f"init {at} dom") == "ok"
    assert run.ask("lock x ex") == "ok"
    os.kill(supervisors(where)[0], signal.SIGKILL)
    until("it is gone", lambda: supervisors(where) == [])
    assert run.ask(f"statfs {at}") == f"errno {errno.ENOSYS}"
    assert run.ask("fstatfs /") == f"errno {errno.ENOSYS}"
    assert run.ask(f"fork init {at} dom") == "STATFS"
    assert run.ask("write x hello") == "ok"
    assert run.ask("unlock x") == "ok"
    assert run.ask("destroy") == "ok"


def test_killed_in_the_middle_of_a_call(start: Start, nodes: Nodes, where: Path, at: Path) -> None:
    """A call that waits for the supervisor when it dies fails as well."""
    run = start(where)
    assert run.ask("caps") == "ok 1 1"
    (pid,) = supervisors(where)
    os.kill(pid, signal.SIGSTOP)
    run.tell("statfs /")
    assert run.heard(0.3) is None
    os.kill(pid, signal.SIGKILL)
    assert run.heard() == f"errno {errno.ENOSYS}"


def test_a_stopped_daemon_stops_only_its_own_callers(
    begin: Begin, nodes: Nodes, where: Path, at: Path
) -> None:
    """Who asks about its mount waits, and can be killed; others are answered meanwhile."""
    script = f"stat -f {at} & sleep 0.3; stat -f --printf=%t /; echo; read line; kill -9 $!; wait"
    pid = nodes.pid(where)
    os.kill(pid, signal.SIGSTOP)
    try:
        run = shell(begin, where, at, script)
        assert run.heard() is not None
        run.tell("end")
        assert run.output()[:2] == (0, "")
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_program_killed_while_it_asks(begin: Begin, start: Start, where: Path, at: Path) -> None:
    """The supervisor goes on for the program's other processes."""
    loop = "while :; do stat -f / >/dev/null; done & echo $!; read line; kill -9 $!"
    script = f"{loop}; stat -f --printf='%t\\n' {at}; read line"
    run = begin(o2dlm_run("-m", where, "--at", at, "--", "sh", "-c", script))
    assert run.heard() is not None
    for _ in range(2):
        run.tell("go on")
    assert run.output()[:2] == (0, f"{TYPE}\n")


def test_it_answers_many_threads(begin: Begin, where: Path, at: Path) -> None:
    """Fifty threads at once, on the mount and beside it: no answer is another's."""
    script = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
def ask(path, expected):
    for _ in range(20):
        data = (ctypes.c_long * 32)()
        if libc.statfs(path.encode(), data) or (data[0] == 0x76a9f425) != expected:
            os._exit(1)
threads = [threading.Thread(target=ask, args=(path, path != "/"))
           for path in (sys.argv[1], "/") * 25]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
"""
    command = o2dlm_run("-m", where, "--at", at, "--", sys.executable, "-c", script, at)
    assert begin(command).output() == (0, "done\n", "")


def test_only_who_waits_is_answered(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller was killed and its number may be another's: nothing is written there. All that is
    found by the number was opened before the kernel was asked."""
    fd = os.open(where, os.O_RDONLY)
    data = ctypes.create_string_buffer(statfs.STATFS_SIZE)
    args = (fd, ctypes.addressof(data), 0, 0, 0, 0)
    call = Call(1, os.getpid(), seccomp.abi().fstatfs, args)

    def answered(waits: bool) -> int | None:
        with monkeypatch.context() as patch:

            def still_waits(*_: object) -> bool:
                patch.setattr(os, "open", None)
                return waits

            patch.setattr(seccomp, "still_waits", still_waits)
            return statfs._answer(-1, call)

    try:
        assert answered(False) is None
        assert data.raw == bytes(statfs.STATFS_SIZE)
        assert answered(True) == 0
        assert data.raw[:4] == bytes.fromhex(TYPE)[::-1]
    finally:
        os.close(fd)
