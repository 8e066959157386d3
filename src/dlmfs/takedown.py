"""The end of a daemon's process, when its node's life is over and nothing is at stake any more.

What still runs then (a thread of a library, a task, an asker's connection) may not keep the process:
umount waits for its end, and who mounts anew for its name.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Final

log = logging.getLogger("dlmfs.node")

WITHIN_S: Final = 15.0
"""Closing a state file on a slow disk takes a while; umount(8) waits for 30 s."""


def begin(within_s: float = WITHIN_S) -> None:
    """From now on the process has so many seconds; what kept it is logged."""
    timer = threading.Timer(within_s, _give_up, (within_s,))
    timer.name, timer.daemon = "takedown", True
    timer.start()


def _give_up(within_s: float) -> None:
    log.error("taken down after %g s, in which these went on: %s", within_s, _threads())
    os._exit(0)


def _threads() -> str:
    """Each thread, and where it is."""
    frames = sys._current_frames()  # noqa: SLF001 - there is no other way
    places = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is not None and thread is not threading.current_thread():
            code = frame.f_code
            places.append(f"{thread.name} in {os.path.basename(code.co_filename)}:{code.co_name}")
    return ", ".join(places)
