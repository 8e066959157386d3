"""Whether a mount is alive, and how its lock space is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, Final

from dlmfs import __version__
from dlmfs.cli.certificates import told
from dlmfs.cli.checks.finding import Finding, fail, ok, warn
from dlmfs.cli.status import faults, unwatched
from dlmfs.cli.text import plain
from dlmfs.control import ask, daemon_pid
from dlmfs.errors import DlmfsError, NoAnswer, NotPermitted, Unseen
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.proc import is_stopped
from dlmfs.rundir import is_trusted, owner_of
from dlmfs.store.etcd.trouble import CURES, Kind

PATIENCE_S: Final = 60.0
SLOW_READ_MS: Final = 100.0
"""For the embedded engine, which has no lease time to compare with."""
SHOWN_MAX: Final = 5

Facts = dict[str, Any]


def check(entry: MountEntry) -> Iterator[Finding]:
    """Of another user's mount only whether its daemon lives: the rest would be his word."""
    about = plain(entry.mountpoint)
    place = shlex.quote(entry.mountpoint)
    try:
        pid = daemon_pid(entry)
    except NoAnswer as error:
        yield fail(about, str(error), "look again; if that lasts, end it and mount it again")
        return
    except DlmfsError as error:
        mend = "bind the folder of its socket in: docs/containers.md"
        yield warn(
            "unseen", about, str(error), mend if isinstance(error, Unseen) else "ask as root"
        )
        return
    if pid is None:
        yield fail(about, "its daemon is dead", f"dlmfs umount {place}, then mount it again")
    elif is_stopped(pid):
        yield fail(about, f"its daemon (pid {pid}) is stopped", f"kill -CONT {pid}")
    elif not is_trusted(entry):
        yield ok(about, f"user {owner_of(entry)} mounted it; its daemon (pid {pid}) lives")
    else:
        yield from _answers(entry, pid)


def _answers(entry: MountEntry, pid: int) -> Iterator[Finding]:
    """What a living daemon says of itself and its lock space."""
    about, place = plain(entry.mountpoint), shlex.quote(entry.mountpoint)
    try:
        status: Facts = ask(entry, {"cmd": "status"})
    except NotPermitted as error:
        yield warn("not-told", about, str(error), "ask as root, or as the user who mounted it")
        return
    except NoAnswer as error:
        yield fail(about, str(error), f"kill {pid} if that lasts, then mount it again")
        return
    except DlmfsError as error:  # it answers, so it lives, and its locks with it
        yield fail(about, str(error), "ask again; see its log")
        return
    node, source, rule = status["node"], status["source"], status["holder_rule"]
    yield ok(about, f"node {node}, source {source}, holder={rule}, pid {pid}")
    yield _version(about, place, status)
    yield _lease(about, status)
    yield from _faults(about, status)
    yield from _store(about, status["store"])
    try:
        health: Facts = ask(entry, {"cmd": "health"}, timeout_s=PATIENCE_S)
    except DlmfsError as error:
        yield fail(
            about, f"its lock space cannot be looked at: {error}", "see the log of the daemon"
        )
        return
    yield from _space(about, place, health, status)


def _space(about: str, place: str, health: Facts, status: Facts) -> Iterator[Finding]:
    if health["trouble"]:
        yield fail(about, f"the store does not answer: {health['trouble']}", _cure(status["store"]))
        return
    yield latency(about, max(health["read_ms"], default=0.0), status["lease"]["ttl_s"])
    for node in health["nodes"]:
        yield from _node(about, node, status)
    for name in health["evicted"]:
        yield ok(about, f"node {name} was evicted and stays out until it is mounted anew")
    if health["heads"] == "own":
        yield ok(about, "of the locks only your own were looked at: root is told of all")
    if health["heads_max"]:
        yield ok(about, f"only the first {health['heads_max']} locks were looked at")
    yield from _bad_records(about, [health, status, *status["domains"]])
    for domain in health["domains"]:
        yield from _domain(about, place, domain)


def _version(about: str, place: str, status: Facts) -> Finding:
    if status["version"] == __version__:
        return ok(about, f"runs this version, {__version__}")
    return warn(
        "version",
        about,
        f"its daemon is of version {status['version']}, this program of {__version__}",
        f"dlmfs umount {place}, then mount it again",
    )


def _lease(about: str, status: Facts) -> Finding:
    lease = status["lease"]
    state = lease["state"]
    if state == "HEALTHY":
        left = f", good for {lease['left_s']:.0f} s" if lease["left_s"] is not None else ""
        ttl = f", lease time {lease['ttl_s']:g} s" if lease["ttl_s"] else ""
        again = f"; it was fenced {lease['fences']} times" if lease["fences"] else ""
        return ok(about, f"HEALTHY{ttl}{left}{again}")
    mend = "it comes back by itself when the store answers"
    if state == "FENCED":
        mend = "if that lasts, mount it again; see the reason"
    return fail(about, f"{state}: {lease['reason'] or 'no renewal was confirmed lately'}", mend)


def _faults(about: str, status: Facts) -> Iterator[Finding]:
    for line in faults(status["faults"]):
        yield warn("fault", about, line, "see the daemon's log, and report it with that")
    for line in unwatched(status["watchdog"]):
        yield warn(
            "on-lost",
            about,
            line,
            "mount it again, or end those programs by hand if a lock is lost",
        )


def _store(about: str, store: Facts) -> Iterator[Finding]:
    if store.get("path"):
        kind = "outlives a power failure" if store.get("durable") else "in memory"
        place = f"{plain(store['path'])}, {kind} ({store.get('filesystem')})"
        yield ok(about, f"state in {place}")
    if store.get("tokens"):
        yield warn(
            "tokens",
            about,
            f"tokens: {plain(str(store['tokens']))}",
            "make that a folder of yours alone on a local disk; see docs/reference.md, Tokens",
        )
    if store.get("warning"):
        yield warn("etcd-version", about, store["warning"], "upgrade etcd")
    if store.get("trouble"):
        yield fail(about, f"etcd: {store['trouble']}", _cure(store))
    if store.get("files"):
        yield warn(
            "etcd-files",
            about,
            plain(str(store["files"])),
            "mend it: it is read again by itself (docs/etcd.md)",
        )
    for says, over in told(store.get("certificates", [])):
        mend = "renew it: its file is read again by itself"
        yield fail(about, says, mend) if over else warn("certificate", about, says, mend)
    if store.get("lost") or store.get("error"):
        yield fail(about, str(store.get("lost") or store["error"]), "mount it again")
    holder = store.get("waiting_for_pid")
    if holder:
        yield fail(
            about, f"the state file is held by pid {holder}", f"kill -CONT {holder}, or end it"
        )


def _cure(store: Facts) -> str:
    """What to do about the trouble of which a store tells."""
    kinds = {kind.value: kind for kind in Kind}
    kind = kinds.get(str(store.get("trouble_kind")), Kind.SILENT)
    return CURES[kind] if kind is not Kind.SILENT else "`dlmfs doctor SOURCE` asks each endpoint"


def latency(about: str, worst_ms: float, ttl_s: float | None) -> Finding:
    """The store's slowest answer, measured against what a lease needs: a renewal is given up after a
    fifth of the lease time, and takes three answers."""
    says = f"the store answers within {worst_ms:.1f} ms"
    if ttl_s is None:
        if worst_ms <= SLOW_READ_MS:
            return ok(about, says)
        return warn("latency", about, says, "see what else loads this machine or its disk")
    share = worst_ms / 1000 / ttl_s
    if share <= 1 / 60:
        return ok(about, f"{says}; the lease time is {ttl_s:g} s")
    mend = f"mount with a longer ttl= than {ttl_s:g}, or bring etcd nearer"
    if share <= 1 / 15:
        return warn("latency", about, f"{says}, much for a lease time of {ttl_s:g} s", mend)
    return fail(
        about, f"{says}, too much for a lease time of {ttl_s:g} s: nodes will be fenced", mend
    )


def _bad_records(about: str, reports: list[Facts]) -> Iterator[Finding]:
    """Records that cannot be read, as the daemon met them or found them now."""
    bad = list(dict.fromkeys(what for report in reports for what in report["bad_records"]))
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        yield fail(
            about,
            f"{plain(bad[0])}{more}: it is skipped, or its lock cannot be had",
            "find out who wrote it; it may be deleted once no program holds a lock of that name",
        )


def _node(about: str, node: Facts, status: Facts) -> Iterator[Finding]:
    name, silent = node["node"], node["silent"]
    if node["own"]:
        return
    if silent is not None:
        left = silent["left_s"]
        until = f"; its locks are free in {left:.0f} s" if left is not None else ""
        mend = {
            "stopped": f"kill -CONT {silent['pid']} on {silent['host']}",
            "dead": "nothing to do: it is forgotten when its lease ends",
            "gone": "nothing to do",
            "unasked": f"see to node {status['node']} first",
        }.get(silent["why"], f"look at {node['host']}; `dlmfs evict {name}` puts it out")
        if silent["why"] not in ("dead", "unreachable"):
            until = ""
        yield fail(about, f"node {name} ({node['host']}): {silent['says']}{until}", mend)
        return
    if "state" not in node:
        yield ok(about, f"node {name} ({node['host']}) was not asked: there are too many")
        return
    yield ok(about, f"node {name} ({node['host']}, pid {node['pid']}) answers: {node['state']}")
    if node["state"] != "HEALTHY":
        yield fail(
            about, f"node {name} is {node['state']}: {node['reason']}", "see `dlmfs status` there"
        )
    if node["version"] != status["version"]:
        yield warn(
            "version",
            about,
            f"node {name} is of version {node['version']}, node {status['node']} of {status['version']}",
            "run the same version on every node",
        )
    if node["holder_rule"] not in (None, status["holder_rule"]):
        yield warn(
            "holder",
            about,
            f"node {name} has holder={node['holder_rule']}, node {status['node']} "
            f"holder={status['holder_rule']}: programs exclude each other on one of them only",
            "mount all nodes with the same holder=",
        )
    if (
        node["ttl_s"] not in (None, status["lease"]["ttl_s"])
        and status["lease"]["ttl_s"] is not None
    ):
        yield warn(
            "ttl",
            about,
            f"node {name} has the lease time {node['ttl_s']:g} s: its locks come free that late",
            "mount all nodes with the same ttl=",
        )


def _domain(about: str, place: str, domain: Facts) -> Iterator[Finding]:
    name = plain(domain["domain"])
    if not domain["nodes"]:
        yield warn(
            "domain-left",
            about,
            f"domain {name} has no node any more, but the values of {domain['locks']} locks",
            f"dlmfs domain rm {shlex.quote(domain['domain'])} {place}, or mkdir it to go on with them",
        )
        return
    nodes = len(domain["nodes"]) + domain["more_nodes"]
    yield ok(about, f"domain {name}: {nodes} nodes, {domain['locks']} locks")
    left = domain["ownerless"]
    if left:
        count = len(left) + domain["more_ownerless"]
        yield warn(
            "locks-left",
            about,
            f"domain {name}: {count} locks of dead nodes only: {_some(left, count)}",
            "the next open of each mends it: `dlmfs value get PATH`, then rm what is not needed",
        )
    doubtful = domain["abandoned"]
    if doubtful:
        count = len(doubtful) + domain["more_abandoned"]
        yield warn(
            "doubtful-values",
            about,
            f"domain {name}: the values of {count} locks are doubtful, their holder died: "
            + _some(list(doubtful), count),
            "check what they protect, then write them anew: `dlmfs value set PATH VALUE`",
        )


def _some(names: list[str], count: int) -> str:
    more = f" and {count - SHOWN_MAX} more" if count > SHOWN_MAX else ""
    return " ".join(plain(name) for name in sorted(names)[:SHOWN_MAX]) + more
