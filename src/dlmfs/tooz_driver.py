"""A driver of tooz (OpenStack's coordination library): its locks, as locks of a dlmfs domain.

    coordinator = tooz.coordination.get_coordinator("dlmfs:///mnt/locks?domain=nova", b"host1")

The path is the mount, found by itself if it is empty; `domain` is "tooz" unless given. Groups, members
and tooz's own leader election are not there: a lock service keeps no lists (`dlmfs.Election` elects).
Installed as `dlmfs[tooz]`.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any
from urllib.parse import quote

import tooz
from tooz import coordination, locking, utils

from dlmfs.client.place import find_mount
from dlmfs.client.sync import Lock
from dlmfs.errors import DlmfsError, NotGranted
from dlmfs.names import LOCK_NAME_MAX


def file_name(name: bytes) -> str:
    """What a lock of tooz, whose name may be anything, is called as a file."""
    text = quote(name, safe=" !#&'()+,:;=@[]^_`{}~")
    if not name.strip(b"."):
        text = text.replace(".", "%2E")
    return text if len(text) <= LOCK_NAME_MAX else hashlib.sha256(name).hexdigest()


class ToozLock(locking.Lock):  # type: ignore[misc]  # without tooz it is not known
    """One lock of tooz. Each acquisition is an object of its own in the library: so threads that share
    this one exclude each other."""

    def __init__(self, name: bytes, path: str, mount: str | None) -> None:
        super().__init__(name)
        self._given = path, mount
        self._mutex = threading.Lock()
        self._held: list[Lock] = []
        """Shared, it may be had several times."""

    def acquire(
        self, blocking: bool | float = True, shared: bool = False, timeout: float | None = None
    ) -> bool:
        """As tooz has it: False where it could not be had in time. Raises ToozConnectionError."""
        waits, limit = utils.convert_blocking(blocking)
        limit = timeout if timeout is not None else limit
        path, mount = self._given
        lock = Lock(path, shared=shared, mount=mount)
        try:
            had = lock.acquire(timeout=(-1 if limit is None else limit) if waits else 0)
        except NotGranted:
            return False
        except DlmfsError as error:
            raise coordination.ToozConnectionError(str(error)) from error
        with self._mutex:
            self._held.append(lock)
        return had

    def release(self) -> bool:
        """Whether it was held, if only in the belief of this object."""
        with self._mutex:
            lock = self._held.pop() if self._held else None
        if lock is None:
            return False
        lock.release()
        return True

    @property
    def acquired(self) -> bool:
        """Whether this object has it, and has not lost it."""
        with self._mutex:
            return any(lock.held for lock in self._held)

    def is_still_owner(self) -> bool:
        return self.acquired

    def heartbeat(self) -> bool:
        """The node's lease is renewed by its daemon."""
        return self.acquired


class ToozDriver(coordination.CoordinationDriver):  # type: ignore[misc]
    """See the head of the file."""

    CHARACTERISTICS = (
        coordination.Characteristics.DISTRIBUTED_ACROSS_THREADS,
        coordination.Characteristics.DISTRIBUTED_ACROSS_PROCESSES,
        coordination.Characteristics.DISTRIBUTED_ACROSS_HOSTS,
        coordination.Characteristics.LINEARIZABLE,
    )

    def __init__(self, member_id: bytes, parsed_url: Any, options: dict[str, Any]) -> None:
        super().__init__(member_id, parsed_url, options)
        domain = options.get("domain", "tooz")
        self._domain = domain if isinstance(domain, str) else domain[-1]
        self._mount = parsed_url.path or None

    def _start(self) -> None:
        try:
            find_mount(self._mount)
        except DlmfsError as error:
            raise coordination.ToozConnectionError(str(error)) from error

    def watch_join_group(self, group_id: bytes, callback: Any) -> None:  # noqa: ARG002 - tooz's
        raise tooz.NotImplemented

    def watch_leave_group(self, group_id: bytes, callback: Any) -> None:  # noqa: ARG002
        raise tooz.NotImplemented

    def get_lock(self, name: bytes) -> ToozLock:
        """The lock of this name."""
        text = name if isinstance(name, bytes) else str(name).encode()
        return ToozLock(name, f"{self._domain}/{file_name(text)}", self._mount)
