"""`dlmfs top`: the busy locks of this host's mounts, live; `-b` and `--json` for scripts."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from dlmfs.cli.choice import choose, dlmfs_mounts, of_others
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say, say_json
from dlmfs.cli.text import age, plain, who
from dlmfs.control import ask
from dlmfs.errors import DlmfsError, UsageError
from dlmfs.fuse import mount as fuse_mount
from dlmfs.fuse.mountinfo import MountEntry

ASK_S: Final = 3.0
DELAY_MAX_S: Final = 86_400
SORTS: Final = ("waiters", "longest", "grants", "name")

Facts = dict[str, Any]


def run(args: list[str]) -> int:
    """Exit 0; 1: no dlmfs is mounted (batch mode)."""
    parser = Parser(
        prog="dlmfs top",
        description="The busy locks of this host's mounts: who waits, how long, who has it, grants per "
        "second. Keys: ? shows them. Where the output is no terminal it is printed once.",
    )
    add = parser.add_argument
    add("-b", "--batch", action="store_true", help="print, for scripts, instead of a live screen")
    add("--once", action="store_true", help="as -b -n 1")
    add("--json", action="store_true", help="as -b, one JSON object a line")
    add("-n", "--count", metavar="N", type=int, help="end after N times")
    add("-d", "--delay", metavar="SECS", type=float, default=1.0, help="between two looks (1)")
    add("-s", "--sort", choices=SORTS, default="waiters", help="by what (waiters)")
    add("-r", "--reverse", action="store_true", help="the other way round")
    add("-f", "--filter", metavar="TEXT", default="", help="only locks with TEXT in domain/lock")
    add("-a", "--all", action="store_true", help="idle locks too")
    add("mountpoint", metavar="MOUNTPOINT", nargs="?", help="left out: all of this host")
    parsed = parser.parse_args(args)
    if not 0 <= parsed.delay <= DELAY_MAX_S:
        raise UsageError(f"-d SECS: give seconds from 0 to {DELAY_MAX_S}")
    if parsed.count is not None and parsed.count < 1:
        raise UsageError("-n N: give a number from 1")
    if parsed.mountpoint is not None:
        choose(parsed.mountpoint)
    view = View(parsed.sort, parsed.filter, reverse=parsed.reverse, idle=parsed.all)
    if parsed.batch or parsed.once or parsed.json or not _is_terminal():
        endless = parsed.batch and not parsed.once
        count = parsed.count or (None if endless else 1)
        return _print(parsed.mountpoint, view, parsed.delay, count, as_json=parsed.json)
    from dlmfs.cli.screen import show

    return show(parsed.mountpoint, view, max(parsed.delay, 0.1), parsed.count)


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


class View:
    """What is to be seen, and in which order."""

    def __init__(self, sort: str, wanted: str, *, reverse: bool, idle: bool) -> None:
        self.sort = sort
        self.wanted = wanted
        self.reverse = reverse
        self.idle = idle

    def ordered(self, rows: list[Facts]) -> list[Facts]:
        """The busiest first, or by name; `reverse` the other way round."""
        keys = {
            "waiters": lambda row: (-row["waiters"], -(row["longest_s"] or 0), row["name"]),
            "longest": lambda row: (-(row["longest_s"] or 0), -row["waiters"], row["name"]),
            "grants": lambda row: (-(row["grants_per_s"] or 0), -row["waiters"], row["name"]),
            "name": lambda row: row["name"],
        }
        return sorted(rows, key=keys[self.sort], reverse=self.reverse)


# -- looking ------------------------------------------------------------------------------------------


def entries(mountpoint: str | None) -> tuple[list[MountEntry], list[MountEntry]]:
    """The mounts in question, as of now, and those of other users that are not asked."""
    if mountpoint is None:
        return dlmfs_mounts()
    where = fuse_mount.find(mountpoint)
    found = [entry for entry in fuse_mount.mounts() if entry.is_dlmfs]
    return [entry for entry in found if where is not None and entry.id == where.id], []


def sample(mountpoint: str | None, view: View) -> Facts:
    """One look at all mounts: `mounts`, each with its node or the error, `others`, a line on those that
    are not asked, and `locks`, those of one lock space as one."""
    mounts: list[Facts] = []
    rows: dict[tuple[str, str, str], Facts] = {}
    nodes: dict[str, set[str]] = {}
    asked, others = entries(mountpoint)
    for entry in asked:
        question: dict[str, object] = {"cmd": "top", "filter": view.wanted, "idle": view.idle}
        try:
            told: Facts = ask(entry, question, timeout_s=ASK_S)
        except DlmfsError as error:
            mounts.append({"mountpoint": entry.mountpoint, "error": str(error)})
            continue
        locks = told.pop("locks")
        mounts.append({**told, "told": len(locks), "error": None})
        nodes.setdefault(told["source"], set()).add(told["node"])
        for lock in locks:
            key = (told["source"], lock["domain"], lock["lock"])
            _merge(rows.setdefault(key, _blank(*key)), lock, told)
    for row in rows.values():
        seen = nodes[row["source"]]
        row["waiters"] += len(set(row["wanted_by"]) - seen)
        row["wanted_by"] = sorted(row["wanted_by"])
        if row["holder"] is None:
            away = sorted(set(row["held_by"]) - seen)
            row["node"] = away[0] if away else None
        del row["held_by"]
    return {
        "mounts": mounts,
        "others": of_others(others) if others else None,
        "locks": view.ordered(list(rows.values())),
    }


def _blank(source: str, domain: str, lock: str) -> Facts:
    return {
        "source": source,
        "domain": domain,
        "lock": lock,
        "name": f"{domain}/{lock}",
        "waiters": 0,
        "longest_s": None,
        "grants_per_s": None,
        "holders": 0,
        "node": None,
        "holder": None,
        "wanted_by": set(),
        "held_by": set(),
        "mountpoint": None,
    }


def _merge(row: Facts, lock: Facts, told: Facts) -> None:
    """Add what one mount tells of a lock."""
    row["mountpoint"] = row["mountpoint"] or told["mountpoint"]
    row["waiters"] += lock["waiters"]
    row["holders"] += lock["holders"]
    row["wanted_by"] |= set(lock["wanted_by"])
    row["held_by"] |= set(lock["held_by"])
    for key in ("longest_s", "grants_per_s"):
        if lock[key] is not None:
            both = (row[key] or 0.0, lock[key])
            row[key] = max(both) if key == "longest_s" else round(sum(both), 2)
    if lock["holder"] is not None:
        other = row["holder"]
        if other is None or lock["holder"]["since_s"] > other["since_s"]:
            row["holder"], row["node"] = lock["holder"], told["node"]


# -- printing -----------------------------------------------------------------------------------------


HEADER: Final = f"{'WAIT':>5} {'LONGEST':>8} {'GRANTS/S':>9} {'HELD':>5} {'SINCE':>8}  LOCK"
NARROW_HEADER: Final = f"{'WAIT':>5} {'LONGEST':>8}  LOCK"


def line(row: Facts, *, narrow: bool = False) -> str:
    """One lock: numbers first, then the lock and its first holder, which may be cut off. `narrow`:
    fewer numbers, so that a terminal of 40 columns shows the lock."""
    longest = age(row["longest_s"]) if row["longest_s"] is not None else "-"
    rate = f"{row['grants_per_s']:.1f}" if row["grants_per_s"] is not None else "-"
    holder = row["holder"]
    since = age(holder["since_s"]) if holder else "-"
    by = f"{who(holder)} (node {row['node']})" if holder else ""
    if not by and row["node"]:
        by = f"node {row['node']}"
    name = plain(row["name"])
    start = f"{row['waiters']:>5} {longest:>8}"
    if narrow:
        return f"{start}  {name}  {by}".rstrip()
    return f"{start} {rate:>9} {row['holders']:>5} {since:>8}  {name:20}  {by}".rstrip()


def heading(seen: Facts, view: View) -> list[str]:
    """What stands above the table: the mounts that are not well, and what is shown."""
    well = [m for m in seen["mounts"] if m["error"] is None]
    lines = [f"{m['mountpoint']}: {m['error']}" for m in seen["mounts"] if m["error"]]
    lines += [
        f"{m['mountpoint']}: node {m['node']} is {m['state']}: {m['reason'] or ''}".rstrip(": ")
        for m in well
        if m["state"] != "HEALTHY"
    ]
    lines += [seen["others"]] if seen["others"] else []
    nodes = ", ".join(m["node"] for m in well) or "none"
    count = len(seen["locks"])
    more = "" if all(m["told"] == m["busy"] for m in well) else " of many"
    order = f"by {view.sort}{', reversed' if view.reverse else ''}"
    only = f", with '{plain(view.wanted)}'" if view.wanted else ""
    what = "all" if view.idle else "busy"
    first = f"nodes here: {nodes}  {what} locks: {count}{more}{only}  {order}"
    return [first, *lines]


def _print(
    mountpoint: str | None, view: View, delay_s: float, count: int | None, *, as_json: bool
) -> int:
    seen = sample(mountpoint, view)  # to have rates the first time already
    number = 0
    while count is None or number < count:
        if delay_s or number:
            time.sleep(delay_s)
            seen = sample(mountpoint, view)
        if as_json:
            say_json(seen, flush=True)
        else:
            blank = [""] if number else []
            rows = [line(row) for row in seen["locks"]]
            say(*blank, *heading(seen, view), HEADER, *rows, flush=True)
        number += 1
    return 0 if seen["mounts"] else 1
