"""One suite, two stores: a driver opens handles on one store and runs its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from dlmfs.errors import DlmfsError
from dlmfs.sim.loop import SimLoop
from dlmfs.store import statefile
from dlmfs.store.base import Session, Store, Txn, TxnResult
from dlmfs.store.memory import MemoryServer, MemoryStore
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
            with mock.patch.object(statefile, "fs_type", return_value=self.kind):
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


class Client:
    """A handle with its session, for tests that read top to bottom."""

    def __init__(self, driver: Driver, name: str = "n") -> None:
        self.driver = driver
        self.store = driver.open()
        self.lost: list[str] = []
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
