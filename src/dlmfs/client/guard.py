"""Resources that refuse the past.

A program may be stopped between its last look at its lock and what it then does; meanwhile the lock
is lost and another works under it. No lock service can prevent that. The resource can: each grant
carries a larger token, so what has seen a token refuses all smaller ones.

Rules of this file
------------------
* The larger token is noted first and durably, then the work is done: a crash in between leaves a
  resource that refuses more, never less.
* Looking at the token and doing the work are one step for others: work of an older token that was
  let in is over before work of a newer one begins.
* Equal tokens are let in: one holder works more than once.
* A token that cannot be yet is refused: once noted, it would shut everybody out for good. (Whoever may
  send tokens is trusted to be no attacker: a guard stands behind authentication.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Iterator
from typing import Any, Final

from dlmfs.client.guard_http import HEADER as HEADER
from dlmfs.client.guard_http import AsgiGuard as AsgiGuard
from dlmfs.client.guard_http import Register as Register
from dlmfs.client.guard_http import WsgiGuard as WsgiGuard
from dlmfs.client.guard_http import check as check
from dlmfs.client.guard_http import headers as headers
from dlmfs.client.tokens import AHEAD_MAX, checked, furthest, stale, sync_folder, too_far
from dlmfs.errors import BadState, StaleToken, UsageError

# -- files --------------------------------------------------------------------------------------------


_OPEN: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FLOCK: Final = struct.Struct("hhqqi0q")
"""struct flock of fcntl(2)."""


def _lock(fd: int, kind: int) -> None:
    """A lock on the whole of an open file, waited for. Who may not write the file cannot have one."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


class FileGuard:
    """Guards a file, or whatever its path stands for, against holders of the past.

    The largest token is kept in a file beside it, PATH.token, which is locked (fcntl(2), F_OFD_SETLKW)
    while somebody is let in: processes of one host, and whoever shares a file system that has such
    locks. Only its owner and root may open it: who may read a file could lock it by flock(2).
    PATH is where symbolic links lead to from the present folder, so that all who name one file keep
    one token; a file that has several names (hard links) is to be guarded by one of them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.realpath(os.fspath(path))
        self.token_path = f"{self.path}.token"

    @contextlib.contextmanager
    def admit(self, token: int) -> Iterator[None]:
        """Let the work of this token in; nobody else's goes on beside it.

        Raises StaleToken; UsageError for a token that cannot be yet; BadState if PATH.token is not what
        was written there, or not by root, this user or the owner of PATH; OSError."""
        checked(token)
        fd, process = self._locked(), os.getpid()
        try:
            seen = self._read(fd)
            if token < seen:
                raise stale(self.path, token, seen)
            if token > furthest(seen):
                raise too_far(self.path, token, seen)
            if token > seen:
                os.pwrite(fd, f"{token:020d}\n".encode(), 0)
                os.fsync(fd)
            if not seen:
                sync_folder(self.token_path)
            yield
        finally:
            if os.getpid() == process:
                # A child that was forked meanwhile has a copy: closing alone would leave it locked.
                _lock(fd, fcntl.F_UNLCK)
            os.close(fd)

    def _locked(self) -> int:
        """The open file, locked, and still the one of that name: it may have been removed by hand."""
        while True:
            try:
                fd = os.open(self.token_path, _OPEN, 0o600)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise BadState(f"{self.token_path} is a link: see who made it") from None
            try:
                self._check(fd)
                _lock(fd, fcntl.F_WRLCK)
                with contextlib.suppress(FileNotFoundError):
                    here = os.stat(self.token_path, follow_symlinks=False)
                    if os.path.samestat(os.fstat(fd), here):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _check(self, fd: int) -> None:
        """Whoever may write the folder may have put another file there."""
        info = os.fstat(fd)
        owners = {0, os.geteuid()}
        with contextlib.suppress(OSError):
            owners.add(os.stat(self.path, follow_symlinks=False).st_uid)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in owners or info.st_nlink > 1:
            raise BadState(
                f"{self.token_path} is another user's, or no plain file: see who made it"
            )
        if info.st_mode & 0o077 and info.st_uid == os.geteuid():
            os.fchmod(fd, 0o600)  # who may read it could keep others out by a lock

    def _read(self, fd: int) -> int:
        text = os.pread(fd, 64, 0)
        if text and not (len(text) == 21 and text.strip().isdigit()):
            raise BadState(f"{self.token_path} holds no token: see what wrote it, then remove it")
        return int(text or 0)

    def replace(self, token: int, data: bytes) -> None:
        """Replace the file's contents, whole. Raises as `admit`."""
        with self.admit(token):
            folder = os.path.dirname(self.path) or "."
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    with contextlib.suppress(FileNotFoundError):
                        mode = os.stat(self.path, follow_symlinks=False).st_mode
                        if stat.S_ISREG(mode):  # else a link has been put there just now
                            os.fchmod(file.fileno(), mode & 0o777)
                    os.fsync(file.fileno())
                    os.replace(file.name, self.path)
                except BaseException:
                    os.unlink(file.name)
                    raise


# -- SQL ----------------------------------------------------------------------------------------------

_MARKS: Final = {
    "qmark": ("?",) * 5,
    "format": ("%s",) * 5,
    "pyformat": ("%s",) * 5,
    "numeric": (":1", ":2", ":3", ":4", ":5"),
}


class SqlGuard:
    """Guards what is in a database, by a table with the largest token of each resource.

    For any DB-API (PEP 249) module: `paramstyle` is the module's. The row is locked by the
    transaction that let somebody in, until it commits. Who was let in is told from the stamp that it
    left: counts of rows differ between modules, and a transaction that has read before may be shown
    the row of that time (MySQL's REPEATABLE READ), but its own writes it does see.
    """

    def __init__(self, *, table: str = "dlmfs_guard", paramstyle: str = "qmark") -> None:
        if not table.replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"{table!r} is no name of a table")
        if paramstyle not in _MARKS:
            raise UsageError(f"paramstyle {paramstyle!r} is not one of {', '.join(_MARKS)}")
        one, two, three, four, five = _MARKS[paramstyle]
        self._create = (
            f"CREATE TABLE IF NOT EXISTS {table} "
            "(resource VARCHAR(128) PRIMARY KEY, token NUMERIC(20) NOT NULL, "
            "stamp VARCHAR(32) NOT NULL)"
        )
        # The table's name is checked above; values are never put into the text.
        self._raise = (
            f"UPDATE {table} SET token={one}, stamp={two}"  # noqa: S608
            f" WHERE resource={three} AND token<={four} AND token>={five}"
        )
        self._look = f"SELECT token, stamp FROM {table} WHERE resource={one}"  # noqa: S608
        self._insert = (
            f"INSERT INTO {table} (resource, token, stamp) VALUES ({one}, {two}, {three})"  # noqa: S608
        )

    def create(self, connection: Any) -> None:
        """Make the table, where it is missing, and commit."""
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(self._create)
        connection.commit()

    def admit(self, cursor: Any, resource: str, token: int) -> None:
        """Let the rest of this transaction in. Raises StaleToken: roll back then; UsageError if the token
        cannot be yet, or the connection commits each statement by itself. The first use of a resource
        by two transactions at once may fail in one of them with the module's IntegrityError: try that
        again."""
        checked(token)
        stamp = secrets.token_hex(16)
        cursor.execute(self._raise, (token, stamp, resource, token, max(0, token - AHEAD_MAX)))
        cursor.execute(self._look, (resource,))
        row = cursor.fetchone()
        if row is None:
            if token > furthest(0):
                raise too_far(resource, token, 0)
            cursor.execute(self._insert, (resource, token, stamp))
        elif row[1] != stamp:
            if int(row[0]) > token:
                raise stale(resource, token, int(row[0]))
            if int(row[0]) < token - AHEAD_MAX:
                raise too_far(resource, token, int(row[0]))
            # The row is shown as it was when this transaction began to read.
            raise StaleToken(
                f"{resource} has seen a token larger than {token}: it is too late, the lock was lost"
            )
        connection = getattr(cursor, "connection", None)
        if getattr(connection, "in_transaction", True) is False:
            raise UsageError("the connection commits each statement by itself: turn that off")

    @contextlib.contextmanager
    def transaction(self, connection: Any, resource: str, token: int) -> Iterator[Any]:
        """A transaction that was let in: gives its cursor, commits at the end, rolls back when
        something is raised. Raises as `admit`."""
        try:
            with contextlib.closing(connection.cursor()) as cursor:
                self.admit(cursor, resource, token)
                yield cursor
        except BaseException:
            connection.rollback()
            raise
        connection.commit()
