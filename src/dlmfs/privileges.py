"""What root's daemon keeps of root's power: a few capabilities (capabilities(7)), and no way to more.

A daemon of an ordinary user has none to give up, and is left as it is: it needs fusermount3, which is
set-user-ID, to unmount. docs/security.md has the list for people, with a test for each.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Final

from dlmfs import proc

log = logging.getLogger("dlmfs.node")

DAC_READ_SEARCH: Final = 2
KILL: Final = 5
SYS_PTRACE: Final = 19
SYS_ADMIN: Final = 21
"""From <linux/capability.h>."""

DAEMON: Final = frozenset(
    {
        SYS_ADMIN,  # mount(2) and umount2(2)
        SYS_PTRACE,  # whether another user's process has a lock's file open (engine rule 11) ...
        DAC_READ_SEARCH,  # ... in a folder of /proc that is his; mount points in folders of his
    }
)
WATCHDOG: Final = frozenset(
    {
        KILL,  # the holders' processes are anybody's
        SYS_PTRACE,  # where /proc hides them (hidepid=)
    }
)

_VERSION: Final = 0x20080522
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_LAST_CAP: Final = 63


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def confine(keep: frozenset[int]) -> None:
    """Give up every capability but these, as far as they are there, and every way to get one back: a
    program that is started has none. For this thread and those that it starts, so: before there are
    others. What the kernel refuses (a sandbox may) is logged; the daemon works with more, too.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    refused = []
    # The bounding set first: that takes CAP_SETPCAP, which is given up next. A container may lack it;
    # no_new_privs says the same to execve(2).
    last = proc.number(proc.read("sys", "kernel", "cap_last_cap"))
    for capability in range((_LAST_CAP if last is None else last) + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        refused.append(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    if not _reduce(libc, keep):
        refused.append(f"capset: {os.strerror(ctypes.get_errno())}")
    if refused:
        log.warning("this process keeps more privileges than it needs (%s)", ", ".join(refused))


def _reduce(libc: ctypes.CDLL, keep: frozenset[int]) -> bool:
    """Permitted and effective: those of them that are there; inheritable: none."""
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        return False
    for word, each in enumerate(sets):
        each.permitted &= sum(1 << (c - 32 * word) for c in keep if c // 32 == word)
        each.effective = each.permitted
        each.inheritable = 0
    return not libc.capset(ctypes.byref(header), sets)
