"""Where a daemon's log goes: standard error, syslog, a file; each record there once, or counted as lost.

Rules of this file
------------------
* Nobody waits for a log: a reader that takes nothing (a full pipe, a journal that stands still) costs
  records, whose number is told once there is room, not the daemon its lease.
* Nothing here raises: who logs is in the middle of something.
* Root writes into no file that somebody else could put there (`folders`). After a rotation, when its
  name leads to another file or to none, it is opened anew, as safely; if that fails, the old one serves
  on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
from typing import Final

from dlmfs import folders
from dlmfs.cli.loglines import MARKED, FileFormatter, JsonFormatter, LogFormatter
from dlmfs.cli.say import say_log
from dlmfs.config import MountOptions
from dlmfs.errors import DlmfsError, MountFailed, NotPermitted

SYSLOG: Final = "/dev/log"
DAEMON: Final = 3
"""The facility (syslog(3))."""
RECORD_MAX: Final = 32_000
FILE_MODE: Final = 0o640


def begin(options: MountOptions, mountpoint: str, *, verbose: bool, foreground: bool) -> str:
    """Begin to log; where that goes in the end (`MountConfig.log_to`). Raises MountFailed,
    NotPermitted, BadState for a place that cannot be logged to.

    Until a daemon in the background is ready, standard error is told as well: somebody waits there.
    Not under systemd, which reads both.
    """
    to = options.log or ("stderr" if foreground else _usual())
    journal = _is_journal(sys.stderr.fileno()) if sys.stderr is not None else False
    handlers: list[Log] = []
    if to == "stderr" or not (foreground or (journal and to == "syslog")):
        handlers.append(StandardError(marked=journal))
    if to == "syslog":
        handlers.append(Syslog())
    elif to.startswith("/"):
        handlers.append(File(to))
    for handler in handlers:
        if options.log_json:
            handler.setFormatter(JsonFormatter(mountpoint))
    level = options.log_level or ("info" if verbose else "warning")
    logging.basicConfig(level=level.upper(), handlers=handlers)
    return to


def _usual() -> str:
    return "syslog" if os.path.exists(SYSLOG) else "nowhere"


def _is_journal(fd: int) -> bool:
    """Whether systemd reads there (systemd.exec(5), $JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        info = os.fstat(fd)
        return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"
    return False


class Log(logging.Handler):
    """One place. A subclass's `put` writes a record or raises OSError."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(form)
        self.lost = 0

    def put(self, text: bytes, level: int) -> None:
        raise NotImplementedError

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record).encode("utf-8", "backslashreplace")
            if self.lost:
                lost = f"{self.lost} records before this one could not be written"
                more = logging.LogRecord("dlmfs", logging.WARNING, "", 0, lost, None, None)
                self.put(self.format(more).encode(), logging.WARNING)
                self.lost = 0
            self.put(_cut(text), record.levelno)
        except Exception:  # who logs is in the middle of something
            self.lost += 1


def _cut(text: bytes) -> bytes:
    return text if len(text) <= RECORD_MAX else text[: RECORD_MAX - 3] + b"..."


def _severity(level: int) -> int:
    """As syslog(3) counts."""
    return 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6


class StandardError(Log):
    """`marked`: systemd reads it, which notes program and process by itself (sd-daemon(3))."""

    def __init__(self, *, marked: bool) -> None:
        super().__init__(LogFormatter(MARKED) if marked else LogFormatter())
        self._marked = marked

    def put(self, text: bytes, level: int) -> None:
        if self._marked:
            mark = b"<%d>" % _severity(level)
            text = b"\n".join(mark + line for line in text.split(b"\n"))
        say_log(text)


class Syslog(Log):
    """The system's own socket, as syslog(3) uses it, but without its NUL."""

    def __init__(self) -> None:
        super().__init__(LogFormatter(MARKED))
        self._socket: socket.socket | None = None
        try:
            self._connect()
        except OSError as error:
            raise MountFailed(
                f"log=syslog: {SYSLOG}: {error.strerror} (a container?): log=stderr, or log=FILE"
            ) from None

    def _connect(self) -> socket.socket:
        """Raises OSError."""
        try:
            made = _connected(socket.SOCK_DGRAM)
        except OSError:
            made = _connected(socket.SOCK_STREAM)  # of some, with EPROTOTYPE for the other
        if self._socket is not None:
            self._socket.close()
        self._socket = made
        return made

    def put(self, text: bytes, level: int) -> None:
        head = b"<%d>dlmfs[%d]: " % (DAEMON * 8 + _severity(level), os.getpid())
        assert self._socket is not None
        try:
            self._send(self._socket, head + text)
        except BlockingIOError:
            raise
        except OSError:  # the system's log was started anew
            self._send(self._connect(), head + text)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        super().close()

    @staticmethod
    def _send(sock: socket.socket, text: bytes) -> None:
        sock.send(text + b"\n" * (sock.type is socket.SOCK_STREAM))


def _connected(kind: socket.SocketKind) -> socket.socket:
    """Raises OSError."""
    made = socket.socket(socket.AF_UNIX, kind)
    made.setblocking(False)
    try:
        made.connect(SYSLOG)
    except OSError:
        made.close()
        raise
    return made


class File(Log):
    """A file of this user's. Whoever rotates it needs to tell nobody."""

    def __init__(self, path: str) -> None:
        super().__init__(FileFormatter())
        self.path = path
        try:
            self._fd = _open(path)
        except DlmfsError:
            raise
        except OSError as error:
            raise MountFailed(f"log={path}: {error.strerror or error}") from None

    def put(self, text: bytes, level: int) -> None:  # noqa: ARG002 - it stands in the text
        if self._is_rotated():
            with contextlib.suppress(OSError, DlmfsError):
                new = _open(self.path)
                os.close(self._fd)
                self._fd = new
        os.write(self._fd, text + b"\n")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()

    def _is_rotated(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return True


def _open(path: str) -> int:
    """Raises BadState, NotPermitted, OSError."""
    found = folders.walk(path)
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(found.name or ".", flags | os.O_CLOEXEC, FILE_MODE, dir_fd=found.fd)
    finally:
        os.close(found.fd)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_nlink > 1:
        os.close(fd)
        raise NotPermitted(
            f"log={path} is not a file of this user alone (another's, a second name of one, a device): "
            "name another"
        )
    return fd
