"""How a record of the log is written, wherever it goes: harmless, as what `say` prints."""

from __future__ import annotations

import json
import logging
import time
from types import TracebackType
from typing import Any, Final

from dlmfs.cli.text import harmless

ALONE: Final = "dlmfs[%(process)d]: %(levelname)s: %(message)s"
"""On standard error and in a file."""
MARKED: Final = "%(message)s"
"""Where program, process and level are told beside the words (syslog, the journal)."""

LINE_MAX: Final = 16_000
WORDS_MAX: Final = 500

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LogFormatter(logging.Formatter):
    """One record, one line; a traceback's lines are set in, so that none passes for a record."""

    def __init__(self, form: str = ALONE) -> None:
        super().__init__(form)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return harmless(super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {harmless(line)}" for line in lines)


class FileFormatter(LogFormatter):
    """The same with the time before it, for where nobody else notes that: ISO 8601, UTC."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return f"{_time(record)} {super().formatMessage(record)}"


class JsonFormatter(LogFormatter):
    """One JSON object a line, ASCII only. `mountpoint` is in each."""

    def __init__(self, mountpoint: str) -> None:
        super().__init__()
        self._mountpoint = harmless(mountpoint)

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "mountpoint": self._mountpoint,
            "message": harmless(record.getMessage()),
        }
        rows = getattr(record, "locks", None)
        if rows is not None:
            told["locks"] = [
                {key: harmless(v) if isinstance(v, str) else v for key, v in row.items()}
                for row in rows
            ]
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        line = json.dumps(told)
        if len(line) > LINE_MAX:  # cut anywhere else it would be none
            told.pop("locks", None)
            told["message"] = told["message"][:WORDS_MAX]
            line = json.dumps(told)
        return line


def _time(record: logging.LogRecord) -> str:
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{second}.{int(record.msecs):03}Z"
