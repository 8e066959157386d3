"""`dlmfs why [--json] PATH`: why a lock is not free, as a story that can be read at 3 am."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from dlmfs import control, waitgraph
from dlmfs.cli import unseen
from dlmfs.cli.choice import ask, lock_at
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import say, say_json
from dlmfs.cli.text import age, plain, who
from dlmfs.errors import Unseen
from dlmfs.fuse.mountinfo import MountEntry
from dlmfs.rundir import is_trusted

PATIENCE_S: Final = 60.0
"""A round of questions takes 2 s where a node is silent, and no node is waited for twice."""
MODES: Final = {"PR": "shared", "EX": "exclusively"}
WISHES: Final = {"PR": "shared", "EX": "exclusive"}

Facts = dict[str, Any]


def run(args: list[str]) -> int:
    """Exit 0: all is told; 69: a node or the store did not answer, and it says which."""
    parser = Parser(
        prog="dlmfs why",
        description="Who has the lock, who waits for it and in which order, what the holders wait for "
        "themselves, and so on, across all nodes; names a deadlock if there is one.",
    )
    parser.add_argument("--json", action="store_true", help="for programs: one object")
    parser.add_argument("path", metavar="PATH", help="DOMAIN/LOCK, or /dlm/DOMAIN/LOCK")
    parsed = parser.parse_args(args)
    entry, domain, lock = lock_at(parsed.path)
    try:
        report = look(entry, domain, lock, ask)
    except Unseen:
        if not parsed.json:
            say(*unseen.lock(entry, domain, lock))
        raise
    if parsed.json:
        say_json(report)
    else:
        say(*story(report))
    silent = any("silent" in node for node in report["nodes"].values())
    return 69 if silent or report["trouble"] or report.get("refused") else 0


def look(
    entry: MountEntry,
    domain: str,
    lock: str,
    ask: Callable[[MountEntry, dict[str, object], float], Any] = control.ask,
) -> Facts:
    """The daemon's answer, and the deadlocks in it; in another user's words none are looked for. Raises
    what `ask` does."""
    question: dict[str, object] = {"cmd": "why", "domain": domain, "lock": lock}
    report: Facts = ask(entry, question, PATIENCE_S)
    deadlocks = waitgraph.deadlocks(report) if is_trusted(entry) else []
    if deadlocks:
        report = ask(entry, question, PATIENCE_S)
        deadlocks = waitgraph.in_both(deadlocks, waitgraph.deadlocks(report))
    return report | {"deadlocks": deadlocks}


def story(report: Facts) -> list[str]:
    """The whole answer for people: first what matters most."""
    teller = _Teller(report)
    lines: list[str] = []
    for cycle in report["deadlocks"]:
        lines += [*teller.deadlock(cycle), ""]
    if report["trouble"]:
        lines += [
            f"THE STORE DOES NOT ANSWER: {report['trouble']}",
            f"What follows is only what this node ({report['node']}) knows.",
            "",
        ]
    elif report.get("refused"):
        lines += [f"NO LOCK CAN CHANGE HANDS: {report['refused']}", ""]
    for lock in report["locks"]:
        lines += teller.lock(lock)
    if report["more"]:
        lines.append(f"... and so on: {report['more']} more locks are waited for.")
    if report["hidden"]:
        lines.append(f"They wait for {report['hidden']} locks, too, that are closed to you.")
    return lines + teller.remarks()


class _Teller:
    def __init__(self, report: Facts) -> None:
        self.nodes: dict[str, Facts] = report["nodes"]
        self.waits: list[Facts] = report["waits"]
        self.locks = {(k["domain"], k["lock"]): k for k in report["locks"]}
        self.told: set[tuple[str, int]] = set()
        self.sharing: list[str] = []
        """Nodes whose processes share what they hold."""
        self.nobody = "nobody has it and nobody waits for it: it is free"
        if report["trouble"]:
            self.nobody = "nobody on this node has it; of the others nothing can be known"
        elif report.get("refused"):
            self.nobody = "nobody has it and nobody waits for it, but the store gives it to nobody"

    # -- words ----------------------------------------------------------------------------------

    @staticmethod
    def name(row: Facts) -> str:
        return f"{plain(row['domain'])}/{plain(row['lock'])}"

    def place(self, node: str) -> str:
        host = self.nodes.get(node, {}).get("host")
        return f"node {node} on {host}" if host else f"node {node}"

    def silence(self, node: str) -> Facts | None:
        silent: Facts | None = self.nodes.get(node, {}).get("silent")
        return silent

    # -- a deadlock -------------------------------------------------------------------------------

    def deadlock(self, cycle: Facts) -> list[str]:
        edges = cycle["edges"]
        if not cycle["certain"]:
            head = "DEADLOCK, unless another thread, or the parent of a child, gives its lock back:"
        elif len(edges) == 1:
            head = "DEADLOCK: a process waits for a lock that it has itself; it will never go on:"
        else:
            head = f"DEADLOCK: {len(edges)} processes wait for each other; none will ever go on:"
        lines = [head]
        for edge, before in zip(edges, edges[-1:] + edges[:-1], strict=True):
            wish = WISHES[edge["waiter"]["mode"]]
            lines.append(
                f"  {who(edge['waiter'])} ({self.place(edge['node'])}) waits for "
                f"{self.name(edge)} ({wish}), for {age(edge['waiter']['since_s'])}"
            )
            if before["by"] != "itself":
                how = {
                    "inherited": f"it has inherited {self.name(before)} from",
                    "thread": f"another thread has {self.name(before)} open: of",
                    "child": f"it is a descendant of the holder of {self.name(before)},",
                }[before["by"]]
                lines.append(f"      ({how} {who(before['its'])})")
            has = "which is held by" if edge["why"] == "holds" else "where it stands behind"
            lines.append(f"    {has} {who(edge['its'])} ({self.place(edge['its_node'])})")
        last = min(edges, key=lambda edge: edge["waiter"]["since_s"])
        host = self.nodes.get(last["node"], {}).get("host")
        if last["waiter"]["pid"]:
            lines.append(
                f"  End one of them: `kill {last['waiter']['pid']}` on {host} ends the last that came."
            )
        return lines

    # -- a lock -------------------------------------------------------------------------------------

    def lock(self, lock: Facts) -> list[str]:
        lines = [self.name(lock)]
        holding = self._holders(lock)
        waiting = self._queue(lock)
        if not holding and not waiting:
            lines.append(f"  {self.nobody}")
        lines += holding
        if waiting:
            order = " waits for it:" if len(waiting) == 1 else " wait for it, in this order:"
            lines += [f"  {len(waiting)}{order}", *waiting]
        elif holding:
            lines.append("  nobody waits for it")
        if lock["abandoned"]:
            mark = lock["abandoned"]
            lines.append(f"  its value is doubtful: node {mark['node']} died having it exclusively")
        return lines + self._further(lock, wanted=bool(waiting))

    def _holders(self, lock: Facts) -> list[str]:
        lines: list[str] = []
        for member in lock["members"]:
            node, level = member["node"], member["level"]
            claims = lock["claims"].get(node)
            if claims is not None and claims["holders"]:
                lines += self._held(node, claims)
            elif level == "NL" or (claims is not None and claims["level"] == "NL"):
                if claims is not None and claims["phase"] == "dropping":
                    lines.append(f"  node {node} is giving it back just now")
            elif not member["alive"]:
                lines.append(
                    f"  node {node} is dead and had it {MODES[level]}: the next who asks gets it, after "
                    "the lock-delay if one is set"
                )
            elif claims is None:
                lines += self._unknown(node, level)
            else:
                lines.append(
                    f"  nobody uses it at node {node}, which merely keeps it cached ({level}): it is "
                    "handed over as soon as another node asks"
                )
        return lines

    def _held(self, node: str, claims: Facts) -> list[str]:
        lines = []
        for claim in claims["holders"]:
            line = (
                f"  {who(claim)} has it {MODES[claim['mode']]}, for {age(claim['since_s'])} "
                f"({self.place(node)})"
            )
            lines.append(line)
            if claim["gone"]:
                lines.append(
                    "    that process is gone; one that inherited its descriptor keeps it:"
                )
                lines.append("    `fuser -v` on the lock's file there names it")
        if claims["more_holders"]:
            lines.append(f"  and {claims['more_holders']} more at node {node}")
        if self.nodes[node]["holder_rule"] == "node" and node not in self.sharing:
            self.sharing.append(node)
        return lines

    def _unknown(self, node: str, level: str) -> list[str]:
        silent = self.silence(node) or {"says": "it was not asked", "left_s": None, "why": ""}
        where = f" ({silent['host']})" if silent.get("host") else ""
        lines = [f"  node {node}{where} has it ({level}), in use or cached, and cannot be heard:"]
        lines.append(f"    {silent['says']}")
        if silent["why"] == "stopped":
            lines.append(
                f"    it goes on by `kill -CONT {silent['pid']}`; until then it keeps the lock"
            )
        elif silent["why"] in ("dead", "unreachable") and silent["left_s"] is not None:
            lines.append(f"    unless it comes back, the lock is free in {silent['left_s']:.0f} s")
        elif silent["left_s"] is not None:
            lines.append(
                f"    its lease is good ({silent['left_s']:.0f} s): `dlmfs evict {node}` puts it out"
            )
        return lines

    # -- who waits ----------------------------------------------------------------------------------

    def _queue(self, lock: Facts) -> list[str]:
        """One line for each waiter, in the order in which they are served as far as that is known."""
        rows: list[str] = []
        wishing = [wish["node"] for wish in lock["queue"]]
        for node, claims in lock["claims"].items():
            if node not in wishing:
                early = [c for c in claims["waiters"] if c["before_others"]]
                rows += [self._waiter(node, claim) for claim in early]
        for wish in lock["queue"]:
            claims = lock["claims"].get(wish["node"])
            flags = "".join(f", {flag}" for flag in ("try", "convert") if wish[flag])
            if claims is None or not claims["waiters"]:
                silent = self.silence(wish["node"])
                why = f": {silent['says']}" if silent else ""
                rows.append(f"node {wish['node']}, {WISHES[wish['mode']]}{flags}{why}")
            else:
                rows += [self._waiter(wish["node"], c, flags) for c in claims["waiters"]]
                rows += self._more(wish["node"], claims)
        for node, claims in lock["claims"].items():
            if node not in wishing:
                late = [c for c in claims["waiters"] if not c["before_others"]]
                rows += [self._waiter(node, claim) for claim in late]
                rows += self._more(node, claims)
        return [f"    {number}. {row}" for number, row in enumerate(rows, 1)]

    def _waiter(self, node: str, claim: Facts, flags: str = "") -> str:
        waits = f"{WISHES[claim['mode']]}{flags}, for {age(claim['since_s'])}"
        return f"{who(claim)}, {waits} ({self.place(node)})"

    @staticmethod
    def _more(node: str, claims: Facts) -> list[str]:
        more = claims["more_waiters"]
        return [f"and {more} more at node {node}"] if more else []

    # -- what the holders do ----------------------------------------------------------------------------

    def _further(self, lock: Facts, *, wanted: bool) -> list[str]:
        lines: list[str] = []
        for node, claims in lock["claims"].items():
            for claim in claims["holders"]:
                key = (self.nodes[node]["place"], claim["pid"])
                if not claim["pid"] or claim["gone"] or key in self.told:
                    continue
                self.told.add(key)
                lines += self._doing(node, claim, wanted=wanted)
        return lines

    def _doing(self, node: str, claim: Facts, *, wanted: bool) -> list[str]:
        place = self.nodes[node]["place"]
        own = [
            row
            for row in self.waits
            if row["pid"] == claim["pid"] and self.nodes[row["node"]]["place"] == place
        ]
        lines = []
        for row in own:
            child = row["claim"]["pid"] != row["pid"]
            whose = f"'s child {who(row['claim'])}" if child else ""
            since = age(row["claim"]["since_s"])
            lines.append(f"  -> {who(claim)}{whose} itself waits for {self.name(row)}, for {since}")
        host = self.nodes[node]["host"]
        if claim["run"] in ("T", "t"):
            lines.append(
                f"  -> {who(claim)} is stopped (SIGSTOP, Ctrl-Z): `kill -CONT {claim['pid']}` on {host}"
            )
        elif wanted and not own:
            lines.append(
                f"  -> {who(claim)} waits for no lock here; see what it does on {host}: "
                f"`ps -o pid,stat,wchan,args -p {claim['pid']}`"
            )
        return lines

    def remarks(self) -> list[str]:
        """What is not as it should be, or as one expects, of the nodes."""
        lines = []
        for name, node in self.nodes.items():
            if node.get("state", "HEALTHY") != "HEALTHY":
                lines.append(
                    f"node {name} is {node['state']}: {node['reason'] or 'no renewal lately'}"
                )
            elif self.silence(name) and node["silent"]["why"] not in ("unasked", "gone"):
                lines.append(f"node {name} did not answer: {node['silent']['says']}")
        if self.sharing:
            lines.append(
                f"holder=node at {', '.join(self.sharing)}: the processes of such a node share its "
                "locks; only other nodes are kept out"
            )
        return ["", *lines] if lines else []
