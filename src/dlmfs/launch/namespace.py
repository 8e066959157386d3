"""A mount namespace of a program's own, where it finds what OCFS2's tools have fixed names for.

Nothing of it is seen outside, and it goes with the last process in it. An ordinary user gets one
inside of a user namespace (user_namespaces(7)) in which only their own numbers are mapped: files
of others look as nobody's there, and set-user-ID programs give nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import Final

from dlmfs.errors import DlmfsError, NotPermitted, Unavailable, UsageError

MODULES: Final = "/sys/module"
CAPABILITIES: Final = "ocfs2_dlmfs/parameters/capabilities"
BAST: Final = "bast stackglue"
"""What the kernel's dlmfs says there, without a newline. libo2dlm looks for the words."""

# <linux/sched.h> and <sys/mount.h>
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
MS_RDONLY: Final = 1
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 0x80000
MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8

WITHOUT: Final = "`--bare` does without: PROGRAM then gets no BASTs, and no mount at a fixed place"


def enter(mountpoint: str, at: str) -> None:
    """Put this process into one where `mountpoint` is also found at `at`, and BASTs announced.

    `at` is made if it is missing and may be made. What is mounted or unmounted outside later
    happens inside too, where the outer mounts are shared. Raises UsageError, NotPermitted,
    Unavailable.
    """
    place = _place(at)
    _unshare()
    _mount(None, "/", MS_REC | MS_SLAVE)
    if place != mountpoint:
        _mount(mountpoint, place, MS_BIND)
    announce_basts()


def _place(at: str) -> str:
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(at, 0o755)
    except PermissionError:
        raise NotPermitted(
            f"{at} does not exist, and only root can make it: `mkdir {at}` once as root, or "
            "--at DIR with a folder that exists"
        ) from None
    except OSError as error:
        raise UsageError(f"{at} cannot be made: {error.strerror}") from None
    if not os.path.isdir(at):
        raise UsageError(f"{at} is not a folder")
    return os.path.realpath(at)


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    if ctypes.get_errno() != errno.EPERM or libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise _refused("a mount namespace", ctypes.get_errno())
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, text in maps.items():
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            raise _refused("a user namespace", error.errno or 0) from None


def announce_basts() -> None:
    """Let `MODULES` hold the file that says what dlmfs can do; where the kernel's own dlmfs is
    loaded, that has it already.

    sysfs takes no new names, so a tmpfs covers it, and every module of the moment is bound back to
    its name. (An overlay would do it in one mount, but is not in every kernel, and the parameters
    could not be written any more.)
    """
    if os.path.exists(f"{MODULES}/{CAPABILITIES}"):
        return
    try:
        below = os.open(MODULES, os.O_PATH | os.O_DIRECTORY)
        names = os.listdir(MODULES)
    except OSError as error:
        raise _refused(MODULES, error.errno or 0) from None
    _mount("tmpfs", MODULES, MS_NOSUID_NODEV_NOEXEC, "tmpfs", "mode=755")
    for name in names:
        os.mkdir(f"{MODULES}/{name}")
        _mount(f"/proc/self/fd/{below}/{name}", f"{MODULES}/{name}", MS_BIND)
    os.close(below)
    os.makedirs(os.path.dirname(f"{MODULES}/{CAPABILITIES}"))
    with open(f"{MODULES}/{CAPABILITIES}", "w", encoding="ascii") as file:
        file.write(BAST)
    _mount(None, MODULES, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID_NODEV_NOEXEC)


def _mount(
    source: str | None, target: str, flags: int, fstype: str | None = None, data: str = ""
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [os.fsencode(text) if text else None for text in (source, target, fstype)]
    if libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(data)):
        raise _refused(f"mounting at {target}", ctypes.get_errno())


def _refused(what: str, code: int) -> DlmfsError:
    kind = NotPermitted if code in (errno.EPERM, errno.EACCES, errno.ENOSPC) else Unavailable
    reason = "no more are allowed" if code == errno.ENOSPC else os.strerror(code)
    return kind(f"{what}: {reason}. {WITHOUT}")
