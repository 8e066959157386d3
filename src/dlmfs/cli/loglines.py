"""How a record of the log is written, wherever it goes: harmless, as what `say` prints."""

from __future__ import annotations

import logging
from types import TracebackType

from dlmfs.cli.text import harmless

FORMAT = "dlmfs[%(process)d]: %(levelname)s: %(message)s"

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LogFormatter(logging.Formatter):
    """One record, one line; a traceback's lines are set in, so that none passes for a record."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return harmless(super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {harmless(line)}" for line in lines)
