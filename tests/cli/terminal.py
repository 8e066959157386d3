"""A program in a terminal of its own, and enough of a vt100 to know what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from typing import Self

from tests.fs.nodes import PATIENCE_S

CONTROL = re.compile(rb"\x1b\[([?0-9;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>78DMEHc]|[\x00-\x1f]")


class Terminal:
    """`TERM=vt100`, whose sequences are few. Use as a context; everything is gone at its end."""

    def __init__(self, command: Sequence[str], rows: int = 24, columns: int = 100) -> None:
        self.rows, self.columns = rows, columns
        self.lines = [[" "] * columns for _ in range(rows)]
        self.x = self.y = 0
        self.region = (0, rows - 1)
        self.all = b""
        self._rest = b""
        self.master, self.slave = pty.openpty()
        self._size()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            env={**os.environ, "TERM": "vt100", "LC_ALL": "C.UTF-8", "LINES": "", "COLUMNS": ""},
            preexec_fn=self._own,
        )

    @staticmethod
    def _own() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def _size(self) -> None:
        size = struct.pack("HHHH", self.rows, self.columns, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)

    # -- what is shown --------------------------------------------------------------------------

    def pull(self, within_s: float) -> bool:
        if not select.select([self.master], [], [], within_s)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.all += data
        self._show(self._rest + data)
        return True

    def _show(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            match = CONTROL.match(data, at)
            if match is not None:
                self._act(match)
                at = match.end()
            elif data[at : at + 1] == b"\x1b" and len(data) - at < 16:
                break  # the rest is still to come
            else:
                end = at + 1
                while end < len(data) and data[end] & 0xC0 == 0x80:
                    end += 1
                if self.y < self.rows and self.x < self.columns:
                    self.lines[self.y][self.x] = data[at:end].decode("utf-8", "replace")
                self.x += 1
                at = end
        self._rest = data[at:]

    def _act(self, match: re.Match[bytes]) -> None:
        whole, letter = match[0], match[2]
        numbers = [int(n) for n in re.findall(rb"\d+", match[1] or b"")]
        first = numbers[0] if numbers else 0
        first_line, last_line = self.region
        if whole in (b"\n", b"\x1bD"):
            if self.y == last_line:
                self.lines.insert(last_line + 1, [" "] * self.columns)
                del self.lines[first_line]
            else:
                self.y = min(self.y + 1, self.rows - 1)
        elif whole == b"\x1bM":
            if self.y == first_line:
                self.lines.insert(first_line, [" "] * self.columns)
                del self.lines[last_line + 1]
            else:
                self.y = max(self.y - 1, 0)
        elif letter == b"r":
            self.region = (
                (numbers[0] - 1, numbers[1] - 1) if len(numbers) > 1 else (0, self.rows - 1)
            )
            self.x = self.y = 0
        elif whole == b"\r":
            self.x = 0
        elif whole == b"\b":
            self.x = max(0, self.x - 1)
        elif letter == b"H":
            self.y, self.x = ((numbers or [1, 1])[0] - 1, (numbers or [1, 1])[-1] - 1)
        elif letter in (b"A", b"B"):
            self.y += (first or 1) * (1 if letter == b"B" else -1)
        elif letter in (b"C", b"D"):
            self.x += (first or 1) * (1 if letter == b"C" else -1)
        elif letter == b"J":
            begin = 0 if first == 2 else self.y
            for y in range(begin, self.rows):
                for x in range(self.x if y == self.y and first == 0 else 0, self.columns):
                    self.lines[y][x] = " "
        elif letter == b"K":
            span = range(self.x, self.columns) if first == 0 else range(self.x + 1)
            for x in span:
                self.lines[self.y][x] = " "

    @property
    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines)

    def until(self, true: Callable[[str], bool], what: str = "") -> str:
        """Wait until the screen is as wanted; it."""
        deadline = time.monotonic() + PATIENCE_S
        while not true(self.text):
            left = deadline - time.monotonic()
            assert left > 0, f"{what or 'it never shows'}:\n{self.text}"
            self.pull(min(left, 0.2))
        return self.text

    # -- what is done -----------------------------------------------------------------------------

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.lines = [[" "] * columns for _ in range(rows)]
        self.region = (0, rows - 1)
        self._size()
        self.process.send_signal(signal.SIGWINCH)

    def ended(self) -> int:
        """Its exit code; the terminal must be as it was."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self.pull(0.05)
        while self.pull(0.0):
            pass
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is left in disorder"
        return self.process.returncode
