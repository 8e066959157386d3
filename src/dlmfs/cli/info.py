"""`dlmfs info [--json] PATH`: one lock as the whole cluster knows it."""

from __future__ import annotations

import json
import os
from typing import Any

from dlmfs.cli.parser import Parser
from dlmfs.cli.status import age
from dlmfs.control import ask
from dlmfs.errors import UsageError
from dlmfs.fuse import mount as fuse_mount


def run(args: list[str]) -> int:
    parser = Parser(prog="dlmfs info", description="One lock: mode, token, holders, value.")
    parser.add_argument("--json", action="store_true", help="for programs: one object")
    parser.add_argument("path", metavar="PATH", help="a lock's file, such as /dlm/jobs/backup")
    parsed = parser.parse_args(args)
    path = os.path.abspath(parsed.path)
    entry = fuse_mount.find(path)
    if entry is None or not entry.is_dlmfs:
        raise UsageError(f"{path} is not on a dlmfs mount: `dlmfs status` lists them")
    parts = _below(path, entry.mountpoint)
    if len(parts) != 2:
        raise UsageError(f"{path} is not a lock: give MOUNTPOINT/DOMAIN/LOCK")
    report = ask(entry, {"cmd": "info", "domain": parts[0], "lock": parts[1]})
    print(json.dumps(report) if parsed.json else render(report))
    return 0


def _below(path: str, mountpoint: str) -> list[str]:
    """The parts of `path` below the mount, which may be reached through a symbolic link."""
    parts: list[str] = []
    while path != "/" and len(parts) < 3:
        if path == mountpoint or os.path.realpath(path) == mountpoint:
            return parts[::-1]
        path, name = os.path.split(path)
        parts.append(name)
    return parts


def render(report: dict[str, Any]) -> str:
    """One lock for people."""
    value = bytes.fromhex(report["lvb_hex"])
    text = value.rstrip(b"\0")
    shown = text.decode("ascii") if text.isascii() and text.decode("ascii").isprintable() else ""
    lines = [
        f"lock       {report['domain']}/{report['lock']}",
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
            who = f"pid {claim['pid']} {claim['command']}".rstrip()
            lines.append(f"{what:10} {claim['mode']}  {who}  for {age(claim['since_s'])}")
    return "\n".join(lines)
