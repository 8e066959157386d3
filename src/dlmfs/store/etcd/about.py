"""What the server tells of itself: its version, the size of its database, the cluster's members.

Nothing stands or falls by it: newer servers tell some of it to administrators only, proxies tell it of
themselves or not at all. Whoever gets no answer goes on without.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final

from dlmfs.errors import DlmfsError, NotPermitted
from dlmfs.store.etcd import etcd_pb2 as pb
from dlmfs.store.etcd.rpc import MEMBER_LIST, STATUS, Rpc

if TYPE_CHECKING:
    from dlmfs.timing import Clock

log = logging.getLogger("dlmfs.etcd")

SOUND: Final = ((3, 4, 38), (3, 5, 23), (3, 6, 5))
"""The first of each line where a renewal cannot succeed on a revoked lease (etcd PR 20590) and a stuck
old leader cannot revoke live ones (issue 15247); see etcd-notes 5."""
UNKNOWN: Final = "unknown"
LOOK_EVERY_S: Final = 10.0
PATIENCE_S: Final = 2.0


def unsound(version: str) -> str | None:
    """What to say of a server version whose lease bugs are not mended; None if they are, or nobody
    knows."""
    if version == UNKNOWN:
        return None
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    line = next((sound for sound in SOUND if sound[:2] == numbers[:2]), None)
    if numbers >= SOUND[-1] or (line is not None and numbers >= line):
        return None
    want = ".".join(map(str, line or SOUND[-1]))
    return (
        f"etcd {version} may renew a lease that it has revoked (mended in {want}): "
        "rely on tokens, or upgrade it"
    )


class About:
    """What is known of the server by now."""

    def __init__(self, rpc: Rpc, clock: Clock) -> None:
        self.version = UNKNOWN
        self.size_mb = 0.0
        """The whole database, ours and others'; 0 if it is unknown."""
        self._rpc = rpc
        self._clock = clock
        self._untold = False
        self._looked = -LOOK_EVERY_S
        self._generation = -1
        """The connection on which `look` was last."""
        self._looking = False

    def is_due(self) -> bool:
        """Whether it is time for another look: the last one is old, or was on another connection."""
        old = self._clock() - self._looked >= LOOK_EVERY_S
        return not self._looking and (old or self._generation != self._rpc.generation)

    async def look(self) -> None:
        """Ask for all of it, and look at the mount's files: whoever renews them wants to know soon if
        they are no good. Raises nothing that is expected."""
        self._looked, self._generation, self._looking = self._clock(), self._rpc.generation, True
        try:
            await self._ask_members()
            await self._ask_status()
            await self._rpc.files.look()
        finally:
            self._looking = False

    async def _ask_members(self) -> None:
        try:
            told = await self._rpc.inquire(MEMBER_LIST, pb.MemberListRequest(), PATIENCE_S)
        except DlmfsError as error:
            log.info("the cluster's members are not known: %s", error)
            return
        members = self._rpc.members
        if members.learn(told.header.cluster_id, told.members):
            log.info("further members of the etcd cluster: %s", " ".join(members.found) or "none")

    async def _ask_status(self) -> None:
        """Version and size, if this user may know them."""
        try:
            status = await self._rpc.inquire(STATUS, pb.StatusRequest(), PATIENCE_S)
        except NotPermitted:
            self._not_told()
            return
        except DlmfsError:
            return
        self._untold = False
        self.size_mb = status.db_size / 1e6
        if self.version != status.version:
            self.version = status.version
            if warning := unsound(status.version):
                log.warning("%s", warning)

    def _not_told(self) -> None:
        """Servers may have been replaced by newer ones: what was known of them is known no more."""
        self.version, self.size_mb = UNKNOWN, 0.0
        if not self._untold:
            self._untold = True
            mended = ", ".join(".".join(map(str, version)) for version in SOUND)
            log.warning(
                "etcd tells its version and size to administrators only, and not to this user: see to it "
                "that it is one without known lease bugs (%s or later)",
                mended,
            )
