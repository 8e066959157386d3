"""What the service manager that started a daemon is told: sd_notify(3), without its library.

Rules of this file
------------------
* The environment is inherited by whatever a service starts. So only the process that the manager
  itself started speaks: a mount that some program of a service makes must not speak in that service's
  name. That process is the daemon. One that it forks could be told of (MAINPID=), but while its parent
  lives systemd takes it for another's child, and kills it where it should stop it.
* Nothing waits for the manager, and nothing fails for want of one.
* The watchdog is fed by turns of the event loop, whatever the lease: a daemon that is fenced while its
  store is away comes back by itself, and to end it would only make that later.
"""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from typing import Final

from dlmfs.timing import Scheduler, Timer

TURN_S: Final = 1.0
"""How often is looked whether there is something new to tell."""


class Manager:
    """The way to it. `watchdog_s`: within which it wants to hear of this daemon again; 0: it does not."""

    def __init__(self, address: str, watchdog_s: float = 0.0) -> None:
        """`address`: of its socket, a path, or with "@" a name that is none (unix(7), abstract)."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s

    @classmethod
    def of_environment(cls, *, foreground: bool) -> Manager | None:
        """That which started this very process, if it wants to hear of it. What this process starts
        does not find it any more. `foreground`: it was told to stay there, which means something to
        managers that do not name the process (containers)."""
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        address, interval, watched = (os.environ.pop(name, "") for name in names)
        own = str(os.getpid())
        if not address.startswith(("/", "@")):
            return None
        if os.environ.get("SYSTEMD_EXEC_PID", own if foreground else "") != own:
            return None
        is_watched = watched in ("", own) and interval.isascii() and interval.isdigit()
        return cls(address, int(interval) / 1e6 if is_watched else 0.0)

    def tell(self, *words: str) -> bool:
        """Send words of sd_notify(3) at once, such as "READY=1". False if they were not taken."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(map(_line, words)).encode(), self._address)
        except OSError:
            return False
        return True


def _line(word: str) -> str:
    """What a store has said may stand in it: it must not become a word of its own."""
    return "".join(letter if letter.isprintable() else " " for letter in word)


class Reports:
    """What a manager hears of one daemon."""

    def __init__(self, manager: Manager, loop: Scheduler, says: Callable[[], str]) -> None:
        """`says`: how things are now, in one line."""
        self._manager = manager
        self._loop = loop
        self._says = says
        self._told = ""
        self._fed = loop.time()
        self._turns: Timer | None = None

    def begin(self) -> None:
        """The mount answers; from now on all changes are told, and the watchdog is fed."""
        if self._manager.watchdog_s:
            faulthandler.enable()  # where it stands still, if the watchdog ends it
        self._tell(["READY=1"])
        self._turn()

    def ends(self) -> None:
        """The daemon has begun to end; the watchdog is fed until `close`."""
        self._manager.tell("STOPPING=1")

    def close(self) -> None:
        if self._turns is not None:
            self._turns.cancel()

    def _turn(self) -> None:
        feeds_every_s = self._manager.watchdog_s / 4
        delay_s = min(TURN_S, feeds_every_s) if feeds_every_s else TURN_S
        self._turns = self._loop.call_later(delay_s, self._turn)
        words = []
        if feeds_every_s and self._loop.time() - self._fed >= feeds_every_s:
            self._fed = self._loop.time()
            words.append("WATCHDOG=1")
        self._tell(words)

    def _tell(self, words: list[str]) -> None:
        """These words, and how things are if that has changed."""
        says = self._says()
        if says != self._told:
            words.append(f"STATUS={says}")
        if words and self._manager.tell(*words):
            self._told = says
