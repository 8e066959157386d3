"""Whether the kernel has let go of a mount altogether: then no process has a file of it open.

Reading /dev/fuse ends alike when a mount is gone with its last user and when its connection was aborted
under its users; and a RELEASE that was not read yet goes with either. The kernel's list of connections,
the file system fusectl, has a folder for each one until its superblock is gone.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

PLACE: Final = "/sys/fs/fuse/connections"
FSOPEN: Final = 430
FSCONFIG: Final = 431
FSMOUNT: Final = 432
CLOEXEC: Final = 1
FSCONFIG_CMD_CREATE: Final = 6


class Connection:
    """One mount's place in the list, looked up while it is mounted; `device`: "MAJOR:MINOR"."""

    def __init__(self, device: str) -> None:
        self._name = device.partition(":")[2]
        self._list = self._open()

    def _open(self) -> int | None:
        """The list, where it is mounted; or, for root, as it is mounted nowhere."""
        for way in (_mounted, _unattached):
            try:
                fd = way()
            except OSError:
                continue
            if self._is_in(fd):
                return fd
            os.close(fd)
        return None

    def _is_in(self, fd: int) -> bool:
        try:
            os.stat(self._name, dir_fd=fd)
        except FileNotFoundError:
            return False
        except OSError:
            pass  # who is not told is not told that it is gone
        return True

    def is_over(self) -> bool:
        """Whether it surely is; False as well where there is no list to look at. The number may be
        another mount's by now: then it passes for this one."""
        return self._list is not None and not self._is_in(self._list)

    def close(self) -> None:
        if self._list is not None:
            os.close(self._list)
            self._list = None


def _mounted() -> int:
    return os.open(PLACE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _unattached() -> int:
    """Of fsmount(2). Raises OSError without CAP_SYS_ADMIN, and before Linux 5.2."""
    context = _call(FSOPEN, b"fusectl", CLOEXEC)
    try:
        _call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(FSMOUNT, context, CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *args: object) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
