"""Every error dlmfs reports, as one table: exception, errno seen by programs, exit code.

    DlmfsError                       errno        mount(8)   other commands
    ├── UsageError                   EINVAL       1          2      the caller asked for something wrong
    │   └── NotPermitted             EPERM        1          77     ... or is not allowed to
    ├── NodeNameInUse                EEXIST       32         69     another live node has this name
    ├── MountFailed                  ENODEV       32         69     the kernel or fusermount3 said no
    ├── Unavailable                  ENOLCK       32         69     the store cannot be reached now
    │   ├── DaemonDead               ENOTCONN     32         69     the daemon of a mount is no more
    │   ├── NoAnswer                 ENOLCK       32         69     ... or says nothing
    │   ├── Unseen                   ENOLCK       32         69     ... or cannot be asked from here
    │   ├── StoreFull                ENOSPC       32         69     nothing was written
    │   ├── StoreRefuses             ENOLCK       32         69     ... for want of the right to
    │   └── OutcomeUnknown           ENOLCK       32         69     it may or may not have happened
    │       └── NotTrusted           ENOLCK       32         69     ... for a certificate's sake
    ├── BadState                     EIO          32         78     state file corrupt, foreign, misplaced
    ├── NotGranted                   ETXTBSY      32         1      a trylock met a user of the lock
    │   ├── TimedOut                 ETIMEDOUT    32         1      ... or the wait was as long as allowed
    │   ├── Cancelled                ECANCELED    32         1      ... or was ended by the program itself
    │   └── Deadlock                 EDEADLK      32         1      ... or would never have ended
    ├── LockLost                     EIO          32         75     the lease or the state is gone
    │   ├── StoreRestored            EIO          32         75     the store went back in time
    │   └── StaleToken               ESTALE       32         75     a later holder has been here already
    ├── OutputFailed                 EIO          32         74     standard output takes no more
    └── Bug                          EIO          4          70     a broken invariant of ours

A message says what is wrong, where, and what to do, in one line. Whose fault it is shows in
the class: UsageError is the caller's, Unavailable may pass, LockLost means stop the work.
"""

from __future__ import annotations

import errno
from typing import Any


class DlmfsError(Exception):
    """Base of all; never raised itself. `errno` is what a system call on the mount answers."""

    errno: int = errno.EIO
    mount_exit: int = 32
    exit: int = 69


class UsageError(DlmfsError):
    errno, mount_exit, exit = errno.EINVAL, 1, 2


class NotPermitted(UsageError):
    errno, mount_exit, exit = errno.EPERM, 1, 77


class NodeNameInUse(DlmfsError):
    errno, mount_exit, exit = errno.EEXIST, 32, 69


class MountFailed(DlmfsError):
    errno, mount_exit, exit = errno.ENODEV, 32, 69


class Unavailable(DlmfsError):
    errno, mount_exit, exit = errno.ENOLCK, 32, 69


class DaemonDead(Unavailable):
    """The kernel says so of the mount: nothing else is a proof."""

    errno = errno.ENOTCONN


class NoAnswer(Unavailable):
    """The daemon of a mount is there, and does not answer: stopped, hung or overrun."""


class Unseen(Unavailable):
    """The daemon's control socket is not to be seen here: that says nothing about the daemon. `told`:
    what it says of itself by way of the mount, if anything (docs/reference.md, "Extended attributes")."""

    told: dict[str, Any] | None = None


class StoreFull(Unavailable):
    """The store refused a write for want of space. Definite: nothing of it was applied."""

    errno = errno.ENOSPC


class StoreRefuses(Unavailable):
    """The store does not let this node write, or read, there. Definite: nothing was applied."""


class OutcomeUnknown(Unavailable):
    """A transaction was sent and no answer came: it may have been applied, or may be later."""


class NotTrusted(OutcomeUnknown):
    """The store does not believe our certificate, or we do not believe its: waiting mends neither."""


class BadState(DlmfsError):
    errno, mount_exit, exit = errno.EIO, 32, 78


class LockLost(DlmfsError):
    """This incarnation is over: lease expired, membership removed, or state deleted."""

    errno, mount_exit, exit = errno.EIO, 32, 75


class StoreRestored(LockLost):
    """The store went back to an earlier state, or is another one: what it granted since may be granted
    anew. Another incarnation may begin once all of those of before are over."""


class StaleToken(LockLost):
    """A resource has seen a larger token: the lock has been granted to somebody else since."""

    errno = errno.ESTALE


class NotGranted(DlmfsError):
    """The lock was not granted: somebody uses it, and the caller would not wait, or not longer."""

    errno, mount_exit, exit = errno.ETXTBSY, 32, 1


class TimedOut(NotGranted, TimeoutError):
    """The wait was as long as allowed. A TimeoutError, too, as programs expect of a time-out."""

    errno = errno.ETIMEDOUT


class Cancelled(NotGranted):
    errno = errno.ECANCELED


class Deadlock(NotGranted):
    """Two processes hold the lock shared and both want it exclusively: this one came later."""

    errno = errno.EDEADLK


class OutputFailed(DlmfsError):
    errno, mount_exit, exit = errno.EIO, 32, 74


class Bug(DlmfsError):
    errno, mount_exit, exit = errno.EIO, 4, 70
