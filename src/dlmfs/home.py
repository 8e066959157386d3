"""A user's place in his home, for what his daemons keep as long as the machine is up: state, sockets,
deadlines. Root has /run.

When the last session of a user ends, cron's among them, systemd-logind removes all that he has in
/dev/shm (logind.conf(5), RemoveIPC=) and /run/user/UID; system users, and those that linger, are spared.
His home stays.

Rules of this file
------------------
* Where it is follows from the list of users, not from the environment: a login shell, cron and a
  lingering service must meet in one lock space.
* What the kernel had in memory is over with it: each boot has a folder of its own. So nothing has to
  reach the disk in time, and a state of before a reboot is not taken for one of now.
* Not in a home that other machines have, too, or that some program makes: SQLite's locks and shared
  memory would not reach across.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from pathlib import Path
from typing import Final, NamedTuple

from dlmfs import folders, fstype, proc
from dlmfs.errors import BadState

BELOW: Final = ".local/state/dlmfs"
BOOT: Final = "boot-"
LENGTH_MAX: Final = 80
"""Bytes of the folder's path: what is called MAJOR-MINOR.sock in it must fit into a socket's address."""


class Place(NamedTuple):
    """The folder, which may have to be made; `why` it cannot be used, or None."""

    folder: str
    why: str | None


def folder_of(uid: int) -> str | None:
    """What dlmfs keeps in a user's home, for longer than a boot too; None for one without a home."""
    try:
        return f"{pwd.getpwuid(uid).pw_dir.rstrip('/')}/{BELOW}"
    except KeyError:
        return None


def _boot() -> str:
    """The name of this boot's folder; empty if the kernel does not say which boot it is."""
    told = (
        (proc.read("sys", "kernel", "random", "boot_id") or b"").strip().decode("ascii", "replace")
    )
    digits = told.replace("-", "")[:16]
    return BOOT + digits if len(digits) == 16 and digits.isalnum() else ""


def is_of_this_boot(folder: Path) -> bool:
    """Whether a folder is one of those that `of_this_boot` names."""
    boot = _boot()
    return bool(boot) and str(folder).endswith(f"/{BELOW}/{boot}")


def path_of(uid: int) -> str | None:
    """Where another process would look for this user's; None if he has no such place."""
    above, boot = folder_of(uid), _boot()
    return f"{above}/{boot}" if above is not None and boot else None


def of_this_boot(uid: int) -> Place:
    """This process's user's folder for this boot, and whether it is fit; makes nothing."""
    path = path_of(uid)
    if path is None:
        return Place("", "this user has no home")
    return Place(path, _unfit(path, uid))


def _unfit(path: str, uid: int) -> str | None:
    home = path[: -len(f"/{BELOW}/{os.path.basename(path)}")]
    if len(os.fsencode(path)) > LENGTH_MAX:
        return f"the home {home} has too long a path"
    there = path
    while not os.path.isdir(there) and len(there) > len(home):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        return f"the home {home} is not there"
    kind = fstype.fs_type(Path(there))
    if fstype.is_remote(kind):
        return f"the home {home} is on a network or FUSE file system ({kind})"
    if os.lstat(there).st_uid not in (0, uid) or not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written"
    try:
        os.close(folders.enter(there))
    except (OSError, BadState) as error:
        return str(error)
    return None


def make(path: str) -> None:
    """Make this user's folder, and remove those of former boots. Raises BadState, OSError."""
    os.close(folders.make_missing(path, 0o700))
    above, boot = os.path.split(path)
    with contextlib.suppress(OSError):
        for name in os.listdir(above):
            if name.startswith(BOOT) and name != boot:
                shutil.rmtree(f"{above}/{name}", ignore_errors=True)


# -- what is not there ------------------------------------------------------------------------------

SYSTEM_UID_MAX: Final = 999
"""The same in systemd: what users up to this one have is not removed."""
LOGIND: Final = "/run/systemd/seats"
LINGER: Final = "/var/lib/systemd/linger"
CONF: Final = "/etc/systemd/logind.conf"


def lost_at_logout(uid: int) -> tuple[str, str] | None:
    """What this process's user loses when his last session ends, and what to do; None: nothing."""
    if uid <= SYSTEM_UID_MAX or not os.path.isdir(LOGIND) or not _removes_ipc():
        return None
    why = of_this_boot(uid).why
    if why is None:
        return None
    with contextlib.suppress(KeyError):
        if os.path.exists(f"{LINGER}/{pwd.getpwuid(uid).pw_name}"):
            return None
    says = (
        f"what this user's mounts keep is in /dev/shm, since {why}; systemd-logind removes it, and "
    )
    says += "with it all his locks, when his last session ends, cron's too"
    return says, "loginctl enable-linger, or a state file (local:/PATH) and run=DIR on a local disk"


def _removes_ipc() -> bool:
    """RemoveIPC= of logind.conf(5); yes by default."""
    says = b"yes"
    folder = f"{CONF}.d"
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for path in (CONF, *(f"{folder}/{name}" for name in names if name.endswith(".conf"))):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            for line in file:
                key, _, value = line.partition(b"=")
                if key.strip() == b"RemoveIPC":
                    says = value.strip().lower()
    return says not in (b"no", b"false", b"0", b"off")
