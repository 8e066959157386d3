"""Whether this host, and this user on it, can mount a dlmfs and rely on it."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dlmfs import folders, fstype, home, proc
from dlmfs.cli.checks.finding import Finding, fail, ok, warn
from dlmfs.control import control_folders
from dlmfs.errors import DlmfsError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.store import statefile

PYTHON: Final = (3, 11)
CAP_SYS_ADMIN: Final = 21
FUSE_CONF: Final = Path("/etc/fuse.conf")
CLOCKS: Final = Path("/sys/devices/system/clocksource/clocksource0")
SLOW_CLOCKS: Final = ("jiffies", "refined-jiffies", "acpi_pm", "hpet", "pit")
FILES_MIN: Final = 4096


def check(*, etcd: bool) -> Iterator[Finding]:
    """`etcd`: a cluster engine is in use, or about to be."""
    yield _python()
    yield from _extras(etcd=etcd)
    yield from _device()
    yield from _right_to_mount()
    yield _request_timeout()
    yield _control_folder()
    yield from _sessions()
    yield from _dead_sockets()
    yield _clock()
    yield _suspended(etcd=etcd)
    yield _open_files()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        return fail("python", f"{version} is too old", "run dlmfs with Python 3.11 or later")
    return ok("python", f"{version} ({sys.executable})")


def _extras(*, etcd: bool) -> Iterator[Finding]:
    missing = [name for name in ("grpc", "google.protobuf") if not _found(name)]
    if not missing:
        yield ok("extras", "the etcd engine's libraries are installed")
    elif etcd:
        names = " and ".join(missing)
        yield fail(
            "extras",
            f"the etcd engine needs {names}",
            f"{sys.executable} -m pip install 'dlmfs[etcd]'",
        )
    else:
        yield ok(
            "extras", "no etcd engine (pip install 'dlmfs[etcd]' if machines are to share locks)"
        )


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# -- FUSE ------------------------------------------------------------------------------------------


def _device() -> Iterator[Finding]:
    about, device = "fuse", fuse_mount.DEVICE
    if not os.path.exists(device):
        yield fail(about, f"{device} does not exist", f"modprobe fuse; {fuse_mount.CONTAINER}")
        return
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        yield fail(
            about, f"{device} may not be opened", f"chmod 666 {device}; {fuse_mount.CONTAINER}"
        )
    except OSError as error:
        yield fail(about, f"{device} cannot be opened: {error.strerror}", "modprobe fuse")
    else:
        yield ok(about, f"{device} can be opened")


def _right_to_mount() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield _root_may_mount()
        return
    program = shutil.which("fusermount3")
    if program is None:
        yield fail(
            "mounting", "only root can mount without fusermount3", "install the package fuse3"
        )
    elif not _is_privileged(program):
        yield fail(
            "mounting",
            f"{program} is not set-user-ID root",
            f"chown root {program}; chmod u+s {program}",
        )
    else:
        yield ok("mounting", f"by {program}")
    yield _allow_other()


def _root_may_mount() -> Finding:
    held = proc.number(proc.status("self").get(b"CapEff"), 16) or 0
    if held >> CAP_SYS_ADMIN & 1:
        return ok("mounting", "as root")
    return fail("mounting", "this root may not mount (no CAP_SYS_ADMIN)", fuse_mount.CONTAINER)


def _is_privileged(program: str) -> bool:
    info = os.stat(program)
    if info.st_uid == 0 and info.st_mode & stat.S_ISUID:
        return True
    try:
        return bool(os.getxattr(program, "security.capability"))
    except OSError:
        return False


def _allow_other() -> Finding:
    about, line = "allow_other", "user_allow_other"
    try:
        lines = FUSE_CONF.read_text("utf-8", "replace").split("\n")
    except OSError as error:
        lines = []
        if not isinstance(error, FileNotFoundError):
            return warn(
                "fuse-conf", about, f"{FUSE_CONF}: {error.strerror}", f"chmod 644 {FUSE_CONF}"
            )
    if any(text.strip() == line for text in lines):
        return ok(about, "may be used by every user")
    return ok(
        about, f"is root's, until {FUSE_CONF} has the line `{line}`; only -o allow_other needs it"
    )


def _request_timeout() -> Finding:
    seconds = fuse_mount.request_timeout_s()
    if not seconds:
        return ok("waiting", "the kernel lets an open wait for a lock as long as it takes")
    return fail(
        "waiting",
        f"the kernel aborts a mount on which an open waits for a lock longer than {seconds} s",
        "sysctl -w fs.fuse.default_request_timeout=0 fs.fuse.max_request_timeout=0",
    )


# -- places ----------------------------------------------------------------------------------------


def _control_folder() -> Finding:
    about, uid = "control", os.getuid()
    wrong = ""
    for folder in control_folders(uid):
        for part in (folder, folder.parent):
            if not part.exists():
                continue
            info = part.lstat()
            if info.st_uid not in (0, uid) and part.parent.stat().st_mode & stat.S_ISVTX:
                continue  # one beside it is made: nobody keeps another from that
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != uid or info.st_mode & 0o022:
                wrong = wrong or f"{part} is not a folder that only this user can write"
                break
        else:
            nearest = next(p for p in (folder, *folder.parents) if p.exists())
            if os.access(nearest, os.W_OK | os.X_OK):
                return ok(about, f"the daemons' sockets are in {folder}")
            wrong = wrong or f"{nearest} cannot be written"
    return fail(about, f"no place for the daemons' sockets: {wrong}", "remove it, or mend its mode")


def _dead_sockets() -> Iterator[Finding]:
    """Sockets that no daemon listens on any more, and the deadlines beside them. Those of other
    mount namespaces do listen."""
    dead = []
    for folder in control_folders(os.getuid()):
        if not os.access(folder, os.R_OK | os.X_OK):
            continue
        for path in sorted(folder.glob("*.sock")):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(1.0)
                try:
                    sock.connect(str(path))
                except ConnectionRefusedError:
                    left = (path, path.with_suffix(".lease"))
                    dead += [str(each) for each in left if each.exists()]
                except OSError:
                    continue
    if dead:
        yield warn(
            "dead-files", "control", f"{len(dead)} files of dead daemons", f"rm {' '.join(dead)}"
        )


def _sessions() -> Iterator[Finding]:
    """Whether what a user's daemons keep outlives his sessions."""
    lost = home.lost_at_logout(os.getuid())
    if lost is not None:
        yield warn("sessions", "sessions", *lost)


def state_folder(path: Path, *, default: bool) -> Finding:
    """Whether the embedded engine can keep its state there. Makes nothing."""
    about, folder = "state", path.parent
    if default and home.is_of_this_boot(folder):
        return ok(
            about,
            f"{folder}: outlives the user's sessions, and is not waited for; empty after a reboot",
        )
    if default and not folders.owned(str(folder), os.getuid()):
        parent = folder.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            return fail(
                about, f"{folder} cannot be made: {parent} is not writable", "mount as root once"
            )
        kind = fstype.fs_type(parent)
    else:
        try:
            place = statefile.prepare(path, default=default)
        except DlmfsError as error:
            what, _, mend = str(error).rpartition(": ")
            return fail(about, what, mend)
        os.close(place.folder)
        kind = place.kind
    if kind in fstype.VOLATILE:
        return ok(about, f"{folder} is in memory ({kind}): fast, and empty after a reboot")
    if not default:
        return ok(
            about,
            f"{folder} is on {kind}: values outlive a power failure, commits wait for the medium",
        )
    return warn(
        "state-on-disk",
        about,
        f"{folder} is on {kind}, not in memory: each commit waits for the medium",
        "mount a tmpfs on /run or /dev/shm",
    )


# -- time, files -----------------------------------------------------------------------------------


def _clock() -> Finding:
    try:
        current = (CLOCKS / "current_clocksource").read_text("utf-8", "replace").strip()
    except OSError:
        return ok("clock", "the kernel does not tell its clock source")
    if current in SLOW_CLOCKS:
        return warn(
            "clock",
            "clock",
            f"the clock source is {current}: slow, and the kernel may have found a better one unstable",
            "see `dmesg | grep -i clocksource`; boot with tsc=reliable where that is true",
        )
    return ok("clock", f"source {current}")


def _suspended(*, etcd: bool) -> Finding:
    boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
    asleep = boottime - time.clock_gettime(time.CLOCK_MONOTONIC)
    if asleep < 1.0:
        return ok("suspend", "this machine has not been suspended since it started")
    says = f"this machine was suspended for {asleep:.0f} s in all since it started"
    if not etcd:
        return ok("suspend", says + "; nodes of one host sleep together")
    return warn(
        "suspend",
        "suspend",
        says + ": a node that sleeps longer than 0.67 of its lease time loses its locks",
        "keep machines that hold cluster locks awake (systemd-inhibit, or mask sleep.target)",
    )


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < FILES_MIN:
        return warn(
            "open-files",
            "files",
            f"no more than {hard} files may be open at once",
            "raise it: ulimit -Hn, LimitNOFILE=",
        )
    return ok("files", "no bound" if hard < 0 else f"up to {hard} open at once")
