"""`dlmfs nodes [--json] [MOUNTPOINT]`: the nodes of a lock space."""

from __future__ import annotations

from typing import Any

from dlmfs.cli.choice import ask, choose
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say, say_json
from dlmfs.cli.text import plain


def run(args: list[str]) -> int:
    parser = Parser(prog="dlmfs nodes", description="The nodes, and the domains each is in.")
    parser.add_argument("--json", action="store_true", help="for programs: a list")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    parsed = parser.parse_args(args)
    nodes = ask(choose(parsed.mountpoint), {"cmd": "nodes"})
    if parsed.json:
        say_json(nodes)
    else:
        say(*map(render, nodes))
    return 0


def render(node: dict[str, Any]) -> str:
    """One node for people."""
    own = "  (this one)" if node["own"] else ""
    domains = " ".join(plain(name) for name in node["domains"]) or "-"
    return (
        f"{node['node']:12} host {node['host']}  pid {node['pid']}  {plain(node['mountpoint'] or '-')}  "
        f"domains: {domains}{own}"
    )
