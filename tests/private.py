"""Mounts of its own for a process and those that it starts: runs beside each other share none."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from typing import Final

CLONE_NEWNS: Final = 0x20000
MARK: Final = "/var/lib/dlmfs"
"""Where root's high-water mark of the tokens is (`dlmfs.store.highwater`)."""


def own_mounts() -> None:
    """From now on: no mount, socket or state of others, nor they ours. Needs root. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    os.makedirs(MARK, mode=0o700, exist_ok=True)
    own = tempfile.mkdtemp(prefix="dlmfs-mark-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    subprocess.run(["mount", "--bind", own, MARK], check=True)
    for folder in ("/run", "/dev/shm"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder], check=True)
    os.chmod("/run", 0o755)
