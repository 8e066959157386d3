"""`dlmfs status [--json] [-a] [MOUNTPOINT]`: this host's mounts, their locks, who waits."""

from __future__ import annotations

import time
from typing import Any, Final

from dlmfs.cli import unseen
from dlmfs.cli.certificates import told
from dlmfs.cli.choice import ask, choose, dlmfs_mounts, of_others
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say, say_json
from dlmfs.cli.text import age, plain, who
from dlmfs.errors import DlmfsError, NotPermitted, Unseen
from dlmfs.fuse.mountinfo import MountEntry

Facts = dict[str, Any]

MISSING_MAX: Final = 8
LOG_MAX: Final = 5


BROKEN: Final = {
    "recovering": "  recovering: a fault broke its state",
    "unread": "  cannot be had: its head in the store cannot be read",
}


def run(args: list[str]) -> int:
    """Exit 0: all mounts answered; 1: no mount; 69: one of them is dead or silent."""
    parser = Parser(prog="dlmfs status", description="Who holds what, and who waits for whom.")
    parser.add_argument("--json", action="store_true", help="for programs: a list, one per mount")
    parser.add_argument("-a", "--all", action="store_true", help="idle locks too")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    parsed = parser.parse_args(args)
    if parsed.mountpoint is None:
        entries, others = dlmfs_mounts()
    else:
        entries, others = [choose(parsed.mountpoint)], []
    reports: list[Facts] = []
    code = 0 if entries else 1
    for entry in entries:
        try:
            reports.append(ask(entry, {"cmd": "status"}))
        except Unseen as error:
            reports.append(unseen.report(entry, error))
            if error.told is None or error.told["lease"]["state"] != "HEALTHY":
                code = error.exit
        except DlmfsError as error:
            reports.append(_unanswered(entry, error))
            code = error.exit
    if parsed.json:
        untold = NotPermitted("it is another user's: name it to ask it")
        say_json(reports + [_unanswered(entry, untold) for entry in others])
        return code
    for number, report in enumerate(reports):
        say(*[""] * bool(number), *render(report, everything=parsed.all))
    if others:
        say(*[""] * bool(reports), of_others(others))
    elif not reports:
        say("no dlmfs is mounted on this host; `dlmfs mount local DIR` mounts one")
    return code


def _unanswered(entry: MountEntry, error: DlmfsError) -> Facts:
    """Of a mount that has not told anything; so is the JSON of one."""
    refused = isinstance(error, NotPermitted)
    return {"mountpoint": entry.mountpoint, "error": str(error), "refused": refused}


def render(report: Facts, *, everything: bool = False) -> list[str]:
    """One mount for people."""
    if "unseen" in report:
        return unseen.render(report)
    if "error" in report:
        what = "not ours to ask" if report["refused"] else "no answer"
        return [f"{report['mountpoint']}  {what}: {report['error']}"]
    lease = report["lease"]
    head = (
        f"{report['mountpoint']}  node {report['node']}  {lease['state']}  source "
        f"{report['source']}  holder={report['holder_rule']}  pid {report['pid']}  up "
    )
    lines = [head + age(report["uptime_s"])]
    if lease["reason"]:
        lines.append(f"  {lease['reason']}")
    if report["ending"] and report["ending"]["phase"] != "over":
        lines.append(f"  it ends ({report['ending']['reason']}): holders are given their time")
    lines += [
        f"  the node {session['node']} is stopped (pid {session['pid']}): it keeps its locks"
        for session in report["store"].get("sessions", [])
        if session["stopped"]
    ]
    if report["store"].get("trouble"):
        lines.append(f"  {report['store']['trouble']}")
    if report["store"].get("files"):
        lines.append(f"  {plain(report['store']['files'])}")
    if report["store"].get("user_asked_for") is False:
        lines.append("  etcd does not ask for users: credentials= are kept until it does")
    lines += [f"  {says}" for says, _ in told(report["store"].get("certificates", []))]
    if report["store"].get("tokens"):
        lines.append(f"  tokens: {report['store']['tokens']}")
    if report["store"].get("waiting_for_pid"):
        lines.append(f"  the state file is held by pid {report['store']['waiting_for_pid']}")
    lines += [f"  {line}" for line in lately(report["log"])]
    lines += [f"  {line}" for line in faults(report["faults"]) + unwatched(report["watchdog"])]
    lines += [f"  {what}" for what in _bad(report)]
    for domain in report["domains"]:
        lines += _domain(domain, everything=everything)
    if report["hidden_domains"]:
        lines.append(f"  {report['hidden_domains']} domains are closed to you")
    return lines


def unwatched(told: Facts | None) -> list[str]:
    """Whom `on-lost=` would not reach."""
    if told is None:
        return []
    if told["ended"]:
        return [f"on-lost={told['on_lost']} is without effect: its process has ended"]
    missing = told["missing"]
    if not missing:
        return []
    threads = " ".join(map(str, missing[:MISSING_MAX]))
    whom = f"{len(missing)} holders, whose processes cannot be found (threads {threads})"
    return [f"on-lost={told['on_lost']} does not reach {whom}"]


def lately(told: Facts | None) -> list[str]:
    """The last words of a log that goes nowhere else."""
    if told is None or told["to"] != "nowhere" or not told["lately"]:
        return []
    return ["its log goes nowhere (log= names a place); the last of it:"] + [
        f"  {age(max(0.0, time.time() - line['at']))} ago {line['level']}: {line['message']}"
        for line in told["lately"][-LOG_MAX:]
    ]


def faults(told: Facts) -> list[str]:
    """What went wrong inside the daemon that nobody had expected, one place a line."""
    if told["count"] and not told["last"]:
        return [f"{told['count']} faults: the one who mounted it is told which"]
    return [
        f"fault in {plain(last['where'])}: {plain(last['what'])} ({last['times']} times, the last "
        f"{age(max(0.0, time.time() - last['at']))} ago)"
        for last in told["last"]
    ]


def _bad(report: Facts) -> list[str]:
    """Records that cannot be read."""
    more = report["more_bad_records"]
    hidden = [f"{more} records cannot be read: ask root, or who mounted it"] if more else []
    return [plain(what) for what in report["bad_records"]] + hidden


def _domain(domain: Facts, *, everything: bool) -> list[str]:
    busy = [
        k
        for k in domain["locks"]
        if k["holders"] or k["waiters"] or k["wanted_by"] or k["phase"] in BROKEN
    ]
    shown = domain["locks"] if everything else busy
    counts = {"idle": domain["count"] - (domain["count"] if everything else domain["busy"])}
    counts["more"] = domain["count"] - counts["idle"] - len(shown)
    counts["closed to you"] = domain["hidden"]
    rest = "".join(f", {count} {what}" for what, count in counts.items() if count)
    if domain["reason"]:
        rest = f"  {domain['state']}: {domain['reason']}"
    members = [*domain["members"], *_more(domain["more_members"])]
    lines = [f"  {plain(domain['name'])}/  members: {', '.join(members)}{rest}"]
    lines += [f"    {what}" for what in _bad(domain)]
    for lock in shown:
        lines.append(f"    {plain(lock['name']):24} {lock['level']}{BROKEN.get(lock['phase'], '')}")
        for what, key in (("held by", "holders"), ("awaited by", "waiters")):
            lines += [_claim(what, claim) for claim in lock[key]]
            lines += [f"      {what:10} {more}" for more in _more(lock[f"more_{key}"])]
        for wish in lock["wanted_by"]:
            trying = " (try)" if wish["try"] else ""
            lines.append(f"      {'wanted by':10} {wish['mode']}  node {wish['node']}{trying}")
        lines += [f"      {'wanted by':10} {more}" for more in _more(lock["more_wanted_by"])]
    return lines


def _more(count: int) -> list[str]:
    return [f"{count} more"] if count else []


def _claim(what: str, claim: Facts) -> str:
    name = who(claim)
    if claim["pid"] and not claim["command"]:
        name += ", which is gone: one that inherited its descriptor keeps it,"
    token = f"  token {claim['token']}" if claim["token"] else ""
    return f"      {what:10} {claim['mode']}  {name}  for {age(claim['since_s'])}{token}"
