"""Mounts of its own for a process and those that it starts: runs beside each other share none."""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import Final

from dlmfs.store import highwater

CLONE_NEWNS: Final = 0x20000


def own_mounts() -> None:
    """From now on: no mount, socket or state of others, nor they ours. Needs root. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    os.makedirs(highwater.ROOT, mode=0o700, exist_ok=True)
    for folder in ("/run", "/dev/shm", highwater.ROOT):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder], check=True)
    os.chmod("/run", 0o755)
    os.chmod(highwater.ROOT, 0o700)
