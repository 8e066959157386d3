"""Where the embedded engine keeps its state, and whether a place is fit for it.

The default place depends on the user alone, never on the environment: a login shell and a cron
job of one user must meet in one lock space (XDG_RUNTIME_DIR differs between them).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from dlmfs.errors import BadState, NotPermitted, UsageError

NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

NETWORK: Final = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p ceph glusterfs lustre afs ocfs2 gfs2 gpfs beegfs orangefs pvfs2"
    " ncpfs coda virtiofs".split()
)
"""File systems whose locks and shared memory do not reach across, or not as SQLite needs them."""


def fs_type(folder: Path) -> str:
    """The type of the file system that holds `folder`, by the longest mount point above it."""
    where = os.path.realpath(folder)
    best, found = -1, "unknown"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
            inside = where == point or where.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= best:
                best, found = len(point), right.split()[0]
    return found


def default_path(name: str) -> Path:
    """The state file of the lock space `name` of this user.

    Raises UsageError for a name that cannot be a file name.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot name a lock space: use up to 64 letters, digits, '.', '_', '-', "
            "not starting with '.'"
        )
    if os.getuid() == 0:
        base = next((p for p in ("/run", "/dev/shm") if fs_type(Path(p)) == "tmpfs"), "/run")
        return Path(base, "dlmfs", name + ".db")
    base = "/dev/shm" if fs_type(Path("/dev/shm")) == "tmpfs" else "/tmp"
    return Path(base, f"dlmfs-{os.getuid()}", name + ".db")


def prepare(path: Path, *, default: bool) -> str:
    """Check the folder of a state file, making the default one; the file system's type.

    Raises UsageError, NotPermitted or BadState with what is wrong and what to do.
    """
    folder = path.parent
    if default:
        _make_private(folder)
    try:
        info = folder.stat()
    except FileNotFoundError:
        raise UsageError(
            f"the state folder {folder} does not exist: create it or choose another"
        ) from None
    except PermissionError:
        raise NotPermitted(f"no permission to look into the state folder {folder}") from None
    except OSError as error:
        raise UsageError(f"the state folder {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise UsageError(f"the state folder {folder} is not a folder")
    try:
        is_folder = path.is_dir()
    except PermissionError:
        raise NotPermitted(f"no permission to look into the state folder {folder}") from None
    if is_folder:
        raise UsageError(f"{path} is a folder: name a file in it, such as {path}/state.db")
    kind = fs_type(folder)
    if kind in NETWORK or kind.startswith("fuse."):
        raise BadState(
            f"{folder} is on a network or FUSE file system ({kind}), where the embedded engine "
            "is not safe: choose a local folder, or the etcd engine for several machines"
        )
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise BadState(f"the state folder {folder} is read-only: choose another or remount it rw")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotPermitted(f"no permission to write into the state folder {folder}")
    return kind


def _make_private(folder: Path) -> None:
    """Make the default folder, or make sure that nobody else made it first."""
    try:
        folder.mkdir(mode=0o755 if os.getuid() == 0 else 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise BadState(f"cannot make the state folder {folder}: {error.strerror}") from None
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise BadState(
            f"{folder} is not a folder that only this user can write: remove it, or name a "
            "state file with local:/path"
        )
