"""What each FUSE request about names, attributes and directories does.

Rules of this file
------------------
* MKDIR, RMDIR and UNLINK hold the kernel's directory lock while the store works, so each is
  answered within `Timing.answer_timeout_s`; nothing else waits.
* The daemon never touches its own mount: nothing here uses a path below it.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import Final, Protocol

from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.errors import DlmfsError
from dlmfs.fs import xattrs
from dlmfs.fs.answer import Reply
from dlmfs.fs.openfiles import OpenFiles
from dlmfs.fs.outside import Watchdog
from dlmfs.fs.places import Readers
from dlmfs.fs.tree import Directory, Inode, LockFile, Tree
from dlmfs.fs.unused import Unused
from dlmfs.fuse import wire
from dlmfs.model import Limits
from dlmfs.names import domain_fault, lock_fault
from dlmfs.timing import Scheduler, Timing

CACHE_S: Final = 3600.0
"""How long the kernel may keep names and attributes. They change only through this mount."""

BLOCK: Final = 4096
NAME_MAX: Final = 255
"""The kernel checks no length for FUSE; longer names are ENAMETOOLONG as everywhere."""
DOTS: Final = (b".", b"..")
MAX_INO: Final = (1 << 63) - 1


class Domains(Protocol):
    """How domains come and go: the membership's part."""

    def join(self, name: bytes, done: Callable[[Lockspace | DlmfsError], None]) -> None: ...

    def leave(self, space: Lockspace, done: Callable[[DlmfsError | None], None]) -> None: ...

    def state_mb(self) -> float:
        """Size of the state, in megabytes."""

    def lease_state(self) -> str:
        """HEALTHY, or another state and why."""

    def serving(self) -> bool:
        """Whether this node may serve now; its lease may have run out a moment ago."""


class FileSystem(OpenFiles):
    """The operations of one mount: names, attributes, directories; open files are `OpenFiles`."""

    def __init__(
        self,
        tree: Tree,
        domains: Domains,
        loop: Scheduler,
        timing: Timing,
        *,
        limits: Limits | None = None,
        readers: Readers | None = None,
        watchdog: Watchdog | None = None,
        forget_s: float | None = None,
    ) -> None:
        super().__init__(tree, loop, timing, limits=limits, readers=readers)
        self.unused = Unused(self, forget_s)
        self.watchdog = watchdog
        self.domains = domains
        self.serving = self.expire = domains.serving

    # -- names --------------------------------------------------------------------------------

    def _directory(self, ino: int) -> Directory:
        inode = self.tree.inodes.get(ino)
        if not isinstance(inode, Directory):
            raise OSError(errno.ENOTDIR, "not a directory")
        return inode

    def _child(self, ino: int, name: bytes) -> Inode:
        child = self._directory(ino).children.get(name)
        if child is None:
            raise OSError(errno.ENOENT, "no such name")
        return child

    def _inode(self, ino: int) -> Inode:
        inode = self.tree.inodes.get(ino)
        if inode is None:
            raise OSError(errno.ESTALE, "no such inode")
        return inode

    def _attr(self, inode: Inode) -> wire.Attr:
        return wire.Attr(
            ino=inode.ino,
            size=inode.size,
            blocks=0,
            atime_ns=inode.atime_ns,
            mtime_ns=inode.mtime_ns,
            ctime_ns=inode.ctime_ns,
            mode=inode.mode,
            nlink=inode.nlink,
            uid=inode.uid,
            gid=inode.gid,
            rdev=0,
            blksize=BLOCK,
        )

    def _entry(self, inode: Inode) -> bytes:
        inode.lookups += 1
        return wire.entry(inode.ino, 0, self._attr(inode), CACHE_S, CACHE_S)

    def lookup(self, h: wire.Header, name: bytes) -> Reply:
        child = self._directory(h.node).children.get(name)
        if child is not None:
            return self._entry(child)
        return errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.ENOENT

    def forget(self, node: int, count: int) -> None:
        self.tree.forget(node, count)

    def getattr(self, h: wire.Header, _fh: int | None) -> Reply:
        return wire.attr_out(self._attr(self._inode(h.node)), CACHE_S)

    def setattr(self, h: wire.Header, change: wire.SetAttr) -> Reply:
        """chmod, chown and utimes act on this node's tree; a size is accepted and ignored."""
        inode = self._inode(h.node)
        if change.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | (change.mode & 0o7777)
            if isinstance(inode, LockFile) and inode.linked:
                self.unused.watch(inode)
        elif (
            change.uid is not None or change.gid is not None or (change.size is not None and h.uid)
        ):
            inode.end_set_id()  # the kernel leaves that to us (HANDLE_KILLPRIV)
        if change.size == 0:
            self.truncated(inode, change.fh, h.pid)
        if change.uid is not None:
            inode.uid = change.uid
        if change.gid is not None:
            inode.gid = change.gid
        if change.atime_ns is not None:
            inode.atime_ns = change.atime_ns
        if change.mtime_ns is not None:
            inode.mtime_ns = change.mtime_ns
        inode.changed()
        return wire.attr_out(self._attr(inode), CACHE_S)

    def mknod(self, h: wire.Header, name: bytes, mode: int, umask: int, _rdev: int) -> Reply:
        """Make a lock's file on this node, without taking the lock."""
        parent = self._directory(h.node)
        if not stat.S_ISREG(mode):
            return errno.EPERM
        if parent.is_root:
            return errno.EACCES
        if not parent.linked:
            return errno.ENOENT
        if name in parent.children:
            return errno.EEXIST
        if parent.removing or self.spaces[parent.ino].life is Life.LEAVING:
            return errno.ENOLCK  # answered ENOLCK, a removal goes on whatever becomes of the domain
        if lock_fault(name) is not None:
            return errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.EINVAL
        refusal = self._refuse_growth() or self.usage.refuse_lock(h.uid)
        if refusal:
            return refusal
        self.usage.count_lock(h.uid, 1)
        self.spaces[parent.ino].files.made((name,))
        file = self.tree.add(parent, name, mode, h.uid, h.gid, umask)
        assert isinstance(file, LockFile)
        self.unused.watch(file)
        return self._entry(file)

    def _refuse_growth(self) -> int:
        """ENOSPC when the state has reached its bound: then locks are only taken and given."""
        full = self.domains.state_mb() >= self.limits.max_state_mb
        return errno.ENOSPC if full else 0

    def mkdir(self, h: wire.Header, name: bytes, mode: int, umask: int) -> Reply:
        """Join the domain `name`."""
        root = self._directory(h.node)
        if not root.is_root:
            return errno.EPERM
        if name in root.children:
            return errno.EEXIST
        if self.ending:
            return errno.ENOLCK
        if domain_fault(name) is not None:
            return errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.EINVAL
        refusal = self._refuse_growth() or self.usage.refuse_domain(h.uid)
        if refusal:
            return refusal
        self.usage.count_domain(h.uid, 1)
        answer = self.bounded(h.unique)
        answer.take_back = lambda reply: self.tree.forget(wire.entry_node(reply), 1)

        def joined(space: Lockspace | DlmfsError) -> None:
            if isinstance(space, DlmfsError):
                self.usage.count_domain(h.uid, -1)
                answer(space.errno)
            elif name in root.children or not answer.open:
                self.usage.count_domain(h.uid, -1)
                self.domains.leave(space, lambda _error: None)
            else:
                asked = stat.S_IFDIR | (mode & 0o7777)
                inode = self.tree.add(root, name, asked, h.uid, h.gid, umask)
                self.spaces[inode.ino] = space
                answer(self._entry(inode))

        self.domains.join(name, joined)
        return answer.reply()

    def rmdir(self, h: wire.Header, name: bytes) -> Reply:
        """Leave the domain."""
        child = self._child(h.node, name)
        if not isinstance(child, Directory):
            return errno.ENOTDIR
        if child.children:
            return errno.ENOTEMPTY
        if child.removing:
            return errno.ENOLCK  # the one that was answered so goes on
        space = self.spaces[child.ino]
        answer = self.bounded(h.unique)
        child.removing = True

        def left(error: DlmfsError | None) -> None:
            if error is not None and space.life is not Life.LOST:
                child.removing = False
                answer(error.errno)
                return
            if child.linked:
                now = self.spaces.pop(child.ino)
                if now is not space:  # the node was fenced, and has joined again meanwhile
                    self.domains.leave(now, lambda _error: None)
                self.tree.remove(child)
                self.usage.count_domain(child.maker, -1)
                if not answer.open:  # told ENOLCK, the kernel still believes in the name
                    self.device.invalidate_entry(h.node, name)
            answer(b"")

        self.domains.leave(space, left)
        return answer.reply()

    def unlink(self, h: wire.Header, name: bytes) -> Reply:
        """Forget the lock on this node; the last node's unlink forgets its value too."""
        child = self._child(h.node, name)
        if not isinstance(child, LockFile):
            return errno.EISDIR
        self.places.clear(child.ino)
        child = self._child(h.node, name)  # if the lease was over, its successor
        assert isinstance(child, LockFile)
        space = self.spaces[child.domain.ino]
        lock = space.locks.get(name)
        if lock is not None and lock.res.in_use:
            return errno.EBUSY
        answer = self.bounded(h.unique)

        def forgotten(error: DlmfsError | None) -> None:
            if error is not None:
                answer(error.errno)
                return
            if child.linked:
                self.removed(child, space)
                if not answer.open:
                    self.device.invalidate_entry(h.node, name)
            answer(b"")

        if lock is None or not space.live:
            forgotten(None)
        else:
            lock.forget(forgotten)
        return answer.reply()

    def removed(self, file: LockFile, space: Lockspace) -> None:
        """The node has left the file's lock: the name goes."""
        space.drop(file.name)
        self.tree.remove(file)
        self.usage.count_lock(file.maker, -1)
        self.unused.gone()

    def symlink(self, _h: wire.Header, _name: bytes, _target: bytes) -> Reply:
        return errno.EPERM

    def link(self, _h: wire.Header, _old: int, _name: bytes) -> Reply:
        return errno.EPERM

    def rename(self, _h: wire.Header, _old: bytes, _parent: int, _new: bytes, _flags: int) -> Reply:
        return errno.EPERM

    # -- directories --------------------------------------------------------------------------

    def opendir(self, h: wire.Header, _flags: int) -> Reply:
        self._directory(h.node)
        return wire.opened(0, 0)

    def readdir(self, h: wire.Header, _fh: int, offset: int, size: int) -> Reply:
        """Newest first. An entry's offset is its inode number and a bit, so that a reader that goes
        on from it misses nothing and sees nothing twice, whatever was made or removed since."""
        directory = self._directory(h.node)
        out = wire.Dirents(size)
        above = directory.parent or directory
        for place, (ino, name) in enumerate(zip((directory.ino, above.ino), DOTS, strict=True)):
            if offset <= place and not out.add(ino, place + 1, stat.S_IFDIR, name):
                return out.payload()
        below = offset - len(DOTS) if offset > len(DOTS) else MAX_INO
        for ino in directory.numbers_below(below):
            inode = self.tree.inodes.get(ino)
            if inode is None or not inode.linked:
                continue
            if not out.add(ino, ino + len(DOTS), stat.S_IFMT(inode.mode), inode.name):
                break
        return out.payload()

    def releasedir(self, _h: wire.Header, _fh: int) -> Reply:
        return b""

    def fsyncdir(self, _h: wire.Header, _fh: int, _datasync: int) -> Reply:
        return b""

    def statfs(self, _h: wire.Header) -> Reply:
        return wire.statfs(bsize=BLOCK, namelen=NAME_MAX)

    # -- fencing ------------------------------------------------------------------------------

    def fenced(self, reason: str) -> None:  # noqa: ARG002 - part of `Host`
        """`membership.Host`: every descriptor is lost, and `domain_lost` has said so."""
        self.over()
        if self.watchdog is not None:
            self.watchdog.lost()

    def rejoined(self, space: Lockspace) -> None:
        """`membership.Host`: the directory's domain has a new membership; new opens use it."""
        directory = self.tree.root.children.get(space.domain)
        if isinstance(directory, Directory):
            self.spaces[directory.ino] = space
            space.files.made(directory.children)

    # -- extended attributes ------------------------------------------------------------------

    def getxattr(self, h: wire.Header, name: bytes, size: int) -> Reply:
        return self._sized(xattrs.get(self, self._inode(h.node), name, h.uid), size)

    def listxattr(self, h: wire.Header, size: int) -> Reply:
        return self._sized(xattrs.names(self._inode(h.node)), size)

    def _sized(self, value: bytes | int, size: int) -> Reply:
        if isinstance(value, int):
            return value
        if size == 0:
            return wire.xattr_size(len(value))
        return value if len(value) <= size else errno.ERANGE

    def setxattr(self, _h: wire.Header, _name: bytes, _value: bytes, _flags: int) -> Reply:
        return errno.EOPNOTSUPP

    def removexattr(self, _h: wire.Header, _name: bytes) -> Reply:
        return errno.EOPNOTSUPP

    def destroy(self) -> None:
        """The kernel is done with the mount; the device's end follows."""
