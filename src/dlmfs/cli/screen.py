"""The live screen of `dlmfs top`: a table that is sorted, filtered and looked into by keys.

Rules of this file
------------------
* The terminal is given back as it was at every end: by key, signal, error or the terminal's own.
* Nothing that asks a daemon runs in the screen's thread: a stopped one must not stop the keys.
"""

from __future__ import annotations

import contextlib
import curses
import locale
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from dlmfs.cli import top, why
from dlmfs.cli.text import harmless, plain
from dlmfs.cli.top import HEADER, NARROW_HEADER, View, heading, line
from dlmfs.errors import DlmfsError, UsageError

TICK_MS: Final = 100
DELAY_MIN_S, DELAY_MAX_S = 0.1, 60.0
NARROW: Final = 60
"""Columns; with fewer the table leaves numbers out."""
ESCAPE: Final = 27
SORT_KEYS: Final = {"w": "waiters", "l": "longest", "g": "grants", "n": "name"}
HELP: Final = """\
w l g n   sort by waiters, longest wait, grants per second, name
r         the other way round
/         only locks with some text in their name; Enter ends it, Esc clears it
a         idle locks too, or not
up down   choose a lock (also j k, PgUp PgDn, Home End)
Enter     why it is not free: who blocks whom
space     stop and go on
+ -       look less, or more often
Ctrl-L    draw anew
q         end"""

Facts = dict[str, Any]


class _Looker(threading.Thread):
    """Samples in a thread of its own; `seen` is the last one."""

    def __init__(self, mountpoint: str | None, view: View, delay_s: float) -> None:
        super().__init__(name="looker", daemon=True)
        self.mountpoint = mountpoint
        self.view = view
        self.delay_s = delay_s
        self.paused = False
        self.seen: Facts | None = None
        self.count = 0
        self.error: BaseException | None = None
        self._soon = threading.Event()

    def run(self) -> None:
        try:
            while True:
                if not self.paused:
                    self.seen = top.sample(self.mountpoint, self.view)
                    self.count += 1
                self._soon.wait(self.delay_s)
                self._soon.clear()
        except BaseException as error:
            self.error = error

    def at_once(self) -> None:
        self._soon.set()


class _Page:
    """Text over the table: help, or the story of a lock, which comes in its time."""

    def __init__(self, title: str, lines: list[str]) -> None:
        self.title = title
        self.lines = lines
        self.first = 0


class Screen:
    """One run of it. `window` is curses' whole screen."""

    def __init__(
        self, window: curses.window, mountpoint: str | None, view: View, delay_s: float
    ) -> None:
        self.window = window
        self.view = view
        self.looker = _Looker(mountpoint, view, delay_s)
        self.chosen = 0
        self.first = 0
        self.typing: str | None = None
        self.page: _Page | None = None
        self.rows: list[Facts] = []

    def run(self, count: int | None) -> int:
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        self.window.timeout(TICK_MS)
        self.window.keypad(True)
        self.looker.start()
        while count is None or self.looker.count < count:
            if self.looker.error is not None:
                raise self.looker.error
            self._draw()
            key = self.window.getch()
            if key == curses.ERR:
                if not _terminal_is_there():
                    return 0
            elif not self._key(key):
                return 0
        return 0

    # -- keys -----------------------------------------------------------------------------------

    def _key(self, key: int) -> bool:
        """Act on a key; False: the end."""
        if key == curses.KEY_RESIZE:
            self.window.clear()
        elif key == ord("\f"):
            self.window.redrawwin()
            self.window.clear()
        elif self.typing is not None:
            self._type(key)
        elif self.page is not None:
            self._turn(key)
        elif key in (ord("q"), ord("Q")):
            return False
        else:
            self._command(key)
        return True

    def _command(self, key: int) -> None:
        name = chr(key) if 0 <= key < 256 else ""
        height = max(1, self._room())
        moves = {
            curses.KEY_UP: -1, ord("k"): -1, curses.KEY_DOWN: 1, ord("j"): 1,
            curses.KEY_PPAGE: -height, curses.KEY_NPAGE: height,
            curses.KEY_HOME: -len(self.rows), curses.KEY_END: len(self.rows),
        }  # fmt: skip
        if name in SORT_KEYS and name:
            self.view.sort = SORT_KEYS[name]
        elif name == "r":
            self.view.reverse = not self.view.reverse
        elif name == "a":
            self.view.idle = not self.view.idle
            self.looker.at_once()
        elif name == "/":
            self.typing = self.view.wanted
        elif key == ESCAPE:
            self.view.wanted = ""
            self.looker.at_once()
        elif name == " ":
            self.looker.paused = not self.looker.paused
        elif name in ("+", "-"):
            factor = 2.0 if name == "+" else 0.5
            self.looker.delay_s = min(max(self.looker.delay_s * factor, DELAY_MIN_S), DELAY_MAX_S)
        elif name in ("?", "h"):
            self.page = _Page("keys", HELP.split("\n"))
        elif key in moves:
            self.chosen += moves[key]
        elif name in ("\n", "\r") or key == curses.KEY_ENTER:
            self._ask_why()

    def _type(self, key: int) -> None:
        assert self.typing is not None
        if key in (ord("\n"), ord("\r"), curses.KEY_ENTER):
            self.typing = None
        elif key == ESCAPE:
            self.typing, self.view.wanted = None, ""
        elif key in (curses.KEY_BACKSPACE, 127, 8):
            self.typing = self.view.wanted = self.typing[:-1]
        elif 32 <= key < 127:
            self.typing = self.view.wanted = self.typing + chr(key)
        self.chosen = 0
        self.looker.at_once()

    def _turn(self, key: int) -> None:
        assert self.page is not None
        page = self.page
        if key in (curses.KEY_DOWN, ord("j"), curses.KEY_NPAGE, ord(" ")):
            step = 1 if key in (curses.KEY_DOWN, ord("j")) else max(1, self._height() - 3)
            page.first = min(page.first + step, max(0, len(self._wrapped(page)) - 1))
        elif key in (curses.KEY_UP, ord("k"), curses.KEY_PPAGE):
            step = 1 if key in (curses.KEY_UP, ord("k")) else max(1, self._height() - 3)
            page.first = max(0, page.first - step)
        else:
            self.page = None

    def _ask_why(self) -> None:
        if not self.rows:
            return
        row = self.rows[self.chosen]
        page = self.page = _Page(f"why {plain(row['name'])}", ["asking ..."])

        def ask() -> None:
            try:
                places, _ = top.entries(row["mountpoint"])
                page.lines = why.story(why.look(places[-1], row["domain"], row["lock"]))
            except (DlmfsError, IndexError) as error:
                page.lines = [str(error) or "its mount is gone"]

        threading.Thread(target=ask, daemon=True).start()

    # -- drawing ----------------------------------------------------------------------------------

    def _height(self) -> int:
        return int(self.window.getmaxyx()[0])

    def _room(self) -> int:
        """Lines for locks."""
        seen = self.looker.seen
        above = len(heading(seen, self.view)) if seen is not None else 1
        return self._height() - above - 2

    def _put(self, y: int, text: str, attribute: int = curses.A_NORMAL) -> None:
        height, width = self.window.getmaxyx()
        text = harmless(text)
        if 0 <= y < height and width > 1:
            with contextlib.suppress(curses.error):  # a terminal may shrink at any moment
                self.window.addnstr(y, 0, text.ljust(width - 1), width - 1, attribute)

    def _draw(self) -> None:
        self.window.erase()
        if self.page is not None:
            self._draw_page(self.page)
        else:
            self._draw_table()
        self.window.refresh()

    def _draw_page(self, page: _Page) -> None:
        height = self._height()
        self._put(0, page.title, curses.A_BOLD)
        for y, text in enumerate(self._wrapped(page)[page.first :][: max(0, height - 2)], 1):
            self._put(y, text)
        self._put(height - 1, "up down: scroll   any other key: back", curses.A_DIM)

    def _wrapped(self, page: _Page) -> list[str]:
        """A page's lines as this width shows them whole."""
        width = max(20, int(self.window.getmaxyx()[1]) - 1)
        shown: list[str] = []
        for text in page.lines:
            further = " " * (len(text) - len(text.lstrip()) + 4)
            shown += textwrap.wrap(text, width, subsequent_indent=further) or [""]
        return shown

    def _draw_table(self) -> None:
        seen = self.looker.seen
        if seen is None:
            self._put(0, "looking ...")
            return
        # Again: the order, or the filter, may have been changed since the look.
        wanted = self.view.wanted.casefold()
        fitting = [row for row in seen["locks"] if wanted in row["name"].casefold()]
        self.rows = self.view.ordered(fitting)
        self.chosen = max(0, min(self.chosen, len(self.rows) - 1))
        lines = heading(seen, self.view)
        for y, text in enumerate(lines):
            self._put(y, text, curses.A_BOLD if y else curses.A_NORMAL)
        narrow = int(self.window.getmaxyx()[1]) < NARROW
        self._put(len(lines), NARROW_HEADER if narrow else HEADER, curses.A_REVERSE)
        room = max(1, self._room())
        self.first = max(min(self.first, self.chosen), self.chosen - room + 1)
        for y, row in enumerate(self.rows[self.first : self.first + room], len(lines) + 1):
            here = y - len(lines) - 1 + self.first == self.chosen
            self._put(y, line(row, narrow=narrow), curses.A_BOLD if here else curses.A_NORMAL)
        self._put(self._height() - 1, self._foot(), curses.A_DIM)

    def _foot(self) -> str:
        if self.typing is not None:
            return f"/{self.typing}_   (Enter: done, Esc: all)"
        state = (
            "stopped, space goes on" if self.looker.paused else f"each {self.looker.delay_s:g} s"
        )
        return f"{time.strftime('%H:%M:%S')}  {state}   q end  ? keys  Enter why  / filter"


def _terminal_is_there() -> bool:
    try:
        os.tcgetpgrp(0)
    except OSError:
        return False
    return True


def _ended(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def show(mountpoint: str | None, view: View, delay_s: float, count: int | None) -> int:
    """The live screen until its end. Raises UsageError for a terminal that cannot show it."""
    locale.setlocale(locale.LC_ALL, "")
    term = os.environ.get("TERM", "")
    try:
        curses.setupterm()
        enough = bool(curses.tigetstr("cup"))
    except curses.error:
        enough = False
    if not enough:
        raise UsageError(f"TERM={term or '(not set)'} cannot show a live table: use `dlmfs top -b`")
    os.environ.setdefault("ESCDELAY", "25")
    before: dict[int, Any] = {}
    run: Callable[[curses.window], int] = lambda window: Screen(  # noqa: E731
        window, mountpoint, view, delay_s
    ).run(count)
    try:
        for one in (signal.SIGTERM, signal.SIGHUP):
            before[one] = signal.signal(one, _ended)
        return curses.wrapper(run)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
