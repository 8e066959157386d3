"""`dlmfs domain rm NAME [MOUNTPOINT]`: remove a domain that no node is in."""

from __future__ import annotations

from dlmfs.cli.choice import ask, choose
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say
from dlmfs.cli.text import plain


def run(args: list[str]) -> int:
    parser = Parser(
        prog="dlmfs domain",
        description="After a crash of all its nodes a domain's values stay until somebody joins it "
        "again; `dlmfs domain rm` removes them. Refused while a node is in it.",
    )
    parser.add_argument("what", choices=["rm"])
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    parsed = parser.parse_args(args)
    entry = choose(parsed.mountpoint)
    count = ask(entry, {"cmd": "remove-domain", "domain": parsed.name}, timeout_s=60.0)
    say(f"{plain(parsed.name)}: {count} lock resources removed")
    return 0
