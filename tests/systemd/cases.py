"""What a booted systemd makes of our units, mounts and sessions: played in it, by scripts/test-systemd.

One function, one case, in the order in which they stand: the first one finds the system as it came up.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 60.0
CASES: list[Callable[[], None]] = []

LOCKS = "dlmfs@locks.service"
REPORTS = "one-node@reports.service"
TOLD = Path("/told")


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd="/"
    )
    assert done.returncode == 0 or not check, f"{words}: {done.returncode}: {done.stderr}"
    return done.stdout


def systemctl(*words: str, check: bool = True) -> str:
    return run("systemctl", "--no-pager", *words, check=check)


def shown(unit: str, name: str) -> str:
    return systemctl("show", "--value", f"--property={name}", unit).strip()


def is_up(unit: str) -> bool:
    return shown(unit, "ActiveState") == "active"


def until(what: str, holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def until_status(unit: str, *words: str) -> str:
    """Until `systemctl status` says one of these; the line."""

    def says() -> bool:
        return any(word in shown(unit, "StatusText") for word in words)

    until(f"{unit} says {words}", says)
    return shown(unit, "StatusText")


def works() -> bool:
    """The program that runs on one node runs, under its lock."""
    return is_up(REPORTS) and run("pgrep", "-fx", "/bin/sleep infinity", check=False) != ""


def until_works() -> None:
    until("the mount answers", lambda: is_up(LOCKS))
    until("the service that runs on one node runs", works)


def not_red(*units: str) -> None:
    for unit in units:
        assert shown(unit, "ActiveState") == "inactive", systemctl("status", unit, check=False)


def is_mounted(where: str) -> bool:
    return f" {where} fuse.dlmfs " in Path("/proc/mounts").read_text()


def is_dead(where: str) -> bool:
    try:
        os.statvfs(where)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def daemon_of(where: str) -> int:
    for line in run("dlmfs", "status", where).splitlines():
        if line.startswith(where):
            return int(line.split(" pid ")[1].split()[0])
    raise AssertionError(f"no daemon of {where}")


@contextmanager
def holder(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has a lock, and nobody to end it when that is lost."""
    script = f'mkdir -p "{os.path.dirname(path)}"; exec 9<>{path}; echo; exec sleep 1000'
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# -- the units -----------------------------------------------------------------------------------------


@case
def a_late_etcd_at_boot() -> None:
    """More than five attempts, systemd's usual limit, and all comes up when the store does."""
    until("many attempts", lambda: int(shown(LOCKS, "NRestarts")) > 5)
    until_status(LOCKS, "etcd at 127.0.0.1:2379")
    assert not is_up(LOCKS)
    assert not works()
    systemctl("start", "etcd")
    until_works()
    line = until_status(LOCKS, "HEALTHY")
    assert "lease of 5 s" in line, line
    assert line in systemctl("status", LOCKS)


@case
def an_outage_with_a_fence() -> None:
    """The daemon lives through it, fed watchdog and all, and says how it is; the program is ended, and
    started when the lock is to be had again."""
    daemon = shown(LOCKS, "MainPID")
    program = shown(REPORTS, "MainPID")
    systemctl("stop", "etcd")
    until_status(LOCKS, "FENCED", "REJOINING")
    until("the program is ended", lambda: shown(REPORTS, "MainPID") != program)
    time.sleep(6)  # longer than the watchdog waits: there is nothing to be seen of it
    until_status(LOCKS, "FENCED", "REJOINING")
    assert not works()
    systemctl("start", "etcd")
    until_status(LOCKS, "HEALTHY")
    until_works()
    assert shown(LOCKS, "MainPID") == daemon


@case
def a_killed_daemon() -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV):
        daemon = shown(LOCKS, "MainPID")
        program = shown(REPORTS, "MainPID")
        os.kill(int(daemon), number)
        until("another daemon", lambda: shown(LOCKS, "MainPID") not in ("0", daemon))  # noqa: B023
        until("another program", lambda: shown(REPORTS, "MainPID") not in ("0", program))  # noqa: B023
        until_works()


@case
def stop_and_start() -> None:
    """What runs under the locks is stopped first, stays stopped, and comes back with them."""
    systemctl("stop", LOCKS)
    not_red(LOCKS, REPORTS)
    assert not is_mounted("/mnt/locks")
    time.sleep(4)  # twice RestartSec
    not_red(LOCKS, REPORTS)
    systemctl("start", LOCKS)
    until_works()
    systemctl("restart", LOCKS)
    until_works()


@case
def the_service_on_one_node_is_stopped() -> None:
    systemctl("stop", REPORTS)
    not_red(REPORTS)
    assert is_up(LOCKS)
    systemctl("start", REPORTS)
    until_works()


@case
def a_stop_with_open_files() -> None:
    systemctl("start", "dlmfs@jobs")
    assert until_status("dlmfs@jobs", "HEALTHY").startswith("HEALTHY: node ")
    with holder("/mnt/jobs/d/x"):
        systemctl("stop", "dlmfs@jobs")
        not_red("dlmfs@jobs")
        assert not is_mounted("/mnt/jobs")


@case
def a_daemon_that_stands_still() -> None:
    systemctl("start", "dlmfs@jobs")
    daemon = shown("dlmfs@jobs", "MainPID")
    os.kill(int(daemon), signal.SIGSTOP)
    until("another daemon", lambda: shown("dlmfs@jobs", "MainPID") not in ("0", daemon))
    until("it answers", lambda: is_up("dlmfs@jobs"))
    assert "watchdog" in run("journalctl", "--no-pager", "-u", "dlmfs@jobs").lower()
    run("dlmfs", "lock", "/mnt/jobs/d/x", "--", "true")
    systemctl("stop", "dlmfs@jobs")
    not_red("dlmfs@jobs")


@case
def a_daemon_without_f() -> None:
    """It stays in the foreground all the same."""
    systemctl("start", "dlmfs@plain")
    daemon = daemon_of("/mnt/plain")
    assert shown("dlmfs@plain", "MainPID") == str(daemon)
    time.sleep(6)  # the watchdog is fed
    assert is_up("dlmfs@plain")
    assert daemon_of("/mnt/plain") == daemon
    systemctl("stop", "dlmfs@plain")
    not_red("dlmfs@plain")


@case
def a_mount_that_a_service_makes() -> None:
    """Its daemon does not speak in that service's name."""
    script = "mkdir -p /mnt/other; dlmfs mount local:other /mnt/other; exec sleep 1000"
    properties = ["--property=Type=notify", "--property=NotifyAccess=all", "--no-block"]
    run("systemd-run", "--quiet", "--unit=other", *properties, "sh", "-c", script)
    until("it is mounted", lambda: is_mounted("/mnt/other"))
    run("dlmfs", "lock", "/mnt/other/d/x", "--", "true")
    assert shown("other", "ActiveState") == "activating"
    assert shown("other", "StatusText") == ""
    run("dlmfs", "umount", "/mnt/other")
    systemctl("stop", "other")


# -- mount(8)'s ways -------------------------------------------------------------------------------------


def comes_and_goes(where: str) -> None:
    """A mount unit's life: it works, and is reloaded with locks held; a dead daemon is not noticed, and
    restart mends it."""
    unit = f"{where.strip('/').replace('/', '-')}.mount"
    run("dlmfs", "lock", f"{where}/d/x", "--", "true")
    until("systemd knows", lambda: is_up(unit))
    assert "holder=file" in run("dlmfs", "status", where)
    daemon = daemon_of(where)
    with holder(f"{where}/d/x"):
        systemctl("reload", unit)
    run("mount", "-o", "remount,ro", where)
    assert os.statvfs(where).f_flag & os.ST_RDONLY
    systemctl("reload", unit)
    assert not os.statvfs(where).f_flag & os.ST_RDONLY
    assert daemon_of(where) == daemon
    os.kill(daemon_of(where), signal.SIGKILL)
    until("the mount is dead", lambda: is_dead(where))
    assert is_up(unit)
    systemctl("restart", unit)
    run("dlmfs", "lock", f"{where}/d/x", "--", "true")
    systemctl("stop", unit)
    not_red(unit)
    assert not is_mounted(where)


@case
def an_fstab_line() -> None:
    until("it was mounted at boot", lambda: is_mounted("/mnt/fstab"))
    comes_and_goes("/mnt/fstab")
    run("mount", "/mnt/fstab")
    run("dlmfs", "lock", "/mnt/fstab/d/x", "--", "true")
    run("umount", "/mnt/fstab")


@case
def a_mount_unit() -> None:
    systemctl("start", "mnt-unit.mount")
    comes_and_goes("/mnt/unit")


@case
def an_automount() -> None:
    if not Path("/dev/autofs").exists():
        print("   /dev/autofs is not here: left out", flush=True)
        return
    systemctl("start", "mnt-auto.automount")
    run("dlmfs", "lock", "/mnt/auto/d/x", "--", "true")
    until("systemd knows", lambda: is_up("mnt-auto.mount"))
    os.kill(daemon_of("/mnt/auto"), signal.SIGKILL)
    until("the mount is dead", lambda: is_dead("/mnt/auto"))
    systemctl("restart", "mnt-auto.mount")
    run("dlmfs", "lock", "/mnt/auto/d/x", "--", "true")
    systemctl("stop", "mnt-auto.automount")
    until("it is gone", lambda: not is_mounted("/mnt/auto"))


# -- what a user has outlives his sessions ---------------------------------------------------------------

BOB = Path("/home/bob")
BUSY = 1


def as_bob(script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """In a session of his own."""
    done = subprocess.run(
        ["su", "-", "bob", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{script}: {done}"
    return done


def is_busy(where: str = "m", via: str = "") -> bool:
    """Whether his lock is taken, as he sees it."""
    done = as_bob(f"{via} dlmfs lock -n {BOB}/{where}/d/x -- true", check=False)
    assert done.returncode in (0, BUSY), done
    return done.returncode == BUSY


def log_out() -> None:
    """A session of his comes and goes, and with it what he has in /dev/shm."""
    shm = Path("/dev/shm/of-bob")
    until("logind knows no session of his", lambda: "bob" not in run("loginctl", "list-users"))
    as_bob(f"touch {shm}; loginctl --no-pager list-sessions | grep bob")
    until("his last session is over", lambda: not shm.exists())


@case
def a_users_mount_outlives_his_sessions() -> None:
    """Two programs of his outside of any session: the daemon, and one that holds a lock."""
    old = BOB / ".local/state/dlmfs/boot-0123456789abcdef"
    as_bob(f"mkdir -p m n c {old}; touch {old}/default.db")
    words = ["--quiet", "--uid=bob", "--property=Type=forking"]
    run("systemd-run", *words, "dlmfs", "mount", "local", f"{BOB}/m", "-o", "holder=file")
    assert not old.exists(), "a state of before a reboot"
    lock = ["dlmfs", "lock", f"{BOB}/m/d/x", "--", "sleep", "infinity"]
    run("systemd-run", "--quiet", "--uid=bob", "--unit=holds", *lock)
    until("it is held", is_busy)
    log_out()
    log_out()
    assert is_up("holds")
    assert is_busy()
    assert "HEALTHY" in as_bob("dlmfs status ~/m").stdout
    assert "HEALTHY" in run("dlmfs", "status", f"{BOB}/m")
    assert "of this user" not in as_bob("dlmfs doctor", check=False).stdout


@case
def login_cron_and_lingering_services_meet() -> None:
    as_bob("dlmfs mount local ~/n -o holder=file")
    assert is_busy("n")
    log = Path("/tmp/cron")
    script = f"mount local {BOB}/c -o holder=file; echo $? >{log}.mount"
    script += f"; /usr/local/bin/dlmfs lock -n {BOB}/c/d/x -- true; echo $? >{log}.lock"
    crontab = Path("/etc/cron.d/bob")
    crontab.write_text(f"* * * * * bob test -e {log}.mount || /usr/local/bin/dlmfs {script}\n")
    run("loginctl", "enable-linger", "bob")
    via = "XDG_RUNTIME_DIR=/run/user/1000 systemd-run --user --wait --quiet --collect"
    until("a lingering service meets them", lambda: is_busy("n", via))
    until("cron has run", Path(f"{log}.lock").exists, 2 * PATIENCE_S)
    until("it has ended", lambda: Path(f"{log}.lock").read_text() != "")
    assert Path(f"{log}.mount").read_text() == "0\n"
    assert Path(f"{log}.lock").read_text() == f"{BUSY}\n"
    crontab.unlink()
    systemctl("stop", "holds")
    until("it is free", lambda: not is_busy("n"))
    for where in ("m", "n", "c"):
        as_bob(f"dlmfs umount ~/{where}")
    run("loginctl", "disable-linger", "bob")


@case
def who_has_no_home_is_told() -> None:
    run("su", "-s", "/bin/sh", "carol", "-c", "mkdir -p /tmp/carol")
    words = ["su", "-s", "/bin/sh", "carol", "-c", "dlmfs mount local /tmp/carol -o holder=file"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "loginctl enable-linger" in done.stderr, done.stderr
    assert "/nonexistent is not there" in done.stderr, done.stderr
    told = run("su", "-s", "/bin/sh", "carol", "-c", "dlmfs doctor", check=False)
    assert "loginctl enable-linger" in told
    run("su", "-s", "/bin/sh", "carol", "-c", "dlmfs umount /tmp/carol")


# -- all of them -----------------------------------------------------------------------------------------


def main(wanted: list[str]) -> int:
    failed = 0
    for each in CASES:
        name = each.__name__
        if wanted and name not in wanted:
            continue
        begun = time.monotonic()
        try:
            each()
        except Exception:
            failed += 1  # and the next ones may, for that
            print(f"FAIL {name}\n{traceback.format_exc()}", flush=True)
            words = ["-n", "60", "-o", "short-monotonic", "-t", "systemd", "-t", "dlmfs"]
            print(run("journalctl", "--no-pager", *words), flush=True)
        else:
            print(f"ok   {name} {time.monotonic() - begun:.1f} s", flush=True)
    print(f"{failed} of the cases failed" if failed else "pass", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main((TOLD / "wanted").read_text().split()))
