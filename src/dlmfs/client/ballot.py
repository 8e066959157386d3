"""An election's two locks and what stands in them: the same for threads and asyncio.

Rules of this file
------------------
* Whoever has the lock PATH exclusively leads. Nothing else counts.
* Its value cannot be read meanwhile, so the leader's name stands in another lock, PATH.leader, with the
  token of the leadership. It is only replaced by a larger one: one that was paused between its election
  and its word, and is none any more, does not overwrite its successor's.
"""

from __future__ import annotations

import os
from typing import Generic, TypeVar

from dlmfs.client import base
from dlmfs.client.place import AnyPath
from dlmfs.client.tokens import TOKEN_DIGITS
from dlmfs.errors import UsageError
from dlmfs.model import LVB_SIZE

NAME_MAX = LVB_SIZE - TOKEN_DIGITS - 1
"""Bytes of a candidate's name."""


L = TypeVar("L", bound=base.BaseLock)


class Ballot(Generic[L]):
    """What a candidate says of itself, and whether it leads.

    `lock` is the lock that makes it the leader: its `lost`, `wanted` and `wait_lost` are of use.
    """

    _kind: type[L]

    def __init__(
        self,
        path: AnyPath,
        name: str = "",
        *,
        timeout: float | None = None,
        mount: AnyPath | None = None,
    ) -> None:
        """Nothing is opened yet.

        `path`, `timeout`, `mount`: as of a Lock; PATH.leader is a lock, too. `name`: this candidate's,
        43 bytes at most, for `leader`; HOST:PID unless given.

        Raises UsageError for what is no lock's path, and for a name that is too long.
        """
        self.path = os.fsdecode(path)
        self.name = name or f"{os.uname().nodename}"[: NAME_MAX - 8] + f":{os.getpid()}"
        self.lock = self._kind(path, timeout=timeout, mount=mount)
        self._mount = mount
        if len(os.fsencode(self.name)) > NAME_MAX or "\0" in self.name:
            raise UsageError(
                f"a candidate's name has up to {NAME_MAX} bytes, and no zero: {self.name!r}"
            )

    @property
    def _word(self) -> str:
        """The lock in which the leader's name stands."""
        return f"{self.path}.leader"

    def _says(self, token: int) -> bytes:
        return b"%0*d %s" % (TOKEN_DIGITS, token, os.fsencode(self.name))

    @property
    def held(self) -> bool:
        """Whether this object leads."""
        return self.lock.held

    @property
    def token(self) -> int:
        """The fencing token of this leadership: larger than that of every earlier one."""
        return self.lock.token

    def check(self) -> None:
        """Raises LockLost if the leadership was lost, UsageError if there was none."""
        self.lock.check()

    def resign(self) -> None:
        """Lead no longer. Raises UsageError if not elected; nothing if the leadership was lost."""
        self.lock.release()


def said(value: bytes) -> tuple[int, str]:
    """The token and name of the last leader; 0 and nothing if there was none."""
    token, _, name = value.partition(b" ")
    return (int(token), os.fsdecode(name)) if token.isdigit() else (0, "")
