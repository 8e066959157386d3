"""Who blocks whom at a lock, followed from node to node: the answer behind `dlmfs why`.

Each round reads the locks in question from the store in one transaction, puts one question to the
nodes concerned, and goes on with the locks that their holders' processes wait for themselves.
Layout of the answer: docs/reference.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

from dlmfs import facts, identity
from dlmfs.engine.questions import ASKED_MAX, PATIENCE_S, Answers
from dlmfs.engine.queue import ordered
from dlmfs.engine.records import NODES, Head, Keys, decode_head, decode_wish
from dlmfs.errors import DlmfsError, UsageError
from dlmfs.model import TOKEN_SHIFT, Mode
from dlmfs.store.base import Get, KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.node import Node

ROUNDS_MAX: Final = 16
LOCKS_MAX: Final = 64
"""Locks told of: a chain this long is told up to there, and that it goes on."""
STORE_S: Final = 5.0
"""How long the store may take. Its own patience follows from the lease time, which may be an hour."""

Facts = dict[str, Any]
Name = tuple[str, str]


async def why(node: Node, domain: str, lock: str) -> Facts:
    """The chain from one lock on. Raises UsageError for a domain that nobody is in."""
    search = _Search(node)
    todo: list[Name] = [(domain, lock)]
    rounds = 0
    while todo and rounds < ROUNDS_MAX and len(search.locks) < LOCKS_MAX:
        rounds += 1
        await search.round(todo[: facts.LOCKS_MAX])
        todo = search.open_names()
    if search.trouble is None and search.is_nowhere:
        raise UsageError(f"no node is in a domain {domain!r}: mkdir it first")
    return {
        "domain": domain,
        "lock": lock,
        "node": node.membership.name,
        "trouble": search.trouble,
        "more": len(todo),
        "nodes": search.nodes | {name: {"silent": s} for name, s in search.silent.items()},
        "locks": list(search.locks.values()),
        "waits": list(search.waits.values()),
    }


class _Search:
    """What is known so far."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.locks: dict[Name, Facts] = {}
        self.nodes: dict[str, Facts] = {}
        """Those that answered."""
        self.silent: dict[str, Facts] = {}
        """Those that did not, and what is known of them."""
        self.waits: dict[tuple[str, int, int], Facts] = {}
        """By node, process and claim: what the processes at these locks wait for themselves."""
        self.trouble: str | None = None
        """Why the store could not be read."""
        self._records: dict[str, KeyValue] = {}
        self._asked_for: set[tuple[str, int]] = set()

    # -- one round ------------------------------------------------------------------------------

    async def round(self, names: list[Name]) -> None:
        """Learn all of these locks."""
        try:
            async with asyncio.timeout(STORE_S):
                await self._read(names)
        except (DlmfsError, TimeoutError) as error:
            self.trouble = str(error) or f"it has said nothing for {STORE_S:g} s"
            for name in names:
                self.locks[name] = self._from_here(name)
        own = self.node.membership.name
        threads = self._threads()
        asked = [] if self.trouble is not None else self._concerned(names, threads)
        question: Facts = {"locks": names, "threads": [list(t) for _, t in threads]}
        answers: Answers = {own: facts.reply(self.node, question)}
        if asked:
            answers |= await self._ask(asked[:ASKED_MAX], question)
        for other in asked[ASKED_MAX:]:
            self.silent[other] = _unheard("unasked", f"no more than {ASKED_MAX} nodes are asked")
        for other, answer in answers.items():
            await self._take(other, answer)

    async def _read(self, names: list[Name]) -> None:
        reads: list[Get | Range] = [Range(NODES)]
        for domain, lock in names:
            keys = Keys(os.fsencode(domain), "")
            key = os.fsencode(lock)
            reads += [Get(keys.head(key)), Range(keys.queue(key)), Range(keys.members)]
        records, *rest = (await self.node.transact(Txn((), tuple(reads)))).responses
        assert isinstance(records, tuple)
        for kv in records:
            assert isinstance(kv, KeyValue)
            if b"/" not in kv.key[len(NODES) :]:
                self._records[kv.key[len(NODES) :].decode()] = kv
        for i, name in enumerate(names):
            self.locks[name] = _stored(name, *rest[3 * i : 3 * i + 3])

    def _from_here(self, name: Name) -> Facts:
        """What this node has heard of a lock, for want of something better."""
        space = self.node.membership.spaces.get(os.fsencode(name[0]))
        lock = space.locks.get(os.fsencode(name[1])) if space is not None else None
        blank: Facts = {"domain": name[0], "lock": name[1], "abandoned": None, "claims": {}}
        if space is None or lock is None:
            return blank | {"nodes": [], "members": [], "queue": []}
        members = {
            n: space.members.get(n) == m.incarnation for n, m in lock.view.head.members.items()
        }
        return blank | {
            "nodes": sorted(space.members),
            "members": _members(lock.view.head, members),
            "queue": [
                _wish(w.node, w.mode, w.trying, w.convert)
                for w in ordered(lock.view.wishes.values())
            ],
        }

    def _threads(self) -> list[tuple[str, tuple[int, int]]]:
        """Holders' processes whose waits on other mounts of their hosts are not known yet."""
        found = []
        for lock in self.locks.values():
            for name, claims in lock["claims"].items():
                place = self.nodes[name]["place"]
                for claim in claims["holders"]:
                    if claim["pid"] and (place, claim["thread"]) not in self._asked_for:
                        self._asked_for.add((place, claim["thread"]))
                        found.append((place, (claim["pid"], claim["thread"])))
        return found[: facts.PROCESSES_MAX]

    def _concerned(
        self, names: list[Name], threads: list[tuple[str, tuple[int, int]]]
    ) -> list[str]:
        """The other nodes that have or want one of the locks, or share a host with a holder."""
        wanted: list[str] = []
        for name in names:
            lock = self.locks[name]
            wanted += [m["node"] for m in lock["members"] if m["alive"] and m["level"] != "NL"]
            wanted += [wish["node"] for wish in lock["queue"]]
            # Under owner=file a node's own processes may wait for each other without a wish.
            wanted += [m["node"] for m in lock["members"] if m["alive"]]
        places = {place for place, _ in threads}
        wanted += [name for name, kv in self._records.items() if _place(kv) in places]
        own = self.node.membership.name
        known = set(self._records) - set(self.silent) - {own}
        return [name for name in dict.fromkeys(wanted) if name in known]

    async def _ask(self, names: list[str], question: Facts) -> Answers:
        answered: asyncio.Future[Answers | DlmfsError] = self.node.loop.create_future()

        def done(result: Answers | DlmfsError) -> None:
            if not answered.done():
                answered.set_result(result)

        asked = {name: self._records[name].create_revision for name in names}
        self.node.membership.questions.ask(asked, question, done)
        try:
            async with asyncio.timeout(PATIENCE_S + STORE_S):
                result = await answered
        except TimeoutError:
            return dict.fromkeys(names)
        if isinstance(result, DlmfsError):
            return {name: {"error": str(result)} for name in names}
        return result

    async def _take(self, name: str, answer: Facts | None) -> None:
        if answer is None:
            self.silent[name] = await _silence(self.node, self._records[name])
            return
        if "gone" in answer or "error" in answer:
            gone = _unheard("gone", "it has just left")
            error = _unheard("refused", f"it cannot say: {answer.get('error')}")
            self.silent[name] = gone if "gone" in answer else error
            return
        with contextlib.suppress(
            KeyError, TypeError
        ):  # of another version: as much as we understand
            for lock in answer["locks"]:
                self.locks[lock["domain"], lock["lock"]]["claims"][name] = lock
            for row in answer["waits"]:
                self.waits[name, row["pid"], row["claim"]["id"]] = {"node": name, **row}
        self.nodes[name] = {k: v for k, v in answer.items() if k not in ("locks", "waits")}

    # -- what follows from it ---------------------------------------------------------------------

    def open_names(self) -> list[Name]:
        """Locks that holders wait for and that are not known yet."""
        names = [(row["domain"], row["lock"]) for row in self.waits.values()]
        return [name for name in dict.fromkeys(names) if name not in self.locks]

    @property
    def is_nowhere(self) -> bool:
        """Whether no node is in the first lock's domain, nor ever was."""
        first = next(iter(self.locks.values()))
        return not first["nodes"] and not first["members"]


# -- what the store says ------------------------------------------------------------------------------


def _members(head: Head, alive: dict[str, bool]) -> list[Facts]:
    return [
        {
            "node": name,
            "level": member.level.name,
            "token": member.revision << TOKEN_SHIFT,
            "alive": alive[name],
        }
        for name, member in sorted(head.members.items())
    ]


def _wish(node: str, mode: Mode, trying: bool, convert: bool) -> Facts:
    return {"node": node, "mode": mode.name, "try": trying, "convert": convert}


def _stored(name: Name, record: object, queue: object, members: object) -> Facts:
    """A lock as its records tell it."""
    assert record is None or isinstance(record, KeyValue)
    assert isinstance(queue, tuple)
    assert isinstance(members, tuple)
    keys = Keys(os.fsencode(name[0]), "")
    head = decode_head(record) if record is not None else Head({})
    born = {kv.key[len(keys.members) :].decode(): kv.create_revision for kv in members}
    alive = {n: born.get(n) == m.incarnation for n, m in head.members.items()}
    wishes = ordered(decode_wish(kv, keys.split_wish(kv.key)[1]) for kv in queue)
    mark = head.abandoned
    return {
        "domain": name[0],
        "lock": name[1],
        "nodes": sorted(born),
        "members": _members(head, alive),
        "queue": [_wish(w.node, w.mode, w.trying, w.convert) for w in wishes],
        "abandoned": mark and {"node": mark.node, "token": mark.revision << TOKEN_SHIFT},
        "claims": {},
    }


# -- who does not answer ------------------------------------------------------------------------------


def _facts_of(kv: KeyValue) -> Facts:
    with contextlib.suppress(ValueError):
        found = json.loads(kv.value)
        if isinstance(found, dict):
            return found
    return {}


def _place(kv: KeyValue) -> str:
    found = _facts_of(kv)
    return f"{found.get('boot')}/{found.get('pidns')}"


def _unheard(why_not: str, says: str) -> Facts:
    return {"host": None, "pid": None, "left_s": None, "why": why_not, "says": says}


async def _silence(node: Node, kv: KeyValue) -> Facts:
    """What can be known of a node that does not answer: `why` in a word and what it `says` in more, its
    daemon's `host` and `pid`, and `left_s`, the seconds until its lease ends if it is not renewed
    (None: it has none that can)."""
    found = _facts_of(kv)
    left_s = await lease_left(node, kv.lease)
    told = {"host": found.get("host"), "pid": found.get("pid"), "left_s": left_s}
    pid, ttl_s = told["pid"], float(found.get("ttl") or 0)
    if identity.is_over(found):
        return told | {"why": "dead", "says": f"its daemon (pid {pid}) is dead"}
    state = identity.state_here(found)
    if state is not None and state in "Tt":
        return told | {"why": "stopped", "says": f"its daemon (pid {pid}) is stopped"}
    if left_s is not None and left_s < ttl_s * STALE:
        return told | {
            "why": "unreachable",
            "says": f"it has not renewed its lease for {ttl_s - left_s:.0f} s: dead, stopped or cut off",
        }
    if state is not None:
        return told | {"why": "busy", "says": f"its daemon (pid {pid}) runs, but does not answer"}
    return told | {"why": "silent", "says": "it does not answer: stopped, or of an older version?"}


STALE: Final = 0.7
"""A living node renews its lease before less than this part of it is left."""


async def lease_left(node: Node, lease: int) -> float | None:
    """Seconds until the lease ends if nobody renews it; None if it cannot, or it is not known."""
    answer: asyncio.Future[float | DlmfsError | None] = node.loop.create_future()

    def done(result: float | DlmfsError | None) -> None:
        if not answer.done():
            answer.set_result(result)

    node.store.lease_left(lease, done)
    try:
        async with asyncio.timeout(STORE_S):
            result = await answer
    except TimeoutError:
        return None
    return None if isinstance(result, DlmfsError) else result
