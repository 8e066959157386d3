"""`dlmfs umount MOUNTPOINT`: unmount, and wait until the node has left."""

from __future__ import annotations

import contextlib
import os
import select
import shlex

from dlmfs.cli.parser import Parser
from dlmfs.cli.say import complain
from dlmfs.control import daemon_pid
from dlmfs.errors import MountFailed, Unavailable, Unseen, UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry, shared_parent

WAIT_S = 30.0


def run(args: list[str]) -> int:
    """Unmount a live or a dead dlmfs. Returns when its daemon has left every domain."""
    parser = Parser(prog="dlmfs umount", description="Leave: unmount and give every lock back.")
    parser.add_argument("-l", "--lazy", action="store_true", help="also while files are open")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parsed = parser.parse_args(args)
    mountpoint = os.path.abspath(parsed.mountpoint)
    entry = fuse_mount.find(mountpoint)
    if entry is None or not entry.is_dlmfs:
        raise UsageError(f"{mountpoint} is not a dlmfs mount")
    if entry.mountpoint != os.path.realpath(os.path.dirname(mountpoint)).rstrip(
        "/"
    ) + "/" + os.path.basename(mountpoint):
        raise UsageError(f"{mountpoint} is inside the mount {entry.mountpoint}: unmount that")
    try:
        pid = daemon_pid(entry)
    except Unseen as unseen:
        return _unseen(entry, str(unseen), lazy=parsed.lazy)
    if pid is None:
        fuse_mount.unmount(entry.mountpoint, lazy=True)
        complain(f"{entry.mountpoint} was dead, now cleared")
        return 0
    if pid == 0:
        fuse_mount.unmount(entry.mountpoint, lazy=parsed.lazy)
        complain("unmounted; its daemon's end cannot be seen from this pid namespace")
        return 0
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        fuse_mount.unmount(entry.mountpoint, lazy=parsed.lazy)
        if not parsed.lazy and not select.select([handle], [], [], WAIT_S)[0]:
            raise Unavailable(f"unmounted, but the daemon (pid {pid}) has not ended yet")
    return 0


def _unseen(entry: MountEntry, why: str, *, lazy: bool) -> int:
    """Unmount what may be a part of a living mount, here alone."""
    below = shared_parent(entry)
    if below is not None:
        raise MountFailed(
            f"{why}. Nothing was unmounted: {below.mountpoint} is shared with other namespaces "
            "(propagation), the host's may be among them, and it would go there too. After `mount "
            f"--make-private {shlex.quote(below.mountpoint)}` it is unmounted here alone; umount(8) "
            "unmounts it everywhere"
        )
    fuse_mount.unmount(entry.mountpoint, lazy=lazy)
    complain(f"{entry.mountpoint} is unmounted here; its daemon, which cannot be seen, may go on")
    return 0
