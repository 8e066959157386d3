"""What the tests of locks for threads share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from dlmfs.client import Lock, keeper
from tests.fs.nodes import PATIENCE_S


def free(path: Path) -> bool:
    """Whether it can be had at once, by a lock that is then dropped again."""
    lock = Lock(path)
    if not lock.try_acquire():
        return False
    lock.release()
    return True


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def begin(what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    return thread


def awaited() -> list[str]:
    """The keepers of ours that still wait for something."""
    return [k.name for k in list(keeper._keepers.values()) if not k.settled.is_set()]
