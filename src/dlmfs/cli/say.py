"""The one place where the commands print: whatever is said is made harmless here.

Names of locks, nodes and mount points, and all that a daemon or a store tells, are other people's
words: an escape sequence in them must not reach the terminal, and a newline makes no second line. Nobody
else in this package prints (a test looks).
"""

from __future__ import annotations

import os
import select
import sys
from typing import Final

from dlmfs.cli.text import harmless


def say(*lines: str, flush: bool = False) -> None:
    """Print lines; what is in one of them stays in it."""
    if sys.stdout is not None:
        sys.stdout.write("".join(f"{harmless(line)}\n" for line in lines))
        if flush:
            sys.stdout.flush()


def say_json(value: object, *, flush: bool = False) -> None:
    """Print one line for programs. JSON escapes what is not plain by itself."""
    import json  # here: `dlmfs lock` is to start fast

    if sys.stdout is not None:
        sys.stdout.write(json.dumps(value, ensure_ascii=True) + "\n")
        if flush:
            sys.stdout.flush()


def say_bytes(value: bytes) -> None:
    """Print a lock's value: as it is, so that a script gets what was written; on a terminal harmless."""
    if sys.stdout.isatty():
        say(value.decode("utf-8", "surrogateescape"), flush=True)
        return
    sys.stdout.buffer.write(value + b"\n")
    sys.stdout.buffer.flush()


def complain(what: str) -> None:
    """One line on standard error."""
    remark(f"dlmfs: {what}")


def remark(line: str) -> None:
    """The same, without our name before it."""
    if sys.stderr is not None:
        sys.stderr.write(harmless(line) + "\n")
        sys.stderr.flush()


PIECE_MAX: Final = 4096
"""PIPE_BUF: what a pipe takes whole, if it takes anything."""


def say_log(text: bytes) -> None:
    """Records of the log on standard error, which `loglines` has made harmless. Not waited for: raises
    BlockingIOError where there is no room."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    left = text + b"\n"
    while left:
        if not poll.poll(0):
            raise BlockingIOError
        left = left[os.write(2, left[:PIECE_MAX]) :]


def progress(line: str, *, last: bool) -> None:
    """A line on a terminal that the next one overwrites."""
    sys.stderr.write(f"\r{harmless(line)} " + "\n" * last)
    sys.stderr.flush()


def tell_trace() -> None:
    """The exception under way, for who asked for it."""
    import traceback

    for line in traceback.format_exc().splitlines():
        remark(line)
