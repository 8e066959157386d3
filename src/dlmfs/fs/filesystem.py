"""What each FUSE request does. A waiting open is a claim in the lock core and nothing else here.

Rules of this file
------------------
* No operation may wait for anything but OPEN. MKDIR, RMDIR and UNLINK hold the kernel's directory
  lock while the store works, so each is answered within `Timing.answer_timeout_s`.
* The daemon never touches its own mount: nothing here uses a path below it.
* RELEASE of a lost descriptor changes no count: its claim has ended (design, "Lease and fencing").
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from dlmfs.core.lockres import Claim, Stage
from dlmfs.engine.lock import ClusterLock
from dlmfs.engine.lockspace import Life, Lockspace
from dlmfs.errors import DlmfsError, Unavailable
from dlmfs.fs import xattrs
from dlmfs.fs.kin import is_kin
from dlmfs.fs.tree import Directory, Inode, LockFile, Tree
from dlmfs.fuse import wire
from dlmfs.model import DOMAIN_NAME_MAX, LOCK_NAME_MAX, LVB_SIZE, Mode
from dlmfs.timing import Scheduler, Timing

if TYPE_CHECKING:
    from dlmfs.fuse.device import Device

CACHE_S: Final = 3600.0
"""How long the kernel may keep names and attributes. They change only through this mount."""

POLLIN: Final = 0x001 | 0x040  # POLLIN | POLLRDNORM
POLLGONE: Final = 0x008 | 0x010  # POLLERR | POLLHUP
BLOCK: Final = 4096

Reply = bytes | int | None
"""A payload, an errno, or None: answered later."""


class Domains(Protocol):
    """How domains come and go: the node's part."""

    def join(self, name: bytes, done: Callable[[Lockspace | DlmfsError], None]) -> None: ...

    def leave(self, space: Lockspace, done: Callable[[DlmfsError | None], None]) -> None: ...


class Handle:
    """An open lock file. `unique` while its open waits; `poll` once poll(2) sleeps on it."""

    __slots__ = ("append", "claim", "file", "lock", "poll", "unique")

    def __init__(self, claim: Claim, file: LockFile, lock: ClusterLock, flags: int) -> None:
        self.claim = claim
        self.file = file
        self.lock = lock
        self.append = bool(flags & os.O_APPEND)
        self.unique = 0
        self.poll: int | None = None


class FileSystem:
    """The operations of one mount; also the `Host` of its lockspaces."""

    def __init__(self, tree: Tree, domains: Domains, loop: Scheduler, timing: Timing) -> None:
        self.tree = tree
        self.domains = domains
        self.loop = loop
        self.timing = timing
        self.device: Device | None = None
        self.spaces: dict[int, Lockspace] = {}
        self.handles: dict[int, Handle] = {}
        self.waiting: dict[int, Handle] = {}
        self._listings: dict[int, list[tuple[int, int, bytes]]] = {}
        self._next_fh = 1
        self._opening: Claim | None = None
        self._opened: Reply = None

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
        return errno.ENOENT if child is None else self._entry(child)

    def forget(self, node: int, count: int) -> None:
        self.tree.forget(node, count)

    def getattr(self, h: wire.Header, _fh: int | None) -> Reply:
        return wire.attr_out(self._attr(self._inode(h.node)), CACHE_S)

    def setattr(self, h: wire.Header, change: wire.SetAttr) -> Reply:
        """chmod, chown and utimes act on this node's tree; a size is accepted and ignored."""
        inode = self._inode(h.node)
        if change.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | (change.mode & 0o7777)
        if change.uid is not None:
            inode.uid = change.uid
        if change.gid is not None:
            inode.gid = change.gid
        if change.atime_ns is not None:
            inode.atime_ns = change.atime_ns
        if change.mtime_ns is not None:
            inode.mtime_ns = change.mtime_ns
        return wire.attr_out(self._attr(inode), CACHE_S)

    def mknod(self, h: wire.Header, name: bytes, mode: int, _umask: int, _rdev: int) -> Reply:
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
        if len(name) > LOCK_NAME_MAX or name.startswith(b"$"):
            return errno.EINVAL
        return self._entry(self.tree.add(parent, name, mode, h.uid, h.gid))

    def mkdir(self, h: wire.Header, name: bytes, mode: int, _umask: int) -> Reply:
        """Join the domain `name`."""
        root = self._directory(h.node)
        if not root.is_root:
            return errno.EPERM
        if name in root.children:
            return errno.EEXIST
        if len(name) > DOMAIN_NAME_MAX:
            return errno.EINVAL
        answer = self._bounded(h.unique)

        def joined(space: Lockspace | DlmfsError) -> None:
            if isinstance(space, DlmfsError):
                answer(space.errno)
            elif name in root.children or not answer.open:
                self.domains.leave(space, lambda _error: None)
            else:
                inode = self.tree.add(root, name, stat.S_IFDIR | (mode & 0o7777), h.uid, h.gid)
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
        space = self.spaces[child.ino]
        answer = self._bounded(h.unique)

        def left(error: DlmfsError | None) -> None:
            if error is not None and space.life is not Life.LOST:
                answer(error.errno)
                return
            if child.linked:
                del self.spaces[child.ino]
                self.tree.remove(child)
            answer(b"")

        if space.live:
            self.domains.leave(space, left)
        else:
            left(None)
        return answer.reply()

    def unlink(self, h: wire.Header, name: bytes) -> Reply:
        """Forget the lock on this node; the last node's unlink forgets its value too."""
        child = self._child(h.node, name)
        if not isinstance(child, LockFile):
            return errno.EISDIR
        space = self.spaces[child.domain.ino]
        lock = space.locks.get(name)
        if lock is not None and lock.res.in_use:
            return errno.EBUSY
        answer = self._bounded(h.unique)

        def forgotten(error: DlmfsError | None) -> None:
            if error is not None:
                answer(error.errno)
                return
            space.drop(name)
            if child.linked:
                self.tree.remove(child)
            answer(b"")

        if lock is None or not space.live:
            forgotten(None)
        else:
            lock.forget(forgotten)
        return answer.reply()

    def symlink(self, _h: wire.Header, _name: bytes, _target: bytes) -> Reply:
        return errno.EPERM

    def link(self, _h: wire.Header, _old: int, _name: bytes) -> Reply:
        return errno.EPERM

    def rename(self, _h: wire.Header, _old: bytes, _parent: int, _new: bytes, _flags: int) -> Reply:
        return errno.EPERM

    # -- directories --------------------------------------------------------------------------

    def opendir(self, h: wire.Header, _flags: int) -> Reply:
        directory = self._directory(h.node)
        above = directory.parent or directory
        listing = [(directory.ino, stat.S_IFDIR, b"."), (above.ino, stat.S_IFDIR, b"..")]
        listing += [(i.ino, stat.S_IFMT(i.mode), i.name) for i in directory.newest_first()]
        fh = self._new_fh()
        self._listings[fh] = listing
        return wire.opened(fh, 0)

    def readdir(self, _h: wire.Header, fh: int, offset: int, size: int) -> Reply:
        listing = self._listings.get(fh)
        if listing is None:
            return errno.EBADF
        out = wire.Dirents(size)
        for place in range(offset, len(listing)):
            ino, kind, name = listing[place]
            if not out.add(ino, place + 1, kind, name):
                break
        return out.payload()

    def releasedir(self, _h: wire.Header, fh: int) -> Reply:
        self._listings.pop(fh, None)
        return b""

    def fsyncdir(self, _h: wire.Header, _fh: int, _datasync: int) -> Reply:
        return b""

    def statfs(self, _h: wire.Header) -> Reply:
        return wire.statfs(bsize=BLOCK, namelen=255)

    # -- locks --------------------------------------------------------------------------------

    def _new_fh(self) -> int:
        fh = self._next_fh
        self._next_fh += 1
        return fh

    def open(self, h: wire.Header, flags: int) -> Reply:
        """Take the lock: shared for O_RDONLY, else exclusive (O_WRONLY and accmode 3 too)."""
        file = self.tree.inodes.get(h.node)
        if not isinstance(file, LockFile):
            return errno.EISDIR if file is not None else errno.ESTALE
        if flags & os.O_DIRECT:
            return errno.EINVAL
        if not file.linked:
            return errno.EAGAIN
        space = self.spaces[file.domain.ino]
        if not space.live:
            return errno.ENOLCK
        claim = Claim(
            self._new_fh(),
            Mode.EX if flags & os.O_ACCMODE else Mode.PR,
            trying=bool(flags & os.O_NONBLOCK),
            pid=h.pid,
            since=self.loop.time(),
        )
        lock = space.lock(file.name)
        handle = claim.tag = Handle(claim, file, lock, flags)
        self._opening, self._opened = claim, None
        try:
            lock.open(claim)
        finally:
            self._opening = None
        if self._opened is None:
            handle.unique = h.unique
            self.waiting[h.unique] = handle
        return self._opened

    def granted(self, claim: Claim) -> None:
        handle = claim.tag
        assert isinstance(handle, Handle)
        claim.since = self.loop.time()
        self.handles[claim.fh] = handle
        payload = wire.opened(claim.fh, wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH)
        if claim is self._opening:
            self._opened = payload
            return
        del self.waiting[handle.unique]
        assert self.device is not None
        if not self.device.answer(handle.unique, payload):
            # The opener was killed between our decision and our answer: nobody will ever
            # release this handle (fuse-notes 2).
            self._close(handle)

    def failed(self, claim: Claim, reason: int) -> None:
        if claim is self._opening:
            self._opened = reason
            return
        handle = claim.tag
        assert isinstance(handle, Handle)
        del self.waiting[handle.unique]
        assert self.device is not None
        self.device.answer(handle.unique, reason)

    def undelivered(self, h: wire.Header, payload: bytes) -> None:
        """The reply to a request could not be delivered: undo an open that was granted at once."""
        if h.opcode == wire.OPEN:
            handle = self.handles.get(wire.opened_fh(payload))
            if handle is not None:
                self._close(handle)

    def interrupt(self, unique: int) -> None:
        """A signal for a waiting open: answer first, withdraw after (engine rule 8)."""
        handle = self.waiting.pop(unique, None)
        if handle is None:
            return  # answered already, or not an open: those are short
        assert self.device is not None
        self.device.answer(unique, errno.EINTR)
        handle.lock.interrupt(handle.claim)

    def release(self, _h: wire.Header, fh: int) -> Reply:
        handle = self.handles.get(fh)
        if handle is not None:
            self._close(handle)
        return b""

    def _close(self, handle: Handle) -> None:
        del self.handles[handle.claim.fh]
        handle.lock.close(handle.claim)

    def _held(self, fh: int) -> Handle:
        handle = self.handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, "no such handle")
        if handle.claim.stage is not Stage.HELD:
            raise OSError(errno.EIO, "the lock of this descriptor was lost")
        return handle

    def read(self, h: wire.Header, fh: int, offset: int, size: int) -> Reply:
        handle = self._held(fh)
        answer = self._later(h.unique)

        def value(lvb: bytes) -> None:
            lost = handle.claim.stage is not Stage.HELD
            answer(errno.EIO if lost else lvb[offset : offset + size])

        handle.lock.read_lvb(value)
        return answer.reply()

    def write(self, h: wire.Header, fh: int, offset: int, data: bytes) -> Reply:
        """Put bytes into the LVB; answered when they are durable (promise 4)."""
        handle = self._held(fh)
        if handle.append:
            offset = 0  # the kernel moves appends to the end; the real dlmfs ignores O_APPEND
        if offset >= LVB_SIZE:
            return errno.ENOSPC
        assert handle.claim.mode is Mode.EX
        data = data[: LVB_SIZE - offset]
        answer = self._later(h.unique)

        def written(error: DlmfsError | None) -> None:
            answer(error.errno if error is not None else wire.written(len(data)))

        handle.lock.write_lvb(offset, data, written)
        return answer.reply()

    def fsync(self, _h: wire.Header, _fh: int, _datasync: int) -> Reply:
        return b""

    def poll(self, _h: wire.Header, fh: int, kh: int, flags: int, _events: int) -> Reply:
        """POLLIN: another node (owner=file: another owner) waits for this lock."""
        handle = self.handles.get(fh)
        if handle is None:
            return errno.EBADF
        if handle.claim.stage is not Stage.HELD:
            return wire.polled(POLLGONE)
        if flags & wire.POLL_SCHEDULE_NOTIFY:
            handle.poll = kh
        return wire.polled(POLLIN if handle.lock.res.contended else 0)

    def notify(self, claim: Claim) -> None:
        handle = claim.tag
        assert isinstance(handle, Handle)
        if handle.poll is not None and self.device is not None:
            self.device.notify_poll(handle.poll)

    def is_kin(self, claim: Claim, holders: Sequence[Claim]) -> bool:
        handle = claim.tag
        assert isinstance(handle, Handle)
        pids = {holder.pid for holder in holders}
        return is_kin(claim.pid, pids, handle.file.ino, handle.file.path())

    def domain_lost(self, domain: bytes, reason: str) -> None:
        """The engine has failed the waiters and ended the claims; nothing else holds state."""

    # -- extended attributes ------------------------------------------------------------------

    def getxattr(self, h: wire.Header, name: bytes, size: int) -> Reply:
        return self._sized(xattrs.get(self, self._inode(h.node), name), size)

    def listxattr(self, h: wire.Header, size: int) -> Reply:
        return self._sized(xattrs.names(self._inode(h.node)), size)

    def _sized(self, value: bytes | None, size: int) -> Reply:
        if value is None:
            return errno.EOPNOTSUPP
        if size == 0:
            return wire.xattr_size(len(value))
        return value if len(value) <= size else errno.ERANGE

    def setxattr(self, _h: wire.Header, _name: bytes, _value: bytes, _flags: int) -> Reply:
        return errno.EOPNOTSUPP

    def removexattr(self, _h: wire.Header, _name: bytes) -> Reply:
        return errno.EOPNOTSUPP

    def destroy(self) -> None:
        """The kernel is done with the mount; the device's end follows."""

    # -- answers ------------------------------------------------------------------------------

    def _later(self, unique: int) -> Answer:
        assert self.device is not None
        return Answer(self.device, unique)

    def _bounded(self, unique: int) -> Answer:
        """An answer that becomes ENOLCK when the store does not come back in time."""
        answer = self._later(unique)
        answer.timer = self.loop.call_later(self.timing.answer_timeout_s, answer, Unavailable.errno)
        return answer

    def close_all(self) -> None:
        """The mount is gone: nobody can use or release a descriptor any more."""
        for handle in list(self.waiting.values()):
            if handle.claim.stage is Stage.WAITING:
                handle.lock.interrupt(handle.claim)
        self.waiting.clear()
        for handle in list(self.handles.values()):
            self._close(handle)


class Answer:
    """The reply to one request: returned if it is known in time, else sent later, once."""

    __slots__ = ("_deferred", "_device", "_early", "_unique", "open", "timer")

    def __init__(self, device: Device, unique: int) -> None:
        self._device = device
        self._unique = unique
        self._early: Reply = None
        self._deferred = False
        self.open = True
        self.timer: object | None = None

    def __call__(self, reply: bytes | int) -> None:
        if not self.open:
            return
        self.open = False
        if self.timer is not None:
            self.timer.cancel()  # type: ignore[attr-defined]
        if self._deferred:
            self._device.answer(self._unique, reply)
        else:
            self._early = reply

    def reply(self) -> Reply:
        """What the handler returns: the reply if it is there, None if it will be sent."""
        self._deferred = True
        return self._early
