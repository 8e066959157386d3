"""`dlmfs evict NODE [MOUNTPOINT]`: put a node out of the cluster."""

from __future__ import annotations

import threading
from typing import Final

from dlmfs.cli.choice import ask, choose
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import complain, say

HOW = {
    "left": "left",
    "expired": "did not answer: its lease ran out",
    "ended": "did not answer: its lease was ended",
    "killed": "was stopped: its daemon was killed",
}
PATIENCE_S = 3700.0
"""The longest lease time, and some."""


SOON_S: Final = 0.5


def _tell(node: str) -> None:
    complain(
        f"{node} is asked to leave: programs that hold locks there have its grace= to close them (2 s "
        "by default); if it does not answer, its lease must run out first"
    )


def run(args: list[str]) -> int:
    """Returns when the node is out: at once if it hears of it, else after its lease time."""
    parser = Parser(
        prog="dlmfs evict",
        description="Have NODE give its programs their time (grace=) and leave; if it does not hear, "
        "end its lease for it once a full lease time has passed, or kill its daemon if that is stopped "
        "on this host. It stays out until it is mounted anew.",
    )
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    parsed = parser.parse_args(args)
    entry = choose(parsed.mountpoint)
    tell = threading.Timer(SOON_S, _tell, [parsed.node])
    tell.daemon = True
    tell.start()
    try:
        told = ask(entry, {"cmd": "evict", "node": parsed.node}, timeout_s=PATIENCE_S)
    finally:
        tell.cancel()
    say(f"{told['node']} {HOW[told['how']]} after {told['after_s']} s")
    return 0
