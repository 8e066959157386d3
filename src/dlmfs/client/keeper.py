"""A thread that waits in open(2) for one lock and then stands for its holder.

An open that waits can only be ended by a signal to its thread, and the daemon knows a holder by the
thread that opened (for `dlmfs status`, and for whom to signal when the node is fenced). So each
lock has a thread of its own for as long as it is awaited or held. It also keeps the program's own
threads clean: an exception in them (Ctrl-C, a cancelled task) can come at any instant, also between
the grant and the line that would have noted it; here none can.

Rules of this file
------------------
* `_mutex` guards the race of grant and giving up: whoever comes first decides, once. It is reentrant:
  a signal's handler, or `__del__`, may come while the same thread has it.
* A thread is signalled only under `_mutex` while it says that it is in a call: never one that ended.
* A signal may come just before the system call that it should end: it is repeated until the wait is
  over. The thread's retries keep its place in the queue (docs/reference.md, "Signals").
* The open file is closed exactly once, and not while a read or write of it is under way: its number
  may be another file's a moment later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from dlmfs import proc
from dlmfs.client import calls, deadlines, logic
from dlmfs.client.turns import Turn, turns
from dlmfs.client.watcher import watcher
from dlmfs.errors import Cancelled, LockLost, NotGranted, Unavailable
from dlmfs.model import LVB_SIZE

AGAIN_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""When a wait that was given up is interrupted again; later, as often as the last."""

WAKE: Final = signal.SIGURG
"""Ends a wait. It is ignored by default, and whoever uses it expects it to come for nothing."""

BLOCKED: Final = signal.valid_signals() - {
    WAKE,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
}
"""The program's signals are for its own threads."""


_keepers: dict[int, Keeper] = {}
"""All that wait or hold, by id(): for a forked child."""


@functools.cache
def _libc() -> ctypes.CDLL:
    """Its calls return EINTR; Python's own would go on for ever (PEP 475)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    return libc


def _catch_wake() -> None:
    """A signal must be caught to end a system call. A C function that does nothing will do: a Python
    handler would run in the main thread, and only the main thread may set one."""
    caught = proc.number(proc.status("self").get(b"SigCgt"), 16) or 0
    if not caught >> (WAKE - 1) & 1:
        libc = _libc()
        libc.signal(WAKE, ctypes.cast(libc.abs, ctypes.c_void_p))
        libc.siginterrupt(WAKE, 1)  # or flock(2) would go on


Event = Callable[[bool], Callable[[], object] | None]
"""Notes that the lock is lost (True) or wanted, without waiting; gives the program's callback."""


class Keeper(threading.Thread):
    """Waits for the lock and keeps it until `release`. `told` is called from this thread once
    it is `settled`; `event`, from the watcher's, when the lock is wanted or lost, and the callback
    that it gives, from this thread."""

    def __init__(
        self,
        request: logic.Request,
        told: Callable[[], object],
        event: Event,
    ) -> None:
        super().__init__(name=f"dlmfs:{request.place.name}", daemon=True)
        self.request = request
        self.process = os.getpid()
        self.token = 0
        self.file = ""
        """Which file it is, for a forked child."""
        self.error: BaseException | None = None
        """Why it came to nothing."""
        self.settled = threading.Event()
        """The wait is over, one way or the other."""
        self._gate = threading.Lock()
        self._gate.acquire()
        self.is_lost = False
        self._told = told
        self.on_event = event
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._mutex = threading.RLock()
        self._in_call = False
        self._given_up = False
        self._fd = -1
        self._users = 0
        self._turn: Turn | None = None
        self._leaving = -1
        """The descriptor that is released, and closed by its last user."""
        self._deadline: deadlines.Mount | None = None
        self.away = ""
        """Why the node cannot serve, while that is waited for."""
        self._early = 0
        """Events that came before it was settled."""
        self._is_watched = False

    # -- this thread ---------------------------------------------------------------------------

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, BLOCKED)
        _keepers[id(self)] = self
        try:
            fd = -1
            try:
                self._turn = self._enter()
                fd = logic.drive(logic.taking(self.request), self._do)
                self.file = self._identify(fd)
            except OSError as error:
                self.error = logic.failure(error, self.request.place.path)
            except BaseException as error:
                self.error = error
            self._settle(fd)
            self._told()
            if self._early:
                self.happened(self._early)
            while (job := self._jobs.get()) is not None:
                job()
        finally:
            self.release()  # again: a signal's handler may have ended the caller's
            self._leave()
            del _keepers[id(self)]

    @property
    def _lock(self) -> object:
        return self.request.place.dev, self.request.place.domain, self.request.place.name

    def _enter(self) -> Turn:
        """Wait for those of this process that came before. Raises Cancelled, NotGranted."""
        path, trying = self.request.place.path, self.request.trying
        turn = turns.enter(
            self._lock, self.request.shared, trying=trying, given_up=lambda: self._given_up
        )
        if turn is None and self._given_up:
            raise Cancelled(f"the wait for {path} was given up")
        if turn is None:
            raise NotGranted(f"{path} is in use in this process")
        return turn

    def _settle(self, fd: int) -> None:
        """Decide, once, what came of it. Watching asks the daemon, so it begins before."""
        if self.error is None:
            try:
                self._deadline = deadlines.watch(self.request.place, self)
                self._watch(fd)
            except OSError as error:
                self.error = logic.failure(error, self.request.place.path)
            except RuntimeError as error:  # no thread can be started for it
                self.error = Unavailable(f"{self.request.place.path} cannot be watched: {error}")
            except BaseException as error:  # or it would never be settled
                self.error = error
        if self.error is not None and fd >= 0:
            self._unwatch(fd)
        with self._mutex:
            if self._given_up and self.error is None:
                self._unwatch(fd)
                self.error = Cancelled(f"the wait for {self.request.place.path} was given up")
            if self.error is None:
                self._fd = fd
            elif fd >= 0:
                self._close_file(fd)
            self.settled.set()
            self._gate.release()
        if self.error is not None:
            self._jobs.put(None)

    def _unwatch(self, fd: int) -> None:
        if self._deadline is not None:
            self._deadline.remove(self)
        # Last: while epoll asks a daemon that is stopped this waits, maybe with `_mutex` in hand, and
        # the thread at the deadline must not wait for that, with the other locks still to be told.
        self._unnotice(fd)

    def _unnotice(self, fd: int) -> None:
        """Before every close: an event of this file must not become another's with its number."""
        if self._is_watched:
            watcher(self.request.place.dev).remove(fd)
            self._is_watched = False

    def _do(self, step: logic.Step) -> object:
        match step:
            case logic.Open(path, flags):
                try:
                    return self._call(_libc().open, os.fsencode(path), flags)
                except Cancelled:
                    self._give_up_place(path)
                    raise
            case logic.Exclude(fd, operation):
                # A wait in flock(2) ends with the file's holder, and not with the mount: a holder that
                # does not notice a loss would keep this one waiting for nothing.
                self._watch(fd)
                return self._call(_libc().flock, fd, operation)
            case logic.MakeLock(path):
                os.mknod(path, logic.MODE)
            case logic.MakeDomain(path):
                os.mkdir(path)
            case logic.Device(fd):
                return os.fstat(fd).st_dev
            case logic.Token(fd):
                self.token = calls.token(fd)
            case logic.Close(fd):
                self._unnotice(fd)
                os.close(fd)
                self._early = 0  # it was about that file
            case logic.Pause(seconds, why):
                self._pause(seconds, why)
            case logic.State(mountpoint):
                return calls.state(mountpoint)
            case logic.Waiters(path):
                return calls.waiters(path)
        return 0

    def _pause(self, seconds: float, why: str) -> None:
        if why and not self.trouble:  # once for all that wait
            import logging

            logging.getLogger("dlmfs.client").warning("waiting: %s", why)
        self.away = why
        if seconds:
            self._call(_libc().poll, None, 0, int(1000 * calls.spread(seconds)))

    def _watch(self, fd: int) -> None:
        if not self._is_watched:
            watcher(self.request.place.dev).add(fd, self)
            self._is_watched = True

    def _call(self, function: Any, *arguments: object) -> int:
        """A call that may wait. Raises Cancelled instead of calling again once it was given up."""
        while True:
            with self._mutex:
                if self._given_up:
                    raise Cancelled(f"the wait for {self.request.place.path} was given up")
                if logic.is_lost(self._early):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                self._in_call = True
            try:
                result: int = function(*arguments)
                code = ctypes.get_errno()
            finally:
                with self._mutex:
                    self._in_call = False
            if result >= 0:
                return result
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    @staticmethod
    def _give_up_place(path: str) -> None:
        """An interrupted open's place is kept for a second, in case it is tried again: until then
        nobody else would be served. Any other open shows that it is not; O_DIRECT is refused."""
        fd = _libc().open(os.fsencode(path), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        if fd >= 0:
            os.close(fd)

    @property
    def trouble(self) -> str:
        """Why the node cannot serve, if it is that which is waited for: by those whose turn it is."""
        dev = self.request.place.dev
        others = (k.away for k in list(_keepers.values()) if k.request.place.dev == dev)
        return self.away or next(filter(None, others), "")

    @property
    def has_it(self) -> bool:
        """Granted, and neither lost nor released."""
        return self._fd >= 0 and not self.is_lost

    @property
    def is_over(self) -> bool:
        """Nothing is awaited or held any more."""
        return self.settled.is_set() and self._fd < 0

    # -- any thread ----------------------------------------------------------------------------

    def wait(self, limit: float | None = None) -> bool:
        """Wait until it is settled; False after `limit` seconds. For the one thread that began it.

        Not by the event, whose wait is written in Python: an exception of a signal's handler in the
        middle of that may leave it locked, and this thread waiting for it with the lock in hand."""
        if self.settled.is_set():
            return True
        most = -1 if limit is None else max(0.0, min(limit, threading.TIMEOUT_MAX))
        return self._gate.acquire(timeout=most)

    def give_up(self) -> bool:
        """End the wait: nothing will be held. False if it is settled already: held, or failed.

        It does not wait for the end itself: if the daemon is stopped, that comes when it goes on."""
        if self.process != os.getpid():
            return True  # a forked child: no such thread, and the mutex may stay locked for ever
        with self._mutex:
            if self.settled.is_set():
                return False
            if self._given_up:
                return True
            self._given_up = True
        if self.ident is None:
            return True  # it has not begun, and looks before it waits
        with contextlib.suppress(RuntimeError):  # while the interpreter ends
            threading.Thread(target=self._interrupt, name="dlmfs:cancel", daemon=True).start()
        return True

    def _interrupt(self) -> None:
        turns.look()
        _catch_wake()
        for pause in itertools.chain(AGAIN_S, itertools.repeat(AGAIN_S[-1])):
            with self._mutex:
                if self._in_call and self.ident is not None:
                    signal.pthread_kill(self.ident, WAKE)
            if self.settled.wait(pause) or not self.is_alive():
                return

    @contextlib.contextmanager
    def using(self) -> Iterator[int]:
        """The open file, which stays open meanwhile. Raises LockLost if it is lost or released."""
        path = self.request.place.path
        if self.process != os.getpid():
            raise LockLost(f"{path} is held by the process that this one was forked from")
        with self._mutex:
            if self._fd < 0 or self.is_lost:
                raise LockLost(f"{path} is not held any more")
            fd = self._fd
            self._users += 1
        try:
            yield fd
        except OSError as error:
            raise logic.failure(error, path) from None
        finally:
            with self._mutex:
                self._users -= 1
            self._close_unused()

    def read(self) -> bytes:
        with self.using() as fd:
            return logic.stripped(os.pread(fd, LVB_SIZE, 0))

    def write(self, value: bytes) -> None:
        data = logic.padded(value)
        with self.using() as fd:
            os.pwrite(fd, data, 0)

    def abandoned(self) -> logic.Abandoned | None:
        with self.using() as fd:
            return logic.abandonment(os.getxattr(fd, logic.ABANDONED))

    def submit(self, job: Callable[[], object]) -> None:
        """Have the thread do it: for those who may not wait themselves."""
        self._jobs.put(job)

    def happened(self, events: int) -> None:
        """From the watcher."""
        lost = logic.is_lost(events)
        with self._mutex:
            if not self.settled.is_set():
                self._early |= events
                if lost:
                    threading.Thread(target=self._interrupt, name="dlmfs:lost", daemon=True).start()
                return
            if self._fd < 0:
                return
            self.is_lost = self.is_lost or lost
            callback = self.on_event(lost)  # here: after a release nothing is told any more
        if callback is not None:
            self._jobs.put(functools.partial(self._call_back, callback))

    def _call_back(self, callback: Callable[[], object]) -> None:
        """In this lock's thread: while one waits, another lock's loss must still be told."""
        if not self.has_it:
            return
        try:
            callback()
        except BaseException:  # the thread stands for the holder and must go on
            import logging

            logging.getLogger("dlmfs.client").exception("a notice's callback failed")

    def release(self) -> None:
        """Drop the lock. Waits only for a stopped daemon that epoll is asking. May be repeated, and
        goes on where an exception ended it: a signal's handler may raise at any line of it."""
        if self.process != os.getpid():
            return  # closed already, by `_forked`
        try:
            with self._mutex:
                if self._fd >= 0:
                    self._unwatch(self._fd)
                    self._fd, self._leaving = -1, self._fd
            self._close_unused()
        finally:
            self._jobs.put(None)

    def leave(self) -> None:
        """After `release`: let the next one of this process have its turn before this returns, and
        not only when the thread has ended: a trylock would be refused for nothing. Not for `__del__`,
        which may come in the middle of another's turn."""
        if self.process == os.getpid() and self.is_over and self._leaving < 0:
            self._leave()

    def _leave(self) -> None:
        if self._turn is not None:
            turns.leave(self._lock, self._turn)

    def _identify(self, fd: int) -> str:
        return _identity(fd)

    def _close_file(self, fd: int) -> None:
        os.close(fd)

    def _close_unused(self) -> None:
        with self._mutex:
            if self._leaving >= 0 and not self._users:
                fd, self._leaving = self._leaving, -1  # nothing comes between this and the close
                self._close_file(fd)


def _forked() -> None:
    """A forked child has copies of the open files, and with them would keep its parent's locks for
    as long as it lives. No thread of ours runs here, so no mutex may be asked for."""
    keepers = list(_keepers.values())
    _keepers.clear()
    for keeper in keepers:
        keeper.process = 0  # in a new pid namespace this process may have its parent's number
        for fd in (keeper._fd, keeper._leaving):  # noqa: SLF001 - its own module
            _close_copy(fd, {keeper.request.place.path}, keeper.file)
    if any(not keeper.settled.is_set() for keeper in keepers):
        # Opened in the parent just before the fork, and noted nowhere yet. A descriptor that the
        # program itself has on such a file goes too: it had asked the library for that lock.
        paths = {keeper.request.place.path for keeper in keepers}
        for fd in proc.numbers("self", "fd"):
            _close_copy(fd, paths)


def _close_copy(fd: int, paths: set[str], file: str = "") -> None:
    """Close it if it is one of these files: the parent may have closed it just before the fork. Not
    by its path alone: the mount may have been detached meanwhile, and then it has another."""
    with contextlib.suppress(OSError):
        path = os.fsdecode(proc.link("self", fd) or b"")
        if {path, path.removesuffix(" (deleted)")} & paths or (file and _identity(fd) == file):
            os.close(fd)


def _identity(fd: int) -> str:
    """The file that is open there, by its mount and number, asking only the kernel; empty where that
    does not tell (before Linux 5.14, or without /proc)."""
    found = proc.open_file("self", fd)
    return "" if found is None else f"{found.mount} {found.ino}"


os.register_at_fork(after_in_child=_forked)
