"""What is told of a mount whose daemon cannot be asked from here: what its extended attributes say."""

from __future__ import annotations

import json
from typing import Any

from dlmfs.cli.text import age, plain, who
from dlmfs.errors import Unseen
from dlmfs.fuse import glance
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.rundir import is_trusted

Facts = dict[str, Any]


def report(entry: MountEntry, error: Unseen) -> Facts:
    """The row of `dlmfs status --json` of such a mount."""
    seen: Facts = {"status": error.told, "locks": [], "more": False}
    if error.told is not None:
        told = glance.look(entry, {"locks": True}).told
        seen["locks"] = [_parsed(each) for each in told.get("locks", [])]
        seen["more"] = told.get("more", False)
    return {"mountpoint": entry.mountpoint, "error": str(error), "refused": False, "unseen": seen}


def render(row: Facts) -> list[str]:
    """The same for people."""
    told = row["unseen"]["status"]
    if told is None:
        return [f"{row['mountpoint']}  no answer: {row['error']}"]
    head = f"{row['mountpoint']}  node {told['node']}  {told['lease']['state']}"
    rest = f"source {told['source']}  holder={told['holder_rule']}  up {age(told['uptime_s'])}"
    lines = [f"{head}  {rest}"]
    if told["lease"]["reason"]:
        lines.append(f"  {told['lease']['reason']}")
    lines.append(f"  only what the mount itself tells: {row['error']}")
    for lock in row["unseen"]["locks"]:
        lines += [f"  {line}" for line in lock_lines(lock["domain"], lock["name"], lock)]
    return lines + ["  more files were not looked at"] * row["unseen"]["more"]


def lock(entry: MountEntry, domain: str, name: str) -> list[str]:
    """One lock for people; nothing if the mount does not tell, or only its owner's word could be told."""
    told = glance.look(entry, {"lock": [domain, name]}).told if is_trusted(entry) else {}
    found = _parsed(told.get("lock", {}))
    return lock_lines(domain, name, found) if found.get("mode") is not None else []


def lock_lines(domain: str, name: str, found: Facts) -> list[str]:
    """What this node knows of it. Who has it on other nodes is in the store, where nobody asks now."""
    lines = [f"{plain(domain)}/{plain(name)}  this node has {plain(str(found['mode']))}"]
    for key, what in (("holders", "held by"), ("waiters", "awaited by")):
        lines += [f"  {what:10} {_row(row)}" for row in found[key] or []]
    if not found["holders"] and found["waiters"]:
        lines.append("  nobody on this node has it: another node is in the way")
    if found["abandoned"]:
        lines.append(
            f"  abandoned  by node {plain(str(found['abandoned'].get('node')))}, which died"
        )
    return lines


def _row(row: Facts) -> str:
    if "more" in row:
        return f"{row['more']} more"
    process = who(row) if "pid" in row else f"node {plain(str(row.get('node')))}"
    return f"{plain(str(row.get('mode')))}  {process}"


def _parsed(found: Facts) -> Facts:
    """The attributes of a lock, of which some are JSON."""
    parsed = dict(found)
    for key in ("holders", "waiters", "abandoned"):
        try:
            parsed[key] = json.loads(found.get(key) or "null")
        except ValueError:
            parsed[key] = None
    return parsed
