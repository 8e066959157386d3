"""The open lock files of one mount: what OPEN, READ, WRITE, POLL and RELEASE do.

Rules of this file
------------------
* A waiting open is a claim in the lock core and nothing else; only OPEN may wait for ever.
* Whoever is answered EINTR is answered first and withdrawn after (design, engine rule 8). Who is, and
  when, is told in `interrupts`.
* RELEASE of a lost descriptor changes no count: its claim has ended ("Lease and fencing").
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from dlmfs.core.events import Claim, Stage
from dlmfs.engine.lockspace import Life
from dlmfs.errors import DlmfsError, Unavailable
from dlmfs.faults import Faults
from dlmfs.fs import farewell, kin, signals
from dlmfs.fs.answer import Answer, Reply
from dlmfs.fs.handle import Handle
from dlmfs.fs.interrupts import PATIENCE_S, Interrupts
from dlmfs.fs.limits import Usage, User
from dlmfs.fs.losses import Losses
from dlmfs.fs.outside import Kernel, Watchdog
from dlmfs.fs.places import Places, Readers
from dlmfs.fs.signals import Cause
from dlmfs.fs.tree import Inode, LockFile, Tree
from dlmfs.fuse import wire
from dlmfs.model import LVB_SIZE, Limits, Mode
from dlmfs.timing import Scheduler, Timing

if TYPE_CHECKING:
    from dlmfs.engine.lock import ClusterLock
    from dlmfs.engine.lockspace import Lockspace
    from dlmfs.fs.unused import Unused

FMODE_EXEC: Final = 0x20
"""The kernel's own flag of an open by execve(2): a value is no program, whatever its file's mode."""
POLLIN: Final = 0x001 | 0x040  # POLLIN | POLLRDNORM
POLLGONE: Final = 0x008 | 0x010  # POLLERR | POLLHUP


class OpenFiles:
    """The open files, and the `Host` of the lockspaces. `FileSystem` adds names and attributes."""

    device: Kernel
    mount_device = ""
    """As in mountinfo: major:minor."""
    secret = False
    """This host keeps its users' processes from each other (proc(5), "hidepid"); so do we."""
    serving: Callable[[], bool]
    """Asked in every operation: a process that was stopped may run on long after its lease did."""
    expire: Callable[[], object]
    """The same where nothing is served but something is given up, so that somebody else here might be
    granted it; nothing to ask where no lease can run out."""
    ending = False
    """The node's life ends: see `farewell`."""
    unused: Unused

    def __init__(
        self,
        tree: Tree,
        loop: Scheduler,
        timing: Timing,
        *,
        limits: Limits | None = None,
        readers: Readers | None = None,
    ) -> None:
        self.tree = tree
        self.loop = loop
        self.timing = timing
        self.limits = limits or Limits()
        self.usage = Usage(self.limits, tree.root.uid)
        self.spaces: dict[int, Lockspace] = {}
        self.handles: dict[int, Handle] = {}
        """Granted, and not yet released."""
        self.waiting: dict[int, Handle] = {}
        """By the request that waits."""
        self.pending: dict[int, Answer] = {}
        """Reads and writes that wait for the store, by their requests."""
        self.places = Places(loop, readers, self.withdraw, self.fate)
        self.interrupts = Interrupts(loop, self._settle)
        self.watchdog: Watchdog | None = None
        self.faults = Faults()
        self.losses = Losses(loop.time)
        self.kinship: Callable[[User, kin.Question, Callable[[bool], None]], None] = kin.answer
        self.by_kernel: Callable[[int], bool] = lambda _thread: False
        """Whether an open without any flag, for this thread, is the kernel's own."""
        self.about: Callable[[], dict[str, Any]] = dict
        """What the node tells of itself to all that are let in."""
        self.last_fh = 0
        self.over: Callable[[], None] = lambda: None
        """Called when nothing that was granted is good any more: fenced, or the node's life ends."""
        self._opening: Handle | None = None
        self._opened: Reply = None

    # -- opening ------------------------------------------------------------------------------

    def open(self, h: wire.Header, flags: int) -> Reply:
        """Take the lock: shared for O_RDONLY, else exclusive (O_WRONLY and accmode 3 too)."""
        file = self.tree.inodes.get(h.node)
        if not isinstance(file, LockFile):
            return errno.EISDIR if file is not None else errno.ESTALE
        if flags & (os.O_DIRECT | FMODE_EXEC):
            # Refused, but an open all the same: a way to give up one's place without taking a lock.
            self.places.leave(h.pid, file.ino, but=None)
            return errno.EINVAL
        if not flags and self.by_kernel(h.pid):
            return errno.ENOTTY  # for an ioctl(2) like FS_IOC_GETFLAGS, which needs no lock
        if not file.linked:
            # ESTALE has the kernel look the name up again: a lost file has a successor, one that was
            # forgotten is made anew.
            return errno.ESTALE if file.is_stale else errno.EAGAIN
        space = self.spaces[file.domain.ino]
        # First: what is given up here looks at the clock too, and may find the lease over.
        returned = self._returned(h, flags, file) if self.places else None
        if not self.serving() or space.life is not Life.JOINED:
            if returned is not None:
                self.withdraw(returned)
            return errno.ENOLCK  # LEAVING: a removal that was answered ENOLCK still goes on
        if returned is not None:
            if returned.stage is not Stage.HELD or not returned.lock.res.frozen:
                return self._go_on(returned, h.unique)
            self.withdraw(returned)  # what was granted meanwhile is not proved
        user = self.usage.user(h.uid)
        if user.holders >= user.max_holders or len(self.handles) >= self.limits.max_holders:
            return self._too_many(user.holders >= user.max_holders)
        self.last_fh += 1
        lock = space.lock(file.name)
        handle = Handle(self.last_fh, h.pid, flags, file, lock=lock, user=user)
        handle.since = self.loop.time()
        self._opening, self._opened = handle, None
        try:
            if lock.open(handle):
                return self._serve(handle)
            self._opening = None
            return self._wait(handle, h.unique) if self._opened is None else self._opened
        except Exception:
            self._undo(handle)
            raise
        finally:
            self._opening = None

    def _undo(self, handle: Handle) -> None:
        """An open that fails in the middle is answered EIO: nobody will ever release or interrupt it, so
        what it was granted, or waits for, is given back."""
        self.waiting.pop(handle.unique, None)
        if self.handles.get(handle.fh) is handle:
            self._close(handle)
        else:
            self.withdraw(handle)

    def _wait(self, handle: Handle, unique: int) -> Reply:
        user, ino = handle.user, handle.file.ino
        too_many = user.may_wait_no_more(ino)
        if too_many or len(self.waiting) >= self.limits.max_waiters:
            handle.lock.interrupt(handle)
            return self._too_many(too_many)
        user.waits(ino)
        handle.charged = True
        handle.unique = unique
        self.waiting[unique] = handle
        return None

    @staticmethod
    def _discharge(handle: Handle) -> None:
        """It waits no more. Once: a withdrawal may find the lease over, and that fails the same claim."""
        if handle.charged:
            handle.charged = False
            handle.user.waits_no_more(handle.file.ino)

    @staticmethod
    def _too_many(of_one_user: bool) -> int:
        return errno.EDQUOT if of_one_user else errno.EAGAIN

    def _returned(self, h: wire.Header, flags: int, file: LockFile) -> Handle | None:
        """The claim that this thread's interrupted open left in the queue. Any other open of the file
        shows that it does not come back for it."""
        mode = Mode.EX if flags & os.O_ACCMODE else Mode.PR
        self.places.leave(h.pid, file.ino, but=None if flags & os.O_NONBLOCK else mode)
        handle = self.places.take(h.pid, file.ino, mode)
        if handle is None:
            return None
        if handle.stage is Stage.ENDED:  # granted and lost while nobody was there
            self._discharge(handle)
            return None
        handle.append = bool(flags & os.O_APPEND)
        return handle

    def _go_on(self, handle: Handle, unique: int) -> Reply:
        if handle.stage is not Stage.HELD:
            handle.unique = unique
            self.waiting[unique] = handle
            return None
        self._discharge(handle)
        try:
            return self._serve(handle)
        except Exception:
            self._undo(handle)
            raise

    def _serve(self, handle: Handle) -> bytes:
        handle.user.holders += 1
        self.handles[handle.fh] = handle
        if handle.mode is Mode.EX:  # a program has it now, and sees what is to be seen
            handle.lock.view.had_ex = handle.lock.res.revision
        if self.watchdog is not None:
            self.watchdog.holds(handle.pid)
        return wire.opened(handle.fh, wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH)

    def granted(self, claim: Claim) -> None:
        """`Host`: the claim holds the lock."""
        handle = cast("Handle", claim)
        if handle is self._opening:
            self._opened = self._serve(handle)
            return
        handle.since = self.loop.time()
        if not handle.unique:
            return  # its place is kept; the retried open will find it granted
        reply = self._serve(handle)  # first: if it fails, `lock_lost` finds who has no answer yet
        del self.waiting[handle.unique]
        self._discharge(handle)
        if not self.device.answer(handle.unique, reply):
            # The opener was killed between our decision and our answer: nobody will ever
            # release this handle (fuse-notes 2).
            self._close(handle)

    def failed(self, claim: Claim, reason: int) -> None:
        """`Host`: the claim came to nothing."""
        handle = cast("Handle", claim)
        if handle is self._opening:
            self._opened = reason
            return
        self._discharge(handle)
        if not handle.unique:
            self.places.forget(handle)
            return
        del self.waiting[handle.unique]
        self.device.answer(handle.unique, reason)

    def undelivered(self, h: wire.Header, payload: bytes) -> None:
        """The reply to a request could not be delivered: undo an open that was granted at once, or a
        reference to an inode that the kernel will never give back."""
        if h.opcode in (wire.LOOKUP, wire.MKNOD, wire.MKDIR):
            self.tree.forget(wire.entry_node(payload), 1)
        elif h.opcode == wire.OPEN:
            handle = self.handles.get(wire.opened_fh(payload))
            if handle is not None:
                self._close(handle)

    def interrupt(self, unique: int) -> None:
        """A signal, or something like it, for a request that waits."""
        self.interrupts.came(unique)

    def _settle(self, unique: int, waited_s: float) -> bool:
        """Whether a request that was interrupted so long ago is over; ends it if it is time."""
        handle, answer = self.waiting.get(unique), self.pending.get(unique)
        if handle is not None:
            thread, for_store = handle.pid, handle.lock.undecided
        elif answer is not None:
            thread, for_store = answer.thread, True
        else:
            return True
        cause = self.cause(thread)
        if cause is Cause.NOTHING:
            return False
        if for_store and cause is not Cause.FATAL and waited_s < PATIENCE_S:
            return False
        self.expire()  # which may have answered it
        if answer is not None:
            # A write may still happen: who was interrupted was promised nothing (promise 4).
            answer(errno.EINTR)
        elif self.waiting.pop(unique, None) is handle:
            assert handle is not None
            self._interrupted(handle, unique)
        return True

    def _interrupted(self, handle: Handle, unique: int) -> None:
        """A waiting open ends: its place is kept for the case that it is tried again."""
        handle.unique = 0
        # Looked at before the answer: afterwards a dying process may be gone, and its id reused.
        kept = not handle.trying and self.places.keep(handle)
        self.device.answer(unique, errno.EINTR)
        if not kept:
            self.withdraw(handle)

    def withdraw(self, handle: Handle) -> None:
        """Nobody comes back for this claim."""
        self.expire()
        self._discharge(handle)
        if handle.stage is Stage.HELD:
            handle.lock.close(handle)
        elif handle.stage is Stage.WAITING:
            handle.lock.interrupt(handle)

    # -- closing ------------------------------------------------------------------------------

    def release(self, _h: wire.Header, fh: int) -> Reply:
        self.expire()
        handle = self.handles.get(fh)
        if handle is not None:
            self._close(handle)
        return b""

    def _close(self, handle: Handle) -> None:
        del self.handles[handle.fh]
        handle.user.holders -= 1
        if self.watchdog is not None and handle.stage is Stage.HELD:  # else it knows
            self.watchdog.closed(handle.pid)
        handle.lock.close(handle)

    def close_all(self) -> None:
        """The mount is gone: nobody has a descriptor any more."""
        for handle in list(self.handles.values()):
            self._close(handle)

    # -- the end of the node's life --------------------------------------------------------------

    def holding(self) -> bool:
        """`membership.Host`: whether any program holds a lock here."""
        return any(handle.stage is Stage.HELD for handle in self.handles.values())

    def ends(self, reason: str) -> None:
        """`membership.Host`: see `farewell`."""
        farewell.take_leave(self)
        held = [h for h in self.handles.values() if h.stage is Stage.HELD]
        self.losses.tell(f"this node ends ({reason}), its holders are to close", held)

    # -- using --------------------------------------------------------------------------------

    def _held(self, fh: int) -> Handle:
        handle = self.handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, "no such handle")
        if not self.serving() or handle.stage is not Stage.HELD:
            raise OSError(errno.EIO, "the lock of this descriptor was lost")
        return handle

    def read(self, h: wire.Header, fh: int, offset: int, size: int) -> Reply:
        handle = self._held(fh)
        answer = self._interruptible(h, handle.lock)

        def value(lvb: bytes) -> None:
            lost = not self.serving() or handle.stage is not Stage.HELD
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
        if handle.mode is not Mode.EX:
            return errno.EBADF
        data = data[: LVB_SIZE - offset]
        place, change = offset, data
        if handle.truncated:
            # `echo new >LOCK` of a shorter value leaves no tail of the older one. To truncate alone
            # changes nothing, as in the kernel: `exec 9>LOCK` is how scripts take a lock.
            place, change = 0, (bytes(offset) + data).ljust(LVB_SIZE, b"\0")
        handle.truncated = False
        answer = self._interruptible(h, handle.lock)

        def written(error: DlmfsError | None) -> None:
            answer(error.errno if error is not None else wire.written(len(data)))

        handle.lock.write_lvb(place, change, written)
        return answer.reply()

    def truncated(self, inode: Inode, fh: int | None, thread: int) -> None:
        """An open file was truncated. By its opening with O_TRUNC `fh` is not told: then it is one that
        the thread has just opened."""
        space = self.spaces.get(inode.parent.ino) if inode.parent is not None else None
        lock = space.locks.get(inode.name) if space is not None else None
        for handle in lock.res.holders.values() if lock is not None else ():
            if handle.fh == fh or (fh is None and handle.pid == thread):
                assert isinstance(handle, Handle)
                handle.truncated = True

    def fsync(self, _h: wire.Header, _fh: int, _datasync: int) -> Reply:
        return b""

    def poll(self, _h: wire.Header, fh: int, kh: int, flags: int, _events: int) -> Reply:
        """POLLIN: another node (holder=file: another owner) waits for this lock."""
        handle = self.handles.get(fh)
        if handle is None:
            return errno.EBADF
        if not self.serving() or handle.stage is not Stage.HELD:
            return wire.polled(POLLGONE)
        if flags & wire.POLL_SCHEDULE_NOTIFY:
            handle.poll = kh
        return wire.polled(POLLIN if handle.lock.res.contended else 0)

    def notify(self, claim: Claim) -> None:
        """`Host`: somebody waits for what this claim holds, or it is lost."""
        handle = cast("Handle", claim)
        if handle.poll is not None:
            self.device.notify_poll(handle.poll)

    def identify(
        self, claim: Claim, holders: Sequence[Claim], done: Callable[[bool], None]
    ) -> None:
        """`Host`: whether the claim's process holds this lock already (engine rule 11)."""
        handle = cast("Handle", claim)
        pids = frozenset(holder.pid for holder in holders)
        if claim.pid in pids:
            done(True)
            return
        file = handle.file
        question = kin.Question(claim.pid, pids, file.ino, file.path(), self.mount_device)
        self.kinship(handle.user, question, done)

    def fate(self, pid: int) -> int | None:
        """The thread group of a thread that will go on living; None: it is dying, or not known."""
        return kin.fate(pid)

    def cause(self, thread: int) -> Cause:
        """Why a request of this thread was interrupted."""
        return signals.cause(thread)

    def domain_lost(self, domain: bytes, reason: str) -> None:
        """`Host`: every descriptor of the domain is lost."""
        # What was lost before has a successor, which has its name.
        hit = [h for h in self.handles.values() if h.stage is not Stage.HELD and h.file.linked]
        self.losses.tell(
            f"lost with domain {os.fsdecode(domain)} ({reason})",
            (h for h in hit if h.file.domain.name == domain),
        )
        # In an order of its own, not a set's: a simulated run must not depend on addresses.
        self._replace(dict.fromkeys(h.file for h in hit))

    def lock_lost(self, lock: ClusterLock, *_claims: Sequence[Claim]) -> None:
        """`Host`: the lock is broken. Whose it was is looked up in tables of our own."""
        for answer in [a for a in self.pending.values() if a.lock is lock]:
            answer(errno.EIO)
        unanswered = [h for h in self.waiting.values() if h.lock is lock] + self.places.of(lock)
        opening = self._opening
        for handle in [*unanswered, *([opening] if opening is not None else [])]:
            if handle.lock is lock and self.handles.get(handle.fh) is handle:
                del self.handles[handle.fh]  # it was about to be told that it has the lock
                handle.user.holders -= 1
                if self.watchdog is not None:
                    self.watchdog.closed(handle.pid)
        held = [h for h in self.handles.values() if h.lock is lock]
        for handle in held:
            handle.stage = Stage.ENDED
            self.notify(handle)
            if self.watchdog is not None:
                self.watchdog.lost_one(handle.pid)
        for handle in unanswered:
            handle.stage = Stage.ENDED
            self.failed(handle, Unavailable.errno)
        if opening is not None and opening.lock is lock:
            opening.stage = Stage.ENDED
            self._opened = Unavailable.errno
        self.losses.tell("lost by a fault", held)
        self._replace(dict.fromkeys(h.file for h in held))

    def _replace(self, files: Iterable[LockFile]) -> None:
        """Lost files' names get new inodes, so that what the old ones tell (their tokens above all) is
        never their successors'."""
        for file in files:
            if file.linked:
                self.unused.watch(self.tree.replace(file))
                self.device.invalidate_entry(file.domain.ino, file.name)

    def broken(self, where: str, error: Exception) -> None:
        """`Host`: an exception that nobody expected."""
        self.faults.note(where, error)

    # -- answers ------------------------------------------------------------------------------

    def _interruptible(self, h: wire.Header, lock: ClusterLock) -> Answer:
        """An answer that a signal makes EINTR if the store is silent, and the loss of `lock` EIO."""
        return Answer(self.device, h.unique, self.pending, lock, h.pid)

    def bounded(self, unique: int) -> Answer:
        """An answer that becomes ENOLCK when the store does not come back in time."""
        answer = Answer(self.device, unique)
        answer.timer = self.loop.call_later(self.timing.answer_timeout_s, answer, Unavailable.errno)
        return answer
