"""A node's first session, and the wait for a store that is not there yet: at boot, after a power cut.

What waiting cannot mend ends it at once: a wrong option, a password or a certificate that is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from dlmfs.errors import NotTrusted, StoreRefuses, Unavailable

if TYPE_CHECKING:
    from dlmfs.engine.membership import Membership

log = logging.getLogger("dlmfs.node")

AGAIN_S: Final = 0.5
AGAIN_MAX_S: Final = 5.0


async def begin(
    member: Membership,
    start: Callable[[], Awaitable[None]],
    retry_s: float,
    *,
    later: bool,
    says: Callable[[str], None],
) -> None:
    """Begin a session by `start`, and again for `retry_s` while the store is away. `later`: then leave it
    to the membership, which goes on trying as after a fence. `says` is told once, in words, what is
    waited for. Raises what `start` does."""
    loop = asyncio.get_running_loop()
    until, again_s, told = loop.time() + retry_s, AGAIN_S, False
    while True:
        try:
            await start()
            return
        except Unavailable as error:
            left_s = until - loop.time()
            if isinstance(error, NotTrusted | StoreRefuses) or (left_s <= 0 and not later):
                raise
            if left_s <= 0:
                says(f"mounted without the store: {error}; no lock can be had before it is there")
                member.begin_later(error)
                return
            if not told:
                says(f"waiting for the store, up to {retry_s:g} s (-o retry=): {error}")
                told = True
            member.drop_attempt()
        await asyncio.sleep(min(again_s, left_s))
        again_s = min(2 * again_s, AGAIN_MAX_S)
