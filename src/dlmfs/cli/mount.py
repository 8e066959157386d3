"""`dlmfs mount SOURCE MOUNTPOINT [-o ...] [-f]`, and the same as a helper of mount(8)."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import stat
from dataclasses import replace
from importlib import import_module
from typing import Final

from dlmfs import proc, rundir
from dlmfs.cli import logs, remount
from dlmfs.cli.daemonize import run_in_background
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import complain
from dlmfs.config import (
    LOGS,
    LocalSource,
    MountConfig,
    MountOptions,
    Source,
    UnknownOption,
    options_of,
    parse_source,
    settings,
    split_all,
)
from dlmfs.control import ask, daemon_pid
from dlmfs.errors import DlmfsError, MountFailed, NotPermitted, UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse import mountinfo
from dlmfs.fuse.glance import is_dead
from dlmfs.modes import Modes
from dlmfs.notify import Manager
from dlmfs.rundir import is_trusted

log = logging.getLogger("dlmfs.mount")

LOOK_S: Final = 1.0
BY_DEFAULT: Final = (
    "holder=node, by default: two processes of this node both get an exclusive lock, and only other "
    "nodes are kept out; with holder=file they exclude each other"
)

DESCRIPTION: Final = """\
SOURCE   local             the embedded engine: all mounts of this user on this host that say
                           `local` share one lock space; nothing to set up
         local:NAME        another lock space of that kind
         local:/path/x.db  the state in a file of your choice, to keep it; below folders that only
                           root and you can write
         etcd://HOST[:PORT][,HOST[:PORT]...]/CLUSTER
                           a cluster of machines, on an etcd (v3); CLUSTER names the lock space
"""
OPTIONS: Final = """\
-o       node=NAME         this node's name (default: the host name, then HOST-2, ...)
         holder=node|file   who holds a lock: the whole node (default, as the kernel's dlmfs), or
                           each open file, so that processes here exclude each other too
         ttl=SECONDS       lease time on etcd, 5 to 3600 (default 15)
         ca=, cert=, key=, credentials=
                           files for etcd with TLS; `user:password` for etcd with authentication
         insecure-password send that password in clear text (else it needs ca=, or a loopback address)
         retry=SECONDS     on etcd, how long to wait for it when it is not there yet (default 60)
         bg                on etcd, do not wait: mount at once, and have no lock before it is there
         grace=SECONDS     how long holders have to close their locks when this node ends (default 2)
         forget=SECONDS    remove lock files that are idle so long and have no value (default: only
                           those that `dlmfs lock` and the library made)
         lock-delay=SECS   wait so long before a dead node's locks are given to others (default 2 on
                           one host; 0 on etcd, where the lease gives that time)
         dead-value=keep|invalid
                           what is read of a value whose last exclusive holder died, until somebody
                           writes: the value (default), or nothing (0 bytes)
         on-lost=none|term|kill
                           on etcd, what is done to processes that hold locks when this node is
                           fenced or ends
         log=stderr|syslog|FILE
                           where the log goes. Default: in the background syslog, if there is one, and
                           what `dlmfs status` tells of it; with -f stderr. A FILE may be rotated
         log-level=error|warning|info|debug, log-format=text|json
                           default warning (-v: info), text; json: an object a line
         run=DIR           where control socket and deadline file lie, if /run/dlmfs cannot be written or
                           is not to be seen; set DLMFS_RUN=DIR for all other commands then
         uid=, gid=, umask=, mode=, dmode=, fmode=
                           whose the folders and locks of this mount are, and their modes (octal;
                           mode= is the root's alone); without them whoever makes one owns it, with
                           the mode asked for less his umask, and the root is 0755
         allow_other, default_permissions, fsname=NAME, ro, nodev, nosuid, noexec, noatime,
         remount           change ro, noexec and noatime of a mount that goes on; nothing else can change
         and what mount(8) and fstab pass without meaning for dlmfs; anything else is refused
"""


def run(args: list[str]) -> int:
    """Mount; return when the mount answers (with -f, or under a service manager: when it ends)."""
    helper = "--helper" in args
    if helper:
        args.remove("--helper")
    parsed = _parser(helper=helper).parse_args(args)
    if parsed.namespace:
        _enter(parsed.namespace, parsed.source)
    manager = Manager.of_environment(foreground=parsed.foreground)
    try:
        return _mount(parsed, manager)
    except DlmfsError as error:
        if manager is not None:
            manager.tell(f"STATUS={error}")
        raise


def _mount(parsed: argparse.Namespace, manager: Manager | None) -> int:
    mountpoint = os.path.realpath(parsed.mountpoint)
    if remount.is_asked(parsed.o):
        return remount.run(parsed.source, mountpoint, parsed.o, fake=parsed.fake)
    source = parse_source(parsed.source)
    given = split_all(parsed.o)
    words = [*(_known(given) if parsed.sloppy else given), *_flags(parsed)]
    options = options_of(words)
    _check_owner(options.modes)
    if options.run is None:
        options = replace(options, run=rundir.named())
    if parsed.fake:
        entry = fuse_mount.find(mountpoint)
        if entry is None or not is_dead(entry):  # else: it would be cleared
            _check(mountpoint, source, options)
        return 0
    fuse_mount.clear_stale(mountpoint)
    _await_end(mountpoint)
    _check(mountpoint, source, options)
    foreground = parsed.foreground or manager is not None
    to = logs.begin(options, mountpoint, verbose=parsed.verbose, foreground=foreground)
    config = MountConfig(parsed.source, source, mountpoint, options, tuple(words), to)
    from dlmfs.node import serve

    if foreground:
        return serve(config, lambda: _tell_default(words), manager)
    below = mountinfo.resolve(mountpoint)[1]
    code = run_in_background(
        lambda ready: serve(config, ready),
        mountpoint,
        keeps_stderr=to == "stderr",
        automount=below is not None and below.fstype == "autofs",
    )
    _tell_default(words)
    return code


def _tell_default(words: list[str]) -> None:
    """Which rule holds, if nobody said: he may have, and mount(8) kept it for itself."""
    if not any("holder" in settings(word) for word in words):
        log.warning(BY_DEFAULT)


FLAGS: Final = ("log", "log_level", "log_format", "run")
"""Options that are easier to write by themselves."""


def _flags(parsed: argparse.Namespace) -> list[str]:
    """The same as words of `-o`, split already."""
    given = {name: getattr(parsed, name, None) for name in FLAGS}
    return [
        f"{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]


def _parser(*, helper: bool) -> argparse.ArgumentParser:
    parser = Parser(
        prog="dlmfs mount",
        description=DESCRIPTION,
        epilog=OPTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("-o", action="append", default=[], metavar="OPT[,OPT...]")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, too")
    if helper:  # the calling convention of mount(8), where -f means "fake"
        parser.add_argument("-s", dest="sloppy", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("-n", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("-N", dest="namespace", metavar="NS", help=argparse.SUPPRESS)
        parser.add_argument("-t", metavar="TYPE", help=argparse.SUPPRESS)
        parser.add_argument("-f", dest="fake", action="store_true", help=argparse.SUPPRESS)
        parser.set_defaults(foreground=False)
    else:
        parser.add_argument(
            "-f", dest="foreground", action="store_true", help="stay in the foreground"
        )
        for name in FLAGS:
            word = name.replace("_", "-")
            parser.add_argument(f"--{word}", metavar=name.upper(), help=f"as -o {word}=")
        parser.set_defaults(fake=False, sloppy=False, namespace=None)
    return parser


def _enter(namespace: str, source: str) -> None:
    """Go where `mount -N` says, with all that is loaded late: it need not be found there."""
    import_module("dlmfs.node")
    if source.startswith("etcd:"):
        with contextlib.suppress(ImportError):
            import_module("dlmfs.store.etcd.access")
            import_module("dlmfs.store.etcd.store")
    fuse_mount.enter(namespace)


def _known(words: list[str]) -> list[str]:
    """With `mount -s`: options that mean nothing here are passed over, but not in silence."""
    known = []
    for word in words:
        try:
            settings(word)
        except UnknownOption as error:
            complain(f"passed over, since -s is given: {error}")
        else:
            known.append(word)
    return known


def _await_end(mountpoint: str) -> None:
    """A node that ends there gives its holders their time first, and has its name until then."""
    entry = fuse_mount.find(mountpoint)
    if entry is None or entry.mountpoint != mountpoint or not entry.is_dlmfs:
        return
    if not is_trusted(entry) or not _ends(entry):  # another's daemon might say so for ever
        return
    try:
        pid = daemon_pid(entry)
    except DlmfsError:
        return
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            while _ends(entry) and not select.select([handle], [], [], LOOK_S)[0]:
                pass
            select.select([handle], [], [], LOOK_S)  # it has left, and detaches the mount
        finally:
            os.close(handle)


def _ends(entry: fuse_mount.MountEntry) -> bool:
    with contextlib.suppress(DlmfsError):
        ending = ask(entry, {"cmd": "status"})["ending"]
        return ending is not None and ending["phase"] != "over"
    return False


def _check_owner(modes: Modes) -> None:
    """As chown(2) has it: an ordinary user gives what is made on his mount to himself and his groups, and
    root to whom the kernel can name here. Raises NotPermitted, UsageError."""
    if os.getuid() == 0:
        for name, number in (("uid", modes.uid), ("gid", modes.gid)):
            if number is not None and not proc.is_mapped(name, number):
                raise UsageError(f"{name}={number}: there is no such id in this user namespace")
        return
    if modes.uid not in (None, os.getuid()):
        raise NotPermitted(f"uid={modes.uid}: only root's mounts can belong to another user")
    if modes.gid not in (None, os.getgid(), *os.getgroups()):
        raise NotPermitted(f"gid={modes.gid}: you are not in that group, and only root may say so")


def _check(mountpoint: str, source: Source, options: MountOptions) -> None:
    """Refuse early, with the reason, what the kernel would refuse late without one, or not at all."""
    state = str(source.path or "") if isinstance(source, LocalSource) else ""
    log = options.log if options.log not in LOGS else None
    for what, path in (("the state file", state), ("run=", options.run), ("log=", log)):
        real = os.path.realpath(path) if path else ""
        if f"{real}/".startswith(mountpoint.rstrip("/") + "/"):
            # The daemon would ask itself for it, and wait for the answer.
            raise UsageError(
                f"{what} {real} lies below the mount point, which hides it: name another place"
            )
    entry = fuse_mount.find(mountpoint)
    if entry is not None and entry.mountpoint == mountpoint and entry.is_dlmfs:
        raise MountFailed(
            f"a dlmfs is already mounted on {mountpoint}: use it, or `dlmfs umount {mountpoint}`"
        )
    try:
        info = os.stat(mountpoint)
    except FileNotFoundError:
        raise UsageError(f"the mount point {mountpoint} does not exist: mkdir it first") from None
    except PermissionError:
        raise NotPermitted(f"no permission to look at the mount point {mountpoint}") from None
    except OSError as error:
        raise MountFailed(f"the mount point {mountpoint}: {error.strerror}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise UsageError(f"the mount point {mountpoint} is not a folder")
