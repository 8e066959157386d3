"""The daemon: joins store, engine, file system and FUSE device, and owns their life.

Start: state, session, node name, mount, device, control socket, then "ready".
End (umount, SIGTERM, a lost session): stop serving, give every lock back, leave the domains, end
the session. Nothing of a clean end is left in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from dlmfs import __version__, report
from dlmfs.control import ControlServer, control_path
from dlmfs.engine.lockspace import Lockspace
from dlmfs.errors import DlmfsError, LockLost, NodeNameInUse, Unavailable
from dlmfs.fs.filesystem import FileSystem
from dlmfs.fs.tree import Tree
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.device import Device
from dlmfs.store.base import Get, KeyValue, Put, Session, Txn, TxnResult, created_at
from dlmfs.store.sqlite import SqliteStore
from dlmfs.store.statefile import default_path
from dlmfs.timing import Timing

if TYPE_CHECKING:
    from dlmfs.config import MountConfig
    from dlmfs.store.base import Store

log = logging.getLogger("dlmfs.node")

LEAVE_MAX_S: Final = 20.0
"""A clean end waits this long for the store; then the session ends as if the node had died."""
NAMES_MAX: Final = 1000


class Node:
    """One daemon with one mount. `run` is its whole life."""

    def __init__(self, config: MountConfig) -> None:
        self.config = config
        self.name = config.options.node or ""
        self.started = time.time()
        self.timing = Timing(config.options.ttl_s)
        self.spaces: dict[bytes, Lockspace] = {}
        self.lost_reason: str | None = None
        self.mounted = False
        self.loop: asyncio.AbstractEventLoop
        self.store: Store
        self.session: Session
        self.fs: FileSystem
        self.device: Device
        self._ended: asyncio.Future[str]

    # -- life -----------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> int:
        """Serve until unmounted or told to stop; the exit code. Raises DlmfsError before ready."""
        self.loop = asyncio.get_running_loop()
        self._ended = self.loop.create_future()
        self.loop.set_exception_handler(self._crashed)
        path = self.config.state_path or default_path(self.config.state_name)
        self.store = SqliteStore(path, self.loop, default=self.config.state_path is None)
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(self.store.close)
            await self._join_store()
            undo.push_async_callback(self._end_session)
            self._mount()
            undo.callback(self._unmount)
            await self._answering()
            control = ControlServer(
                control_path(self._entry),
                {"status": self._status, "info": self._info},
                allow_other=self.config.options.allow_other is not False and os.getuid() == 0,
            )
            await control.start()
            undo.push_async_callback(control.close)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self.loop.add_signal_handler(number, self._end, f"signal {number.name}")
            ready()
            log.info("node %s serves %s", self.name, self.config.mountpoint)
            reason = await self._ended
            log.info("node %s ends: %s", self.name, reason)
        return 0

    def _end(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)

    def _crashed(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """A broken invariant: better no lock service than a wrong one."""
        error = context.get("exception")
        loop.default_exception_handler(context)
        self._lose(f"internal error: {error!r}")

    def _lose(self, reason: str) -> None:
        """The session is over: every descriptor is lost, for ever (promise 3)."""
        if self.lost_reason is None:
            self.lost_reason = reason
            log.error("node %s is fenced: %s", self.name, reason)
        for space in list(self.spaces.values()):
            space.lose(reason)

    # -- joining the store ------------------------------------------------------------------------

    async def _join_store(self) -> None:
        opened: asyncio.Future[Session] = self.loop.create_future()

        def done(result: Session | DlmfsError) -> None:
            if isinstance(result, DlmfsError):
                opened.set_exception(result)
            else:
                opened.set_result(result)

        host = os.uname().nodename.split(".")[0] or "localhost"
        self.store.open_session(self.name or host, self.timing.ttl_s, self._lose, done)
        self.session = await opened
        wanted = [self.name] if self.name else _names(host)
        for name in wanted:
            if await self._take_name(name):
                self.name = name
                return
        await self._end_session()
        raise NodeNameInUse(
            f"a node named {self.name or host} is alive on {self.config.source_text}: choose "
            "another with -o node=NAME"
        )

    async def _take_name(self, name: str) -> bool:
        """Register the node name, which lives on our lease."""
        key = b"n/" + name.encode()
        facts = {"pid": os.getpid(), "host": os.uname().nodename, "mount": self.config.mountpoint}
        put = Put(key, json.dumps(facts).encode(), self.session.lease)
        result = await self.transact(Txn((created_at(key, 0),), (put,), (Get(key),)))
        return result.succeeded

    async def transact(self, txn: Txn) -> TxnResult:
        """One transaction of the node's own. Raises the DlmfsError that the store answers."""
        answer: asyncio.Future[TxnResult] = self.loop.create_future()

        def done(result: TxnResult | DlmfsError) -> None:
            if answer.done():
                return
            if isinstance(result, DlmfsError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        self.store.txn(txn, done)
        return await answer

    async def _end_session(self) -> None:
        """Leave every domain, then end the session, whether or not the leaving worked."""
        with contextlib.suppress(TimeoutError, DlmfsError):
            async with asyncio.timeout(LEAVE_MAX_S):
                for space in list(self.spaces.values()):
                    left: asyncio.Future[DlmfsError | None] = self.loop.create_future()
                    self.leave(space, left.set_result)
                    await left
                closed: asyncio.Future[DlmfsError | None] = self.loop.create_future()
                self.session.close(closed.set_result)
                await closed

    # -- mounting ---------------------------------------------------------------------------------

    def _mount(self) -> None:
        options = self.config.options
        tree = Tree(os.getuid(), os.getgid())
        self.fs = FileSystem(
            tree, self, self.loop, self.timing, limits=options.limits, readers=self.loop
        )
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

    async def _answering(self) -> None:
        """Wait for the kernel's first request: from then on the mount answers."""
        started: asyncio.Future[None] = self.loop.create_future()
        self.device.on_ready = lambda: started.set_result(None)
        self.device.on_end = self._device_ended
        self.device.on_bug = lambda error: self._lose(f"internal error: {error!r}")
        self.device.start()
        async with asyncio.timeout(10):
            await started

    def _device_ended(self, reason: str) -> None:
        self.mounted = False
        self._end(reason)

    def _unmount(self) -> None:
        """Detach the mount if it still stands, then let go of every descriptor on it.

        In this order: the kernel must refuse the processes before others get their locks.
        """
        if self.mounted:
            with contextlib.suppress(DlmfsError):
                fuse_mount.unmount(self.config.mountpoint, lazy=True)
        self.device.close()
        self.fs.close_all()

    # -- domains ----------------------------------------------------------------------------------

    def join(self, name: bytes, done: Callable[[Lockspace | DlmfsError], None]) -> None:
        """`Domains`: become a member of a domain."""
        if self.lost_reason is not None:
            done(Unavailable(f"this node is fenced: {self.lost_reason}"))
            return
        space = Lockspace(
            self.store,
            self.loop,
            self.fs,
            domain=name,
            node=self.name,
            lease=self.session.lease,
            owner=self.config.options.owner,
            timing=self.timing,
        )

        def joined(error: DlmfsError | None) -> None:
            if error is not None:
                done(error)
                return
            self.spaces[name] = space
            done(space)

        space.join(joined)

    def leave(self, space: Lockspace, done: Callable[[DlmfsError | None], None]) -> None:
        """`Domains`: give back every lock of a domain, then the membership."""

        def left(error: DlmfsError | None) -> None:
            if error is None or isinstance(error, LockLost):
                self.spaces.pop(space.domain, None)
            done(error)

        if space.live:
            space.leave(left)
        else:
            left(None)

    def state_mb(self) -> float:
        """`Domains`: size of the state, in megabytes."""
        return self.store.size_mb()

    def lease_state(self) -> str:
        """`Domains`: for people and scripts, by one attribute of the root."""
        return "HEALTHY" if self.lost_reason is None else f"FENCED: {self.lost_reason}"

    # -- control socket -----------------------------------------------------------------------------

    def _status(self, _request: dict[str, object]) -> object:
        return report.status(self)

    async def _info(self, request: dict[str, object]) -> object:
        return await report.info(self, str(request["domain"]), str(request["lock"]))


def _names(host: str) -> list[str]:
    return [host, *(f"{host}-{number}" for number in range(2, NAMES_MAX))]


def serve(config: MountConfig, ready: Callable[[], None]) -> int:
    """Run a node in this process until its end; `ready` is called when the mount answers.

    Returns the exit code. Raises DlmfsError if the node cannot start.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the soft bound is for select(2)
    return asyncio.run(Node(config).run(ready))


__all__ = ["KeyValue", "Node", "__version__", "serve"]
