"""How much a mount takes on before it says no, so that no program exhausts the daemon.

Two kinds of bound: one for all, and a share of it for each user but root and the daemon's own. Each
refusal is told to the program that asked (docs/reference.md, "Limits") and nobody else notices.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from dlmfs.model import Limits

UNBOUNDED: Final = 1 << 62


class User:
    """What one user has in use, and may have."""

    __slots__ = (
        "domains",
        "holders",
        "locks",
        "max_domains",
        "max_holders",
        "max_lock_waiters",
        "max_locks",
        "max_waiters",
        "waiters",
        "waiting_at",
    )

    def __init__(self, limits: Limits, *, exempt: bool) -> None:
        self.domains = self.locks = self.holders = self.waiters = 0
        self.waiting_at: dict[int, int] = {}
        """How many of the waiters wait at one file, by its inode number."""

        def share(limit: int) -> int:
            return UNBOUNDED if exempt else max(1, limit * limits.user_share // 100)

        self.max_domains = share(limits.max_domains)
        self.max_locks = share(limits.max_locks)
        self.max_holders = share(limits.max_holders)
        self.max_waiters = share(limits.max_waiters)
        self.max_lock_waiters = limits.max_lock_waiters

    def may_wait_no_more(self, ino: int) -> bool:
        """Whether he has all the waiters that he may have, or may have at that file."""
        if self.waiters >= self.max_waiters:
            return True
        return self.waiting_at.get(ino, 0) >= self.max_lock_waiters

    def waits(self, ino: int) -> None:
        """One more waits at that file."""
        self.waiters += 1
        self.waiting_at[ino] = self.waiting_at.get(ino, 0) + 1

    def waits_no_more(self, ino: int) -> None:
        """One of those has it, or has given up."""
        self.waiters -= 1
        self.waiting_at[ino] -= 1
        if not self.waiting_at[ino]:
            del self.waiting_at[ino]


class Usage:
    """The sums, and every user that ever came. `own` is the daemon's user id; `owner_of`: whose an id is,
    when it comes for the first time (`subids`)."""

    def __init__(self, limits: Limits, own: int) -> None:
        self.limits = limits
        self.own = own
        self.owner_of: Callable[[int], int] = int
        self.users: dict[int, User] = {}
        self.domains = self.locks = 0

    def user(self, uid: int) -> User:
        """The account of a user, made when first asked for."""
        user = self.users.get(uid)
        if user is None:
            owner = self.owner_of(uid)
            user = self.users.get(owner) or User(self.limits, exempt=owner in (0, self.own))
            self.users[owner] = self.users[uid] = user
        return user

    def refuse_domain(self, uid: int) -> int:
        """0, or the errno for a mkdir: ENOSPC for all, EDQUOT for this user."""
        if self.domains >= self.limits.max_domains:
            return errno.ENOSPC
        user = self.user(uid)
        return errno.EDQUOT if user.domains >= user.max_domains else 0

    def refuse_lock(self, uid: int) -> int:
        """0, or the errno for making a lock's file: ENOSPC for all, EDQUOT for this user."""
        if self.locks >= self.limits.max_locks:
            return errno.ENOSPC
        user = self.user(uid)
        return errno.EDQUOT if user.locks >= user.max_locks else 0

    def count_domain(self, uid: int, change: int) -> None:
        self.domains += change
        self.user(uid).domains += change
        assert self.domains >= 0

    def count_lock(self, uid: int, change: int) -> None:
        self.locks += change
        self.user(uid).locks += change
        assert self.locks >= 0
