"""The last words of a daemon's log, kept in memory: for `dlmfs status`, wherever else the log goes.

In a container there may be no place for a log at all.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Final

KEPT_MAX: Final = 50
WORDS_MAX: Final = 500
"""Characters of one line that are kept."""


class Lately(logging.Handler):
    """Put on a logger; told to root and the user who mounted."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if len(text) > WORDS_MAX:
            text = text[: WORDS_MAX - 3] + "..."
        self._kept.append({"at": record.created, "level": record.levelname, "message": text})

    def told(self) -> list[dict[str, Any]]:
        """JSON-ready, the oldest first. `at`: seconds since 1970."""
        return list(self._kept)


def watch() -> Lately:
    """Begin to keep what is logged in this process; `forget` ends it."""
    made = Lately()
    logging.getLogger("dlmfs").addHandler(made)
    return made


def forget(made: Lately) -> None:
    logging.getLogger("dlmfs").removeHandler(made)
