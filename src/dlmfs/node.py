"""The daemon: joins store, engine, file system and FUSE device, and owns their life.

Start: state, session, node name, mount, device, control socket, then "ready".
End (umount, a signal, an aborted connection): `engine.ending`, all the while as a node that answers
requests and questions; then the mount is detached. A clean end leaves nothing in the store but the
stamp (`engine.timeline`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import resource
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from dlmfs import (
    __version__,
    beginning,
    facts,
    home,
    identity,
    lately,
    privileges,
    proc,
    report,
    takedown,
)
from dlmfs.config import EtcdSource, lock_delay_of, retry_of
from dlmfs.control_server import ControlServer
from dlmfs.deadline import Published, boottime
from dlmfs.engine import membership
from dlmfs.engine.membership import Membership
from dlmfs.errors import DlmfsError, UsageError
from dlmfs.faults import Faults
from dlmfs.fence import LeaseTimer, Watchdog
from dlmfs.fs.filesystem import FileSystem
from dlmfs.fs.kinship import Kinship
from dlmfs.fs.subids import SubordinateIds
from dlmfs.fs.tree import Tree
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.connections import Connection
from dlmfs.fuse.device import Device
from dlmfs.handlers import handlers
from dlmfs.model import OnLost
from dlmfs.notify import Manager, Reports
from dlmfs.permission import hides_processes
from dlmfs.store import highwater
from dlmfs.store.base import Txn, TxnResult
from dlmfs.store.sqlite import SqliteStore
from dlmfs.store.statefile import default_path
from dlmfs.timing import Timing
from dlmfs.traffic import Traffic

if TYPE_CHECKING:
    from dlmfs.config import MountConfig, MountOptions
    from dlmfs.store.base import Session
    from dlmfs.store.etcd.store import EtcdStore

log = logging.getLogger("dlmfs.node")

NAMES_MAX: Final = 1000
UNMOUNTING_S: Final = (0.0, 0.001, 0.004, 0.016, 0.064, 0.256)
"""When to look whether the kernel has let go of the mount."""


class Node:
    """One daemon with one mount. `run` is its whole life."""

    def __init__(self, config: MountConfig, manager: Manager | None = None) -> None:
        self.config = config
        self.manager = manager
        self.started = boottime()
        self.mounted = False
        self.run_folder = ""
        """Where the control socket is, as this process sees it (`rundir`)."""
        self.watchdog: Watchdog | None = None
        self.faults = Faults()
        self.lately = lately.Lately()
        self.loop: asyncio.AbstractEventLoop
        self.store: SqliteStore | EtcdStore
        self.membership: Membership
        self.fs: FileSystem
        self.device: Device
        self.traffic: Traffic
        self._ended: asyncio.Future[str]

    # -- life -----------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> int:
        """Serve until unmounted or told to stop; the exit code. Raises DlmfsError before ready."""
        self.loop = asyncio.get_running_loop()
        self._ended = self.loop.create_future()
        self.loop.set_exception_handler(self._crashed)
        async with contextlib.AsyncExitStack() as undo:
            self.lately = lately.watch()
            undo.callback(lately.forget, self.lately)
            self._guard(undo)
            privileges.confine(privileges.DAEMON)  # while there is one thread: it is for each alone
            await self._open_store(undo)
            await self._join(undo)
            self._mount()
            undo.callback(self._unmount)
            self._publish(undo)
            await self._answering()
            control = ControlServer(
                self._entry,
                handlers(self),
                allow_other=self.config.options.allow_other is not False and os.getuid() == 0,
                run=self.config.options.run,
            )
            await control.start()
            self.run_folder = str(control.path.parent.parent)
            undo.push_async_callback(control.close)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self.loop.add_signal_handler(number, self._end, f"signal {number.name}")
            ready()
            reports = self._report(undo)
            name, rule = self.membership.name, self.config.options.holder
            log.info("node %s serves %s, holder=%s", name, self.config.mountpoint, rule.value)
            reason = await self._ended
            log.info("node %s ends: %s", self.membership.name, reason)
            if reports is not None:
                reports.ends()
            await self._leave(reason)
            takedown.begin()
        return 0

    def _report(self, undo: contextlib.AsyncExitStack) -> Reports | None:
        """Tell the service manager, if one started this daemon, that the mount answers, and how it is
        from now on."""
        if self.manager is None:
            return None
        reports = Reports(self.manager, self.loop, self._says)
        reports.begin()
        undo.callback(reports.close)
        return reports

    def _says(self) -> str:
        """How it is, in one line."""
        member = self.membership
        state, _, why = member.lease_state().partition(": ")
        if member.ending.begun:
            why = f"it ends ({member.ending.reason}): holders are given their time"
        lease = f", lease of {member.timing.ttl_s:g} s" if member.fence_at is not None else ""
        line = f"{state}: node {member.name} of {self.config.source_text}{lease}"
        return f"{line}: {why}" if why else line

    def _end(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)

    def _crashed(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """An exception that came out of a callback or a task. Whoever it belongs to has not caught it,
        so nobody but its caller can be wrong now (engine rule 16): it is named, and all goes on."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)  # an asker is not accepted, and tried again
        elif isinstance(error, Exception):
            self.faults.note(_place(context), error)
        else:
            loop.default_exception_handler(context)

    # -- joining the store ------------------------------------------------------------------------

    def _guard(self, undo: contextlib.AsyncExitStack) -> None:
        """The watchdog process, forked while there is no thread and no lock yet."""
        on_lost = self.config.options.on_lost
        if on_lost is not OnLost.NONE and isinstance(self.config.source, EtcdSource):
            self.watchdog = Watchdog(on_lost, self.config.options.grace_s, self.loop)
            undo.callback(self.watchdog.close)

    async def _open_store(self, undo: contextlib.AsyncExitStack) -> None:
        source, options = self.config.source, self.config.options
        lost = home.lost_at_logout(os.getuid())
        if lost is not None:
            log.warning("%s: %s", *lost)
        if isinstance(source, EtcdSource):
            etcd = _etcd_store(source, options, self.loop)
            undo.push_async_callback(etcd.disconnect)
            self.store = etcd
        else:
            path = source.path or default_path(source.name)
            self.store = SqliteStore(
                path, self.loop, default=source.path is None, highwater=highwater.of_user()
            )
        undo.callback(self.store.close)

    async def _join(self, undo: contextlib.AsyncExitStack) -> None:
        options = self.config.options
        host = os.uname().nodename.split(".")[0] or "localhost"
        local = not isinstance(self.config.source, EtcdSource)
        names = (options.node,) if options.node else _names(host) if local else (host,)
        config = membership.Config(
            names,
            {**identity.own(), "mount": self.config.mountpoint},
            identity.is_over,
            options.holder,
            options.ttl_s,
            lock_delay_of(self.config.source, options),
            options.grace_s,
            options.dead_value,
        )
        member = Membership(self.store, self.loop, boottime, config)
        self.membership = member
        self.fs = FileSystem(
            Tree(os.getuid(), os.getgid(), options.modes),
            member,
            self.loop,
            Timing(options.ttl_s),
            limits=options.limits,
            readers=self.loop,
            watchdog=self.watchdog,
            forget_s=options.forget_s,
        )
        self.fs.usage.owner_of = SubordinateIds(boottime).owner_of
        self.fs.secret = hides_processes()
        self.fs.faults = self.faults
        self.fs.about = partial(report.brief, self)
        self.fs.by_kernel = proc.is_64_bit
        kinship = Kinship(self.loop, self.faults)
        undo.callback(kinship.close)
        self.fs.kinship = kinship.ask
        member.host = self.fs
        self.traffic = Traffic(self)
        member.questions.reply = partial(facts.reply, self)
        await self._begin(member)
        undo.push_async_callback(self._leave, "it could not start")
        if isinstance(self.store, SqliteStore):
            # No lease to run out, but a file to be deleted.
            self.fs.serving, self.fs.expire = partial(self._intact, self.store), _nothing
            return
        timer = LeaseTimer(lambda: member.fence_at, boottime, self._deadline_passed)
        timer.start()
        undo.callback(timer.close)
        self._feed_watchdog()

    async def _begin(self, member: Membership) -> None:
        options = self.config.options
        if not isinstance(self.config.source, EtcdSource):
            await self._finish(member.start)
            return

        def says(what: str) -> None:
            log.warning("%s", what)
            if self.manager is not None:
                self.manager.tell(f"STATUS={what}")

        start = partial(self._finish, member.start)
        await beginning.begin(member, start, retry_of(options), later=options.bg, says=says)

    def _intact(self, store: SqliteStore) -> bool:
        """Whether the state file is still there; if not everything is lost before this returns."""
        if not store.intact():
            self.membership.lose(str(store.dead))
        return store.dead is None

    def _deadline_passed(self) -> None:
        """On the timer's thread: the event loop may be stalled, or about to notice by itself."""
        log.error("node %s: the lease has run out", self.membership.name)
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.membership.serving)

    def _feed_watchdog(self) -> None:
        """Tell the watchdog how long the locks are good."""
        if self.watchdog is None:
            return
        member = self.membership
        self.loop.call_later(member.timing.renew_every_s / 4, self._feed_watchdog)
        fence_at = member.fence_at
        if fence_at is not None:
            timing = member.timing
            self.watchdog.alive_until(fence_at, fence_at + timing.kill_after_s)

    def _publish(self, undo: contextlib.AsyncExitStack) -> None:
        """Tell programs the deadline, before any of them can be granted something."""
        published = Published(self._entry.dev, self.config.options.run)
        undo.callback(published.close)

        def tell(session: Session) -> None:
            at = math.inf
            if session.renewed_at is not None:
                at = session.renewed_at + Timing(session.ttl_s).fence_after_s
            published.tell(at, session.lease)

        self.store.renewed = tell
        self.fs.over = published.over
        session = self.membership.session
        if session is not None and self.membership.up:  # else it is begun later
            tell(session)

    async def _finish(self, start: Callable[[Callable[[DlmfsError | None], None]], None]) -> None:
        """Wait for what `start` begins. Raises the DlmfsError that it ends with."""
        answer: asyncio.Future[DlmfsError | None] = self.loop.create_future()

        def done(error: DlmfsError | None) -> None:
            if not answer.done():
                answer.set_result(error)

        start(done)
        error = await answer
        if error is not None:
            raise error

    async def look_at_store(self) -> None:
        """Before telling how it is: a lease that is renewed says nothing of writes."""
        if not isinstance(self.store, SqliteStore):
            await self.store.look()

    async def transact(self, txn: Txn) -> TxnResult:
        """One transaction of the node's own. Raises the DlmfsError that the store answers."""
        answer: asyncio.Future[TxnResult | DlmfsError] = self.loop.create_future()

        def done(result: TxnResult | DlmfsError) -> None:
            if not answer.done():
                answer.set_result(result)

        self.store.txn(txn, done)
        result = await answer
        if isinstance(result, DlmfsError):
            raise result
        return result

    async def _leave(self, reason: str) -> None:
        """End this node's life among the others. Returns when it is over, however it went."""
        with contextlib.suppress(DlmfsError):
            await self._finish(partial(self.membership.ending.begin, reason))

    # -- mounting ---------------------------------------------------------------------------------

    def _mount(self) -> None:
        options = self.config.options
        fd = fuse_mount.mount(
            options.fsname or self.config.source_text,
            self.config.mountpoint,
            fuse_mount.MountFlags.from_options(options),
        )
        self.mounted = True
        self.device = Device(fd, self.fs, self.loop)
        self.fs.device = self.device
        entry = fuse_mount.find(self.config.mountpoint)
        assert entry is not None
        self._entry = entry
        self._connection = Connection(entry.dev)
        self.fs.mount_device = entry.dev

    async def _answering(self) -> None:
        """Wait for the kernel's first request: from then on the mount answers."""
        started: asyncio.Future[None] = self.loop.create_future()
        self.device.on_ready = lambda: started.set_result(None)
        self.device.on_end = self._device_ended
        self.device.on_bug = self.faults.note
        self.device.start()
        async with asyncio.timeout(10):
            await started

    def _device_ended(self, reason: str) -> None:
        self.mounted = False
        self._end(reason)
        self._look_for_users(UNMOUNTING_S)

    def _look_for_users(self, delays: Sequence[float]) -> None:
        """Nobody has anything open if the kernel has let go of the mount, which it does a little later
        than it ends our reading. What was closed last was told us by nothing else."""
        if self._connection.is_over():
            self.fs.close_all()
        elif delays:
            self.loop.call_later(delays[0], self._look_for_users, delays[1:])

    def _unmount(self) -> None:
        """Detach the mount if it still stands. Last of all: whoever mounts there anew waits for that, and
        finds this node's name free then."""
        if self.mounted:
            with contextlib.suppress(DlmfsError):
                fuse_mount.unmount(self.config.mountpoint, lazy=True)
        self.device.close()
        self._connection.close()


def _etcd_store(
    source: EtcdSource, options: MountOptions, loop: asyncio.AbstractEventLoop
) -> EtcdStore:
    """Loaded after forking, and only if it is used. Raises UsageError without the extra."""
    try:
        from dlmfs.store.etcd.access import access
        from dlmfs.store.etcd.store import EtcdStore
    except ImportError as error:
        raise UsageError(
            f"SOURCE etcd:// needs `pip install dlmfs[etcd]` for the Python that runs dlmfs ({error})"
        ) from None
    timeout_s = Timing(options.ttl_s).renew_every_s
    again = partial(access, source, options, again=True)
    now = access(source, options)
    return EtcdStore(now, source.cluster, loop, boottime, timeout_s, read=again)


def _place(context: dict[str, object]) -> str:
    """Whose callback or task it was that raised."""
    task = context.get("task") or context.get("future")
    if isinstance(task, asyncio.Task):
        return f"task {getattr(task.get_coro(), '__qualname__', task.get_name())}"
    callback = getattr(context.get("handle"), "_callback", None)
    return f"callback {getattr(callback, '__qualname__', context.get('message', ''))}"


def _nothing() -> None:
    return


def _names(host: str) -> Sequence[str]:
    return [host, *(f"{host}-{number}" for number in range(2, NAMES_MAX))]


def serve(config: MountConfig, ready: Callable[[], None], manager: Manager | None = None) -> int:
    """Run a node in this process until its end; `ready` is called when the mount answers, and
    `manager` told.

    Returns the exit code. Raises DlmfsError if the node cannot start.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the soft bound is for select(2)
    return asyncio.run(Node(config, manager).run(ready))


__all__ = ["Node", "__version__", "serve"]
