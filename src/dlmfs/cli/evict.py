"""`dlmfs evict NODE [MOUNTPOINT]`: put a node out of the cluster."""

from __future__ import annotations

from dlmfs.cli.choice import ask, choose
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say

HOW = {
    "left": "left",
    "expired": "did not answer: its lease ran out",
    "ended": "did not answer: its lease was ended",
}
PATIENCE_S = 3700.0
"""The longest lease time, and some."""


def run(args: list[str]) -> int:
    """Returns when the node is out: at once if it hears of it, else after its lease time."""
    parser = Parser(
        prog="dlmfs evict",
        description="Have NODE fence itself and leave; if it does not hear, end its lease for it "
        "once a full lease time has passed. It stays out until it is mounted anew.",
    )
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    parsed = parser.parse_args(args)
    entry = choose(parsed.mountpoint)
    told = ask(entry, {"cmd": "evict", "node": parsed.node}, timeout_s=PATIENCE_S)
    say(f"{told['node']} {HOW[told['how']]} after {told['after_s']} s")
    return 0
