"""Where the embedded engine keeps its state, and whether a place is fit for it.

The default place depends on the user alone, never on the environment: a login shell and a cron
job of one user must meet in one lock space (XDG_RUNTIME_DIR differs between them). Nor is it where
the end of a session takes it away (`home`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from dlmfs import folders, fstype, home
from dlmfs.errors import BadState, NotPermitted, UsageError

log = logging.getLogger("dlmfs.store")

NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def default_path(name: str) -> Path:
    """The state file of the lock space `name` of this user.

    Raises UsageError for a name that cannot be a file name.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot name a lock space: use up to 64 letters, digits, '.', '_', '-', "
            "not starting with '.'"
        )
    uid = os.getuid()
    if uid == 0:
        base = next((p for p in ("/run", "/dev/shm") if fstype.fs_type(Path(p)) == "tmpfs"), "/run")
        folder = f"{base}/dlmfs"
    else:
        at_home = home.of_this_boot(uid)
        if at_home.why is None:
            return Path(at_home.folder, name + ".db")
        base = "/dev/shm" if fstype.fs_type(Path("/dev/shm")) == "tmpfs" else "/tmp"
        folder = f"{base}/dlmfs-{uid}"
    return Path((folders.owned(folder, uid) or [folder])[0], name + ".db")


class Place(NamedTuple):
    """Where the state is: its real path, the type of its file system, and the folder, as a descriptor
    that is the caller's to close."""

    path: Path
    kind: str
    folder: int


def prepare(path: Path, *, default: bool) -> Place:
    """Check the place of a state file, making the default folder. Nobody but root and this user can
    change anything there (`folders`), so the real path may be used by its name.

    Raises UsageError, NotPermitted or BadState with what is wrong and what to do.
    """
    if default:
        path = _made(path.parent) / path.name
    fd, where, name = _go(path)
    try:
        place = Place(Path(where, name), fstype.fs_type(Path(where)), fd)
        _check(place)
    except BaseException:
        os.close(fd)
        raise
    return place


def _go(path: Path) -> folders.Found:
    folder = path.parent
    try:
        return folders.walk(str(path))
    except FileNotFoundError:
        raise UsageError(
            f"the state folder {folder} does not exist: create it or choose another"
        ) from None
    except PermissionError:
        raise NotPermitted(f"no permission to look into the state folder {folder}") from None
    except NotADirectoryError:
        raise UsageError(f"the state folder {folder} is not a folder") from None
    except OSError as error:
        raise UsageError(f"the state folder {folder}: {error.strerror}") from None


def lasting(path: Path) -> Place:
    """The same for a file that must still be there after a reboot."""
    place = prepare(path, default=False)
    if place.kind in fstype.VOLATILE:
        os.close(place.folder)
        raise BadState(f"{place.path.parent} is in memory ({place.kind}): a reboot empties it")
    return place


def _check(place: Place) -> None:
    path, folder = place.path, place.path.parent
    if not path.name or os.path.isdir(path):
        raise UsageError(f"{path} is a folder: name a file in it, such as {path}/state.db")
    if fstype.is_remote(place.kind):
        raise BadState(
            f"{folder} is on a network or FUSE file system ({place.kind}), where the embedded engine "
            "is not safe: choose a local folder, or the etcd engine for several machines"
        )
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise BadState(f"the state folder {folder} is read-only: choose another or remount it rw")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotPermitted(f"no permission to write into the state folder {folder}")


def secure(place: Place) -> None:
    """Make the state file if there is none, and make it and what SQLite keeps beside it this user's
    alone: values are as private as the lock files, and who can read the state can stop it by a lock on
    it. SQLite gives its own files the state file's mode.

    No descriptor that could be locked is opened of a file that exists: closing it would drop SQLite's
    locks (protocol-traps 17). Raises BadState, StoreFull, NotPermitted.
    """
    name = place.path.name
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # what keeps it from being made keeps SQLite from opening it
        os.close(os.open(name, new, 0o600, dir_fd=place.folder))
    for suffix in ("", "-wal", "-shm", "-journal"):
        try:
            folders.set_mode(place.folder, name + suffix, 0o600)
        except FileNotFoundError:
            continue
        except NotPermitted as error:
            raise BadState(
                f"{place.path.parent}: {error}: move it away, or name another file"
            ) from None
        except (
            OSError
        ) as error:  # a file system gone read-only, which SQLite tells in its own words
            log.debug("%s: %s", place.path, error)


def _made(folder: Path) -> Path:
    """Make the default folder; among other people's one beside it if somebody has made it first."""
    if home.is_of_this_boot(folder):
        home.make(str(folder))
        return folder
    stem = folder.name.partition(".")[0]
    try:
        return Path(
            folders.settle(str(folder.with_name(stem)), 0o755 if os.getuid() == 0 else 0o700)
        )
    except OSError as error:
        raise BadState(f"cannot make the state folder {folder}: {error.strerror}") from None


def uri(path: Path, mode: str) -> str:
    """A file's name for SQLite, with how it is to be opened (ro, rw)."""
    from urllib.parse import quote_from_bytes

    return f"file:{quote_from_bytes(os.fsencode(path))}?mode={mode}"
