"""What the probes are made of: system calls whose outcome is data."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOBODY = 65534
Probe = Iterator[tuple[str, object]]

RD, WR, RW, NB, CR = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_NONBLOCK, os.O_CREAT


def err(call: Callable[..., object], *args: Any, **more: Any) -> str:
    """ "ok", or the errno's name."""
    try:
        call(*args, **more)
    except OSError as error:
        return errno.errorcode[error.errno or 0].replace("EOPNOTSUPP", "ENOTSUP")
    return "ok"


def value(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """What the call returns, or the errno's name."""
    try:
        return call(*args, **more)
    except OSError as error:
        return errno.errorcode[error.errno or 0].replace("EOPNOTSUPP", "ENOTSUP")


def opened(path: Path, flags: int, mode: int = 0o644) -> str:
    """Open and close."""
    return err(lambda: os.close(os.open(path, flags, mode)))


def facts(path: Path | int) -> dict[str, object]:
    info = os.stat(path)
    return {
        "mode": oct(info.st_mode),
        "nlink": info.st_nlink,
        "uid": info.st_uid,
        "gid": info.st_gid,
        "size": info.st_size,
        "blocks": info.st_blocks,
        "blksize": info.st_blksize,
    }


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@contextmanager
def held(path: Path, flags: int = RW | CR) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def make(path: Path, mode: int = 0o644) -> None:
    os.close(os.open(path, RW | CR, mode))


def mode_of(path: Path) -> str:
    return oct(stat.S_IFMT(os.stat(path).st_mode) | stat.S_IMODE(os.stat(path).st_mode))


def child(body: Callable[[], object], uid: int = 0) -> Any:
    """What `body` returns, in a process of its own, perhaps another user's."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            os.write(writing, json.dumps(body()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(told)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that other users may enter, gone afterwards."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="dlmfs-test-", dir=base))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
