"""Who blocks whom at a lock, followed from node to node: the answer behind `dlmfs why`.

Each round reads the locks in question from the store in one transaction, puts one question to the
nodes concerned, and goes on with the locks that their holders' processes wait for themselves.
Nodes answer each other in full: what of it this asker may know is decided here, by the files of this
node's mount, and a lock that he may not know ends his chain. Layout of the answer: docs/reference.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from dlmfs import facts, inquiry
from dlmfs.engine.questions import ASKED_MAX, Answers
from dlmfs.engine.queue import ordered
from dlmfs.engine.records import NODES, Head, Keys, Wish, decode_head, decode_wish, node_of
from dlmfs.errors import BadState, DlmfsError, UsageError
from dlmfs.model import Mode
from dlmfs.pace import ROW, Pace
from dlmfs.permission import Sight
from dlmfs.store.base import Get, KeyValue, Range, Txn

if TYPE_CHECKING:
    from dlmfs.core.tokens import Tokens
    from dlmfs.node import Node

ROUNDS_MAX: Final = 16
LOCKS_MAX: Final = 64
"""Locks told of: a chain this long is told up to there, and that it goes on."""
OTHERS_ROUNDS_MAX: Final = 4
OTHERS_LOCKS_MAX: Final = 16
"""The same for an ordinary user, for whom the whole cluster works as well."""
Facts = dict[str, Any]
Name = tuple[str, str]
Thread = tuple[str, int, int]
"""Its place (host and pid namespace), its process, itself."""


async def why(node: Node, sight: Sight, domain: str, lock: str) -> Facts:
    """The chain from one lock on. Raises NotPermitted, UsageError for a domain that nobody is in."""
    sight.demand(os.fsencode(domain), os.fsencode(lock))
    search = _Search(node, sight)
    todo: list[Name] = [(domain, lock)]
    rounds_max = ROUNDS_MAX if sight.whole else OTHERS_ROUNDS_MAX
    locks_max = LOCKS_MAX if sight.whole else OTHERS_LOCKS_MAX
    rounds = 0
    while (todo or search.threads()) and rounds < rounds_max and len(search.locks) < locks_max:
        rounds += 1
        await search.round(todo[: facts.LOCKS_MAX])
        todo = search.open_names()
    if search.trouble is None and search.is_nowhere:
        raise UsageError(f"no node is in a domain {domain!r}: mkdir it first")
    await node.look_at_store()
    return {
        "domain": domain,
        "lock": lock,
        "node": node.membership.name,
        "trouble": search.trouble,
        "refused": node.store.describe().get("trouble") if search.trouble is None else None,
        "more": len(todo),
        "hidden": len(search.hidden),
        "nodes": search.nodes
        | {name: {**search.nodes.get(name, {}), "silent": s} for name, s in search.silent.items()},
        "locks": list(search.locks.values()),
        "waits": list(search.waits.values()),
    }


class _Search:
    """What is known so far."""

    def __init__(self, node: Node, sight: Sight) -> None:
        self.node = node
        self.sight = sight
        self.pace = Pace()
        self.place = facts.node_facts(node)["place"]
        self.locks: dict[Name, Facts] = {}
        self.nodes: dict[str, Facts] = {}
        """Those that answered."""
        self.silent: dict[str, Facts] = {}
        """Those that did not, and what is known of them."""
        self.waits: dict[tuple[str, int, int], Facts] = {}
        """By node, process and claim: what the processes at these locks wait for themselves."""
        self.hidden: set[Name] = set()
        """Locks that they wait for and that this asker may not know."""
        self.trouble: str | None = None
        """Why the store could not be read."""
        self._records: dict[str, KeyValue] = {}
        self._asked_for: set[Thread] = set()

    # -- one round ------------------------------------------------------------------------------

    async def round(self, names: list[Name]) -> None:
        """Learn all of these locks."""
        try:
            async with asyncio.timeout(inquiry.STORE_S):
                await self._read(names)
        except (DlmfsError, TimeoutError) as error:
            self.trouble = str(error) or f"it has said nothing for {inquiry.STORE_S:g} s"
            for name in names:
                self.locks[name] = self._from_here(name)
        own = self.node.membership.name
        threads = self.threads()
        self._asked_for.update(threads)
        asked = [] if self.trouble is not None else self._concerned(names, threads)
        question: Facts = {"locks": names, "threads": threads}
        answers: Answers = {own: facts.reply(self.node, question)}
        if asked:
            answers |= await inquiry.ask(self.node, self._records, asked[:ASKED_MAX], question)
        for other in asked[ASKED_MAX:]:
            self.silent[other] = inquiry.unheard(
                "unasked", f"no more than {ASKED_MAX} nodes are asked"
            )
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
            node = node_of(kv.key)
            if node is not None:
                self._records[node] = kv
        for i, name in enumerate(names):
            self.locks[name] = _stored(name, self._tokens, *rest[3 * i : 3 * i + 3])

    @property
    def _tokens(self) -> Tokens:
        return self.node.membership.tokens

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
            "members": _members(lock.view.head, members, self._tokens),
            "queue": [
                _wish(w.node, w.mode, w.trying, w.convert)
                for w in ordered(lock.view.wishes.values())
            ],
        }

    def threads(self) -> list[Thread]:
        """Holders whose waits on other mounts of their hosts have not been asked for."""
        places = [inquiry.place(kv) for kv in self._records.values()]
        found = []
        for lock in self.locks.values():
            for name, claims in lock["claims"].items():
                where = self.nodes[name]["place"]
                for claim in claims["holders"]:
                    thread = (where, claim["pid"], claim["thread"])
                    if claim["pid"] and places.count(where) > 1 and thread not in self._asked_for:
                        found.append(thread)
        return found[: facts.THREADS_MAX]

    def _concerned(self, names: list[Name], threads: list[Thread]) -> list[str]:
        """The other nodes that have or want one of the locks, or share a host with a holder."""
        wanted: list[str] = []
        for name in names:
            lock = self.locks[name]
            wanted += [m["node"] for m in lock["members"] if m["alive"] and m["level"] != "NL"]
            wanted += [wish["node"] for wish in lock["queue"]]
        places = {where for where, _, _ in threads}
        wanted += [name for name, kv in self._records.items() if inquiry.place(kv) in places]
        known = set(self._records) - set(self.silent) - {self.node.membership.name}
        return [name for name in dict.fromkeys(wanted) if name in known]

    async def _take(self, name: str, answer: Facts | None) -> None:
        if name != self.node.membership.name:
            silent = await inquiry.silent(self.node, self._records[name], answer)
            if silent is not None:
                self.silent[name] = silent
                return
        assert answer is not None
        with contextlib.suppress(
            KeyError, TypeError
        ):  # another version's: what we understand of it
            for lock in answer["locks"]:
                self.locks[lock["domain"], lock["lock"]]["claims"][name] = self._seen(lock, answer)
                await self.pace.did(ROW * (1 + len(lock["holders"]) + len(lock["waiters"])))
            for row in answer["waits"]:
                self._wait(name, row, answer)
        self.nodes[name] = {k: v for k, v in answer.items() if k not in ("locks", "waits")}

    def _seen(self, told: Facts, answer: Facts) -> Facts:
        """A lock's claims at a node, for this asker."""
        return told | {
            what: [self._claim(claim, answer) for claim in told[what]]
            for what in ("holders", "waiters")
        }

    def _claim(self, claim: Facts, answer: Facts) -> Facts:
        elsewhere = answer["place"] != self.place
        return self.sight.claim(claim, elsewhere=elsewhere, secret=bool(answer.get("secret")))

    def _wait(self, name: str, row: Facts, answer: Facts) -> None:
        lock = (row["domain"], row["lock"])
        domain, key = map(os.fsencode, lock)
        if lock not in self.locks and not self.sight.lists(domain)(key):
            self.hidden.add(lock)
            return
        claim = self._claim(row["claim"], answer)
        pid = 0 if claim["pid"] != row["claim"]["pid"] else row["pid"]
        self.waits[name, pid, claim["id"]] = {"node": name, **row, "pid": pid, "claim": claim}

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


def _members(head: Head, alive: dict[str, bool], tokens: Tokens) -> list[Facts]:
    return [
        {
            "node": name,
            "level": member.level.name,
            "token": tokens.of(member.revision),
            "alive": alive[name],
        }
        for name, member in sorted(head.members.items())
    ]


def _wish(node: str, mode: Mode, trying: bool, convert: bool) -> Facts:
    return {"node": node, "mode": mode.name, "try": trying, "convert": convert}


def _wishes(keys: Keys, queue: tuple[Any, ...]) -> Iterator[Wish]:
    """Those that can be read: the others are as if they were not there."""
    for kv in queue:
        split = keys.split_wish(kv.key)
        if split is not None:
            with contextlib.suppress(BadState):
                yield decode_wish(kv, split[1])


def _stored(name: Name, tokens: Tokens, record: object, queue: object, members: object) -> Facts:
    """A lock as its records tell it."""
    assert record is None or isinstance(record, KeyValue)
    assert isinstance(queue, tuple)
    assert isinstance(members, tuple)
    keys = Keys(os.fsencode(name[0]), "")
    head = decode_head(record) if record is not None else Head({})
    found = ((keys.split_member(kv.key), kv.create_revision) for kv in members)
    born = {member: incarnation for member, incarnation in found if member is not None}
    alive = {n: born.get(n) == m.incarnation for n, m in head.members.items()}
    wishes = ordered(_wishes(keys, queue))
    mark = head.abandoned
    return {
        "domain": name[0],
        "lock": name[1],
        "nodes": sorted(born),
        "members": _members(head, alive, tokens),
        "queue": [_wish(w.node, w.mode, w.trying, w.convert) for w in wishes],
        "abandoned": mark and {"node": mark.node, "token": tokens.of(mark.revision)},
        "claims": {},
    }
