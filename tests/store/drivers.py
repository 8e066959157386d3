"""One suite, three stores: a driver opens handles on one store and runs its event loop."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from dlmfs import fstype
from dlmfs.errors import DlmfsError, OutcomeUnknown
from dlmfs.sim.loop import SimLoop
from dlmfs.store.base import Session, Store, Txn, TxnResult
from dlmfs.store.etcd.rpc import Access
from dlmfs.store.etcd.store import EtcdStore
from dlmfs.store.etcd.watch import EtcdWatch
from dlmfs.store.memory import MemoryServer
from dlmfs.store.memory_store import MemoryStore
from dlmfs.store.sqlite import SqliteStore


class Driver(Protocol):
    def open(self) -> Store: ...

    def run_until(self, condition: Callable[[], bool]) -> None: ...

    def close(self) -> None: ...


class MemoryDriver:
    def __init__(self, _folder: Path) -> None:
        self.loop = SimLoop()
        self.server = MemoryServer(self.loop, start_revision=100)

    def open(self) -> MemoryStore:
        return MemoryStore(self.server)

    def run_until(self, condition: Callable[[], bool]) -> None:
        assert self.loop.run_until(condition)

    def close(self) -> None:
        """Nothing is held."""


class SqliteDriver:
    """On whatever file system the folder is."""

    kind: str | None = None
    patience_s = 30.0

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.db"
        self.loop = asyncio.new_event_loop()
        self.stores: list[SqliteStore] = []

    def open(self) -> SqliteStore:
        if self.kind is None:
            store = SqliteStore(self.path, self.loop)
        else:
            with mock.patch.object(fstype, "fs_type", return_value=self.kind):
                store = SqliteStore(self.path, self.loop)
        self.stores.append(store)
        return store

    def run_until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            async with asyncio.timeout(self.patience_s):
                while not condition():  # noqa: ASYNC110 - any condition of the test's
                    await asyncio.sleep(0.001)

        self.loop.run_until_complete(wait())

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.loop.close()


class VolatileDriver(SqliteDriver):
    """Transactions run in the event loop, as on a tmpfs."""

    kind = "tmpfs"


class DurableDriver(SqliteDriver):
    """Every transaction goes to the worker thread, as on a disk."""

    kind = "ext4"


class EtcdDriver:
    """On a server that serves all tests of the run, each with a lock space of its own."""

    patience_s = 30.0
    _numbers = itertools.count()
    _server: tuple[subprocess.Popen[bytes], str] | None = None

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, _folder: Path) -> None:
        # One for all: gRPC's own machinery stays with the first that it meets.
        if EtcdDriver._loop is None:
            EtcdDriver._loop = asyncio.new_event_loop()
            atexit.register(EtcdDriver._loop.close)
        self.loop = EtcdDriver._loop
        self.cluster = f"contract{next(self._numbers)}"
        self.stores: list[EtcdStore] = []
        self.synced: list[EtcdWatch] = []

    @classmethod
    def endpoint(cls) -> str:
        if cls._server is None:
            folder = tempfile.mkdtemp(prefix="dlmfs-etcd-", dir="/dev/shm")
            client, peer = (f"http://127.0.0.1:{port}" for port in _free_ports(2))
            program = Path(sys.executable).with_name("etcd")
            args = {
                "data-dir": folder,
                "listen-client-urls": client,
                "advertise-client-urls": client,
                "listen-peer-urls": peer,
                "initial-advertise-peer-urls": peer,
                "initial-cluster": f"default={peer}",
                "log-level": "panic",
            }
            command = [str(program), *(f"--{name}={value}" for name, value in args.items())]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            atexit.register(process.wait)
            atexit.register(process.kill)
            cls._server = (process, client.removeprefix("http://"))
            _wait_for(int(client.rpartition(":")[2]))
        return cls._server[1]

    def open(self) -> EtcdStore:
        access = Access((self.endpoint(),))
        store = EtcdStore(access, self.cluster, self.loop, self.loop.time, self.patience_s)
        store.about.version = "3.5.1"  # as if its warning had been said
        self.stores.append(store)
        return store

    def run_until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            async with asyncio.timeout(self.patience_s):
                while not condition():  # noqa: ASYNC110 - any condition of the test's
                    await asyncio.sleep(0.001)

        self.loop.run_until_complete(wait())

    def flush(self, store: Store, revision: int) -> None:
        """Until each watch of the handle has been told everything up to there: on etcd each has a
        stream of its own."""
        assert isinstance(store, EtcdStore)

        async def told() -> None:
            async with asyncio.timeout(self.patience_s):
                for watch in store.watches:
                    if watch not in self.synced:
                        # A server before 3.5.8 gives its word before it has told what was there when the
                        # watch began, which it does ten times a second.
                        await asyncio.sleep(0.25)
                        watch.told = 0
                        self.synced.append(watch)
                    while watch.told < revision and not watch.cancelled:
                        await watch.ask()
                        await asyncio.sleep(0.01)

        self.loop.run_until_complete(told())

    def close(self) -> None:
        for store in self.stores:
            if store.session is not None:  # or it ends during another test, which counts revisions
                self.loop.run_until_complete(store.session.revoke())
            store.close()
            self.loop.run_until_complete(store.disconnect())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _wait_for(port: int) -> None:
    """Until the server has elected itself; before that it answers that it has no leader."""
    program = Path(sys.executable).with_name("etcdctl")
    command = [str(program), "--endpoints", f"127.0.0.1:{port}", "endpoint", "health"]
    deadline = time.monotonic() + 30
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "etcd did not start"


class Client:
    """A handle with its session, for tests that read top to bottom."""

    def __init__(self, driver: Driver, name: str = "n") -> None:
        self.driver = driver
        self.store = driver.open()
        self.lost: list[str] = []
        session = self.get(lambda done: self.store.open_session(name, 15.0, self._lose, done))
        while isinstance(session, OutcomeUnknown):  # a server that has only just been started
            session = self.get(lambda done: self.store.open_session(name, 15.0, self._lose, done))
        self.session: Session = session

    def _lose(self, error: DlmfsError) -> None:
        self.lost.append(str(error))

    def get(self, start: Callable[[Callable[[Any], None]], None]) -> Any:
        """Start something and wait for its one answer, which must not come from inside."""
        answers: list[Any] = []
        start(answers.append)
        assert not answers, "answered from inside the call"
        self.driver.run_until(lambda: bool(answers))
        assert len(answers) == 1
        return answers[0]

    def txn(self, txn: Txn) -> TxnResult:
        result = self.get(lambda done: self.store.txn(txn, done))
        assert isinstance(result, TxnResult), result
        return result

    def fails(self, txn: Txn) -> DlmfsError:
        result = self.get(lambda done: self.store.txn(txn, done))
        assert isinstance(result, DlmfsError), result
        return result
