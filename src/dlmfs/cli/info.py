"""`dlmfs info [--json] PATH`: one lock as the whole cluster knows it."""

from __future__ import annotations

from typing import Any

from dlmfs.cli import unseen
from dlmfs.cli.choice import ask, lock_at
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say, say_json
from dlmfs.cli.text import age, plain
from dlmfs.errors import Unseen


def run(args: list[str]) -> int:
    parser = Parser(prog="dlmfs info", description="One lock: mode, token, holders, value.")
    parser.add_argument("--json", action="store_true", help="for programs: one object")
    parser.add_argument("path", metavar="PATH", help="DOMAIN/LOCK, or /dlm/DOMAIN/LOCK")
    parsed = parser.parse_args(args)
    entry, domain, lock = lock_at(parsed.path)
    try:
        report = ask(entry, {"cmd": "info", "domain": domain, "lock": lock})
    except Unseen:
        if not parsed.json:
            say(*unseen.lock(entry, domain, lock))
        raise
    if parsed.json:
        say_json(report)
    else:
        say(*render(report))
    return 0


def render(report: dict[str, Any]) -> list[str]:
    """One lock for people."""
    value = bytes.fromhex(report["lvb_hex"])
    text = value.rstrip(b"\0")
    shown = text.decode("ascii") if text.isascii() and text.decode("ascii").isprintable() else ""
    lines = [
        f"lock       {plain(report['domain'])}/{plain(report['lock'])}",
        f"this node  {report['mode']}" + (f"  token {report['token']}" if report["token"] else ""),
        f"value      {shown!r}" if shown else f"value      {value.hex()}",
    ]
    if report["abandoned"]:
        mark = report["abandoned"]
        lines.append(f"abandoned  by node {mark['node']}, which died with token {mark['token']}")
    for member in report["members"]:
        dead = "" if member["alive"] else "  DEAD"
        lines.append(
            f"member     {member['node']}  {member['level']}  token {member['token']}{dead}"
        )
    for wish in report["waiters"]:
        flags = "".join(f" ({f})" for f in ("try", "convert") if wish[f])
        lines.append(f"waiting    node {wish['node']}  {wish['mode']}{flags}")
    for key, what in (("local_holders", "held by"), ("local_waiters", "awaited by")):
        for claim in report[key]:
            who = f"pid {claim['pid']} {plain(claim['command'])}".rstrip()
            lines.append(f"{what:10} {claim['mode']}  {who}  for {age(claim['since_s'])}")
    return lines
