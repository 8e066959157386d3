"""Mounting and unmounting: mount(2) for root, fusermount3 for everybody else.

Every failure is one line that says what is wrong, where, and what to do. `mountinfo` says what is
mounted; its functions are part of this module's interface.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import dataclasses
import errno
import logging
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dlmfs import proc
from dlmfs.errors import DlmfsError, MountFailed, NotPermitted, UsageError
from dlmfs.fuse import glance
from dlmfs.fuse.mountinfo import FSTYPE, resolve
from dlmfs.fuse.mountinfo import MountEntry as MountEntry
from dlmfs.fuse.mountinfo import find as find
from dlmfs.fuse.mountinfo import mounts as mounts

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/fuse"

# Flags of mount(2) and umount2(2), from <sys/mount.h>.
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_NOATIME: Final = 1024
MS_RELATIME: Final = 1 << 21
CLONE_NEWNS: Final = 0x20000
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

_MS: Final = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
}
_SHOWN: Final = {
    **_MS,
    "sync": 16,
    "dirsync": 128,
    "nosymfollow": 256,
    "nodiratime": 2048,
    "relatime": MS_RELATIME,
    "lazytime": 1 << 25,
}
"""What the mount table shows of a mount's flags, and mount(2) takes away if it is not given again."""

FUSERMOUNT_MAX_S: Final = 30.0
"""fusermount3 stats the mount point; do not wait for ever where that is a dead NFS."""

REQUEST_TIMEOUTS: Final = (
    "/proc/sys/fs/fuse/default_request_timeout",
    "/proc/sys/fs/fuse/max_request_timeout",
)

CONTAINER: Final = "in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN"


@dataclass(frozen=True, slots=True)
class MountFlags:
    """How to mount. `allow_other` None: on for root, off for others, who would need the
    administrator's consent in fuse.conf. `fsname` replaces the source in the mount table."""

    ro: bool = False
    nodev: bool = True
    nosuid: bool = True
    noexec: bool = False
    noatime: bool = False
    allow_other: bool | None = None
    default_permissions: bool = True
    fsname: str | None = None

    @classmethod
    def from_options(cls, options: object) -> MountFlags:
        """From any object: its attributes that are named as the fields here; the rest default."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(options, field.name)]
        return cls(**{name: getattr(options, name) for name in names})


def mount(source: str, mountpoint: str, flags: MountFlags) -> int:
    """Mount a dlmfs at an existing directory; gives the device descriptor (non-blocking).

    Nothing answers on the mount until a `Device` serves the descriptor: until then the caller must
    not touch it. Raises MountFailed, NotPermitted or UsageError.
    """
    if not os.path.exists(DEVICE):
        raise MountFailed(f"{DEVICE} does not exist: load it with 'modprobe fuse'; {CONTAINER}")
    path = _mountpoint(mountpoint)
    name = flags.fsname or source
    if timeout_s := request_timeout_s():
        log.warning(
            "the kernel aborts this mount when an open waits for a lock longer than %d s: "
            "set fs.fuse.default_request_timeout and fs.fuse.max_request_timeout to 0",
            timeout_s,
        )
    if os.geteuid() == 0:
        return _mount_as_root(name, path, flags)
    return _mount_as_user(name, path, flags)


def request_timeout_s() -> int:
    """After how long the kernel takes a FUSE daemon for hung (Linux 6.15); 0 = never."""
    limits = []
    for name in REQUEST_TIMEOUTS:
        with contextlib.suppress(OSError), open(name, "rb") as file:
            limits.append(proc.number(file.read()) or 0)
    return min(filter(None, limits), default=0)


def _mountpoint(mountpoint: str) -> str:
    """The real path of a mount point, which must be a directory."""
    path, entry = resolve(mountpoint)
    if entry is not None and entry.is_dlmfs:
        if entry.mountpoint == path:
            return path  # stacked on another one; whether that answers is not our business
        raise UsageError(f"{mountpoint} lies inside the dlmfs mounted at {entry.mountpoint}")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _mountpoint_error(mountpoint, error.errno) from error
    if not stat.S_ISDIR(mode):
        raise _mountpoint_error(mountpoint, errno.ENOTDIR)
    return path


def _mountpoint_error(mountpoint: str, code: int | None) -> DlmfsError:
    match code:
        case errno.ENOENT:
            return UsageError(f"mount point {mountpoint} does not exist: mkdir -p {mountpoint}")
        case errno.ENOTDIR:
            return UsageError(f"mount point {mountpoint} is not a directory")
        case errno.EACCES:
            return NotPermitted(f"mount point {mountpoint} cannot be reached: permission denied")
        case errno.ENOTCONN:
            return MountFailed(
                f"mount point {mountpoint} has the remains of a dead FUSE mount: "
                f"umount -l {mountpoint}"
            )
        case _:
            return MountFailed(f"mount point {mountpoint}: {os.strerror(code or 0)}")


# -- as root --------------------------------------------------------------------------------------


def _mount_as_root(name: str, path: str, flags: MountFlags) -> int:
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _device_error(error) from error
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if flags.default_permissions:
        options += ",default_permissions"
    if flags.allow_other is not False:
        options += ",allow_other"
    bits = sum(bit for field, bit in _MS.items() if getattr(flags, field))
    try:
        with _pinned(path) as place:
            code = _libc_mount(name, place, bits, options)
        if code:
            raise _mount_error(path, code)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _pinned(path: str) -> Iterator[str]:
    """A name for the folder of that real path, which leads there whatever becomes of the path: who owns a
    folder above may put a link in its place. Raises MountFailed if he has done so already."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _mountpoint_error(path, error.errno) from error
    try:
        if proc.link("self", fd) != os.fsencode(path):
            raise _changed(path)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _changed(path: str) -> MountFailed:
    return MountFailed(f"{path} was changed while it was looked at: see by whom, then try again")


def _libc_mount(source: str, target: str, bits: int, data: str) -> int:
    """mount(2); gives 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    texts = (os.fsencode(source), os.fsencode(target), FSTYPE.encode())
    failed = libc.mount(*texts, ctypes.c_ulong(bits), os.fsencode(data))
    return ctypes.get_errno() if failed else 0


def _device_error(error: OSError) -> DlmfsError:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            what = f"{DEVICE} has no driver: load it with 'modprobe fuse'"
            return MountFailed(what)
        case errno.EACCES | errno.EPERM:
            return NotPermitted(f"{DEVICE} may not be opened: {CONTAINER}; else check its mode")
        case _:
            return MountFailed(f"{DEVICE} cannot be opened: {error.strerror}")


def _mount_error(path: str, code: int) -> DlmfsError:
    match code:
        case errno.EPERM | errno.EACCES:
            return NotPermitted(f"mounting at {path} is not permitted by the kernel: {CONTAINER}")
        case errno.ENODEV:
            return MountFailed("the kernel has no FUSE file system: load it with 'modprobe fuse'")
        case errno.ENOENT | errno.ENOTDIR | errno.ENOTCONN:
            return _mountpoint_error(path, code)
        case errno.EINVAL:
            return MountFailed(f"mounting at {path}: the kernel does not take these options")
        case _:
            return MountFailed(f"mounting at {path}: {os.strerror(code)}")


# -- as an ordinary user --------------------------------------------------------------------------


def _fusermount() -> str:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountFailed(
            "fusermount3 is not installed, and only root can mount without it: "
            "install the package fuse3"
        )
    return program


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _mount_as_user(name: str, path: str, flags: MountFlags) -> int:
    """Let fusermount3 mount; it sends the descriptor over a socket (fuse-notes 10)."""
    options = ["ro" if flags.ro else "rw", f"fsname={_escaped(name)}", "subtype=dlmfs"]
    options += [field for field in _MS if field != "ro" and getattr(flags, field)]
    if flags.default_permissions:
        options.append("default_permissions")
    if flags.allow_other:
        options.append("allow_other")
    program = _fusermount()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        text = _run(
            [program, "-o", ",".join(options), "--", path],
            path,
            pass_fd=theirs.fileno(),
        )
        theirs.close()
        fd = _received(ours)
    if fd is None:
        raise _fusermount_error(path, text)
    os.set_blocking(fd, False)
    return fd


def _run(command: list[str], path: str, pass_fd: int | None = None) -> str:
    """Run fusermount3; gives what it complained of, "" if it succeeded."""
    environment = {**os.environ, "LC_ALL": "C"}
    if pass_fd is not None:
        environment["_FUSE_COMMFD"] = str(pass_fd)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            pass_fds=() if pass_fd is None else (pass_fd,),
            timeout=FUSERMOUNT_MAX_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MountFailed(f"fusermount3 hangs at {path}: is what lies there alive?") from error
    except OSError as error:
        raise MountFailed(f"fusermount3 cannot be started: {error.strerror}") from error
    if done.returncode == 0:
        return ""
    return " ".join(done.stderr.split()) or f"fusermount3 ended with {done.returncode}"


def _received(channel: socket.socket) -> int | None:
    """The descriptor in the message, or None if the other end was closed without one."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(fds.itemsize)
    _data, controls, _flags, _from = channel.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in controls:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
    return fds[0] if fds else None


def _fusermount_error(path: str, text: str) -> DlmfsError:
    """fusermount3's complaint, as one of ours that says what to do."""
    if "user_allow_other" in text:
        return NotPermitted("allow_other needs the line 'user_allow_other' in /etc/fuse.conf")
    if "could not determine username" in text:
        return MountFailed(
            f"fusermount3 mounts for known users only, and user id {os.getuid()} is none: give it a line "
            "in /etc/passwd (in a rootless container: a user of its own), or mount as root"
        )
    if f"failed to open {DEVICE}" in text:
        if "Permission denied" in text or "not permitted" in text:
            return NotPermitted(f"{DEVICE} may not be opened by this user: check its mode")
        return MountFailed(f"{DEVICE} cannot be opened: load it with 'modprobe fuse'; {CONTAINER}")
    if "not owned by user" in text or "no write access" in text:
        return NotPermitted(f"mount point {path} is not yours to mount on: it must be writable")
    if "mount failed: Operation not permitted" in text:
        return NotPermitted(
            f"fusermount3 may not mount at {path}: it must be set-user-ID root; {CONTAINER}"
        )
    if "mount_max" in text:
        return MountFailed("too many FUSE mounts of users: raise mount_max in /etc/fuse.conf")
    return MountFailed(f"mounting at {path}: {text or 'fusermount3 sent no descriptor'}")


def enter(namespace: str) -> None:
    """From now on see what is mounted in another mount namespace, named by its file in /proc, and mount
    there. Raises UsageError, NotPermitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with open(namespace, "rb") as file:
            if libc.setns(file.fileno(), CLONE_NEWNS):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        kind = NotPermitted if error.errno in (errno.EPERM, errno.EACCES) else UsageError
        raise kind(f"the mount namespace {namespace} cannot be entered: {error.strerror}") from None


# -- other flags ------------------------------------------------------------------------------------


def remount(entry: MountEntry, changes: Mapping[str, bool]) -> None:
    """Change flags of a mount that goes on, which is not touched: its daemon may be stopped. `changes`:
    fields of `MountFlags` that mount(2) has; all others stay. nosuid and nodev are always on.

    Raises NotPermitted, and MountFailed if it is in use (read-only, while files are open for writing).
    """
    told = {"nosuid": True, "nodev": True, **changes}
    shown = {*entry.options, *entry.super_options}
    bits = sum(bit for name, bit in _SHOWN.items() if told.get(name, name in shown))
    if "noatime" in changes:
        bits = bits & ~MS_RELATIME if changes["noatime"] else bits | MS_RELATIME
    path = entry.mountpoint
    with _pinned(path) as place:
        if proc.mount_of("self", int(os.path.basename(place))) != entry.id:
            raise _changed(path)
        code = _libc_mount(entry.source, place, MS_REMOUNT | bits, "")
    if code == errno.EBUSY:
        raise MountFailed(
            f"{path} is in use: files are open for writing (`dlmfs status {path}`, 'fuser -vm {path}')"
        )
    if code in (errno.EPERM, errno.EACCES):
        raise NotPermitted(f"the flags of {path} may be changed only by root")
    if code:
        raise MountFailed(f"{path} cannot be remounted: {os.strerror(code)}")


# -- unmounting -----------------------------------------------------------------------------------


def unmount(mountpoint: str, lazy: bool = False) -> None:
    """Unmount the dlmfs at `mountpoint`, without looking at it: its daemon may be dead.

    With `lazy` it goes from the tree at once, and for good when its last user is done. Raises
    UsageError if there is none, MountFailed if it is in use, NotPermitted.
    """
    path, entry = resolve(mountpoint)
    if entry is None or not entry.is_dlmfs or entry.mountpoint != path:
        inside = f": it is at {entry.mountpoint}" if entry is not None and entry.is_dlmfs else ""
        raise UsageError(f"no dlmfs is mounted at {mountpoint}{inside}")
    if os.geteuid() != 0:
        text = _run([_fusermount(), "-u", *(["-z"] if lazy else []), "--", path], path)
        if text:
            raise _busy(path) if "busy" in text else _refused(path, text)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    above, name = os.path.split(path)
    with _pinned(above) as folder:
        if resolve(path)[1] != entry:
            raise _changed(path)
        place = os.fsencode(f"{folder}/{name}")
        failed = libc.umount2(place, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
        code = ctypes.get_errno()
    if failed:
        raise _busy(path) if code == errno.EBUSY else _refused(path, os.strerror(code))


def _busy(path: str) -> MountFailed:
    return MountFailed(f"{path} is in use: 'fuser -vm {path}' shows by whom (open files, cwd)")


def _refused(path: str, text: str) -> DlmfsError:
    # fusermount3 looks among the caller's own mounts only: another's is "not found in /etc/mtab".
    if any(word in text.lower() for word in ("not permitted", "permission denied", "not found in")):
        return NotPermitted(f"{path} may be unmounted only by root or who mounted it: {text}")
    return MountFailed(f"{path} cannot be unmounted: {text}")


def clear_stale(mountpoint: str) -> int:
    """Lazily unmount each dead dlmfs stacked at `mountpoint`; gives how many. Never a live one.

    Needed when a daemon was killed: the kernel keeps its mount, and every use of it fails with
    ENOTCONN (fuse-notes 11).
    """
    cleared = 0
    while True:
        path, entry = resolve(mountpoint)
        if entry is None or not entry.is_dlmfs or entry.mountpoint != path:
            return cleared
        if not glance.is_dead(entry):
            return cleared
        # Another daemon may have mounted on top meanwhile; umount2 names a place, not a mount.
        if resolve(mountpoint)[1] == entry:
            unmount(path, lazy=True)
            cleared += 1
