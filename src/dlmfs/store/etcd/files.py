"""The files of `ca=`, `cert=`, `key=` and `credentials=`, read again while a node runs.

Rules of this file
------------------
* They are read on a thread of their own: a network file system that stands still stops nobody else.
* What cannot be read or does not fit together (it may be half written) changes nothing: what was read
  before stays in use, the reason is told, and the files are looked at again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from dlmfs.errors import DlmfsError

if TYPE_CHECKING:
    from dlmfs.store.etcd.rpc import Access

log = logging.getLogger("dlmfs.etcd")

PATIENCE_S: Final = 2.0
"""How long somebody waits for a look at the files who can go on without."""


class Files:
    """`access` is what was read last. `read` reads it again, and raises DlmfsError; None: nothing is."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        access: Access,
        read: Callable[[], Access] | None = None,
    ) -> None:
        self.access = access
        self.trouble: str | None = None
        """Why the files as they are now are not in use."""
        self._loop = loop
        self._read = read
        self._looking: asyncio.Future[Access | Exception] | None = None

    async def look(self) -> None:
        """Have `access` as the files have it now, if that can be had."""
        if self._read is None:
            return
        if self._looking is None:
            self._looking = self._begin(self._read)
        looking = self._looking
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.shield(looking)
        except TimeoutError:
            self._note(
                "the files of ca=, cert=, key= and credentials= cannot be read: it takes too long"
            )

    def _begin(self, read: Callable[[], Access]) -> asyncio.Future[Access | Exception]:
        future: asyncio.Future[Access | Exception] = self._loop.create_future()
        future.add_done_callback(self._settle)

        def settle(result: Access | Exception) -> None:
            if not future.done():
                future.set_result(result)

        def run() -> None:
            result: Access | Exception
            try:
                result = read()
            except Exception as error:  # of whatever kind: whoever waits is told
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon has ended
                self._loop.call_soon_threadsafe(settle, result)

        threading.Thread(target=run, name="files", daemon=True).start()
        return future

    def _settle(self, future: asyncio.Future[Access | Exception]) -> None:
        self._looking = None
        if future.cancelled():
            return
        result = future.result()
        if isinstance(result, DlmfsError):
            self._note(f"{result}; what was read before stays in use")
        elif isinstance(result, Exception):
            self._note(f"the files cannot be read ({type(result).__name__})")
            raise result  # named by the loop
        else:
            self._note(None)
            if result != self.access:
                log.warning(
                    "certificates or credentials are others now: they are used from here on"
                )
                self.access = result

    def _note(self, trouble: str | None) -> None:
        if trouble is not None and trouble != self.trouble:
            log.warning("%s", trouble)
        self.trouble = trouble
