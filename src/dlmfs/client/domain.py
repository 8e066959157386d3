"""A domain as a folder of the mount: joined, listed, left. The same for threads and for asyncio."""

from __future__ import annotations

import contextlib
import os
import weakref

from dlmfs.client import logic
from dlmfs.client.base import BaseLock
from dlmfs.client.place import AnyPath, place
from dlmfs.errors import NotGranted, UsageError


class BaseDomain:
    """One domain on this node. Its calls wait for the node alone, which bounds them."""

    def __init__(self, name: AnyPath, *, mount: AnyPath | None = None) -> None:
        """`name`: of the domain, or an absolute path to its folder. `mount`: see `Lock`. Raises
        UsageError for what is no domain, Unavailable where no dlmfs is mounted."""
        inside = place(os.path.join(os.fsdecode(name), "x"), mount)
        self.path = os.path.dirname(inside.path)
        self.name = inside.domain
        self._locks: weakref.WeakSet[BaseLock] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}>"

    def _path(self, name: str | bytes) -> str:
        text = os.fsdecode(name)
        if "/" in text or text in ("", ".", ".."):
            raise UsageError(f"{text!r} is no name of a lock")
        return f"{self.path}/{text}"

    def _release_all(self) -> None:
        for lock in list(self._locks):
            if lock.held:
                lock.release()
        self._locks.clear()

    def _join(self) -> None:
        try:
            os.mkdir(self.path)
        except FileExistsError:
            return
        except OSError as error:
            raise logic.refusal(error, self.path) from None

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except OSError as error:
            raise logic.refusal(error, self.path) from None

    def _forget(self, name: str | bytes) -> None:
        path = self._path(name)
        try:
            os.unlink(path)
        except OSError as error:
            raise logic.refusal(error, path) from None

    def _leave(self, forget: bool) -> None:
        if forget:
            for name in self._names():
                with contextlib.suppress(NotGranted):
                    self._forget(name)
        try:
            os.rmdir(self.path)
        except OSError as error:
            raise logic.refusal(error, self.path) from None
