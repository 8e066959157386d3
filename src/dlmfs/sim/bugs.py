"""The list of planted bugs (see `planted`): what each breaks, and within how many seeds it is caught.

Most are the simpler rules that the design was warned of (protocol-traps); some are faults that the
simulation found in this product, put back.
"""

from __future__ import annotations

from typing import Final

from dlmfs.sim import bugs_records
from dlmfs.sim.bugs_ends import ENDS
from dlmfs.sim.bugs_restore import RESTORES
from dlmfs.sim.bugs_unused import UNUSED
from dlmfs.sim.bugs_values import VALUES
from dlmfs.sim.planted import Planted
from dlmfs.sim.rare import RARE

CHANGES: Final = "engine/changes.py"
LOCK: Final = "engine/lock.py"
WRECK: Final = "engine/wreck.py"
LOCAL: Final = "engine/local.py"
SENDER: Final = "engine/sender.py"
SPACE: Final = "engine/lockspace.py"
HEARING: Final = "engine/hearing.py"
VIEW: Final = "engine/view.py"
QUEUE: Final = "engine/queue.py"
CORE: Final = "core/lockres.py"
CLAIMS: Final = "core/claims.py"
LEASE: Final = "core/lease.py"
MEMBER: Final = "engine/membership.py"
DOMAINS: Final = "engine/domains.py"
OPEN: Final = "fs/openfiles.py"
INTERRUPTS: Final = "fs/interrupts.py"
FILES: Final = "fs/filesystem.py"

BUGS: Final[tuple[Planted, ...]] = (
    Planted(
        "blind-change",
        CHANGES,
        "        unchanged(keys.head(view.name), view.head_revision),\n",
        "",
        100,
        "heads are changed without comparing what they were (rule 5)",
    ),
    Planted(
        "queue-unseen",
        CHANGES,
        "        none_newer(keys.queue(view.name), max(view.wishes_at, view.space.revision)),\n",
        "",
        100,
        "a release does not look whether somebody has queued meanwhile (traps 3)",
    ),
    Planted(
        "dead-wish-granted",
        CHANGES,
        "        *(created_at(keys.wish(view.name, w.node), w.revision) for w in granted),\n",
        "",
        100,
        "a wish is granted without comparing that it still stands (rule 5)",
    ),
    Planted(
        "reader-overtakes",
        CHANGES,
        "direct = not any(w.node != space.node for w in view.wishes.values())",
        "direct = True",
        100,
        "a free mode is taken past those who queue (rule 7)",
    ),
    *VALUES,
    Planted(
        "waiters-sleep",
        HEARING,
        """        lock.wish_gone(node, revision)
""",
        """        lock.wish_gone(node, revision)
        return None
""",
        100,
        "a waiter does not act when the wish ahead of it vanishes (traps 2)",
        first=150,
    ),
    Planted(
        "own-former-self",
        VIEW,
        "if member is None or member.incarnation != self.space.incarnation:",
        "if member is None:",
        100,
        "a former incarnation's place in the head is taken for one's own (rule 14)",
    ),
    Planted(
        "conversions-in-line",
        QUEUE,
        "    return not wish.convert, wish.revision\n",
        "    return False, wish.revision\n",
        100,
        "conversions wait in order of arrival (traps 4)",
    ),
    Planted(
        "mark-forgotten",
        QUEUE,
        "if head.members[node].level is Mode.EX:",
        "if head.members[node].level is Mode.PR:",
        100,
        "a death at EX leaves no mark (promise 4)",
    ),
    Planted(
        "value-forgotten",
        QUEUE,
        "return Head(members, head.lvb, abandoned)",
        "return Head(members, bytes(64), abandoned)",
        100,
        "a member's death empties the value (promise 4)",
    ),
    Planted(
        "grants-past-the-first",
        QUEUE,
        "        elif not wish.trying:\n            break\n",
        "",
        100,
        "the grant pass goes on behind the first that must wait: readers starve writers (rule 6)",
    ),
    Planted(
        "pass-without-bound",
        QUEUE,
        "            if len(granted) == most:\n",
        "            if False:\n",
        100,
        "a grant pass is larger than the store takes in one commit (rule 17; found)",
    ),
    Planted(
        "the-rest-forgotten",
        LOCK,
        "        elif self.cut:\n            granting.rest(self)\n",
        "",
        100,
        "the rest of a grant pass is left to the first who waits, whose daemon may be stopped (rule 17)",
    ),
    Planted(
        "former-self-overwritten",
        QUEUE,
        "if own is not None and own.incarnation != incarnation and own.level is not Mode.NL:",
        "if False:",
        100,
        "a node takes over its dead former self's place, and the mark is lost (found)",
    ),
    Planted(
        "unknown-is-failed",
        SENDER,
        """            for part in parts:
                part.lock.reread()
            self._space.revive()""",
        """            for part in parts:
                part.lock.resume()""",
        100,
        "an unknown outcome is taken for a failure (traps 1)",
        first=100,
    ),
    Planted(
        "no-epoch",
        SENDER,
        "            guard = unchanged(space.keys.mine, space.epoch)\n",
        "            guard = unchanged(space.keys.mine, space.incarnation)._replace(field='create')\n",
        100,
        "transactions are not bound to an epoch: a late one still applies (traps 1)",
        first=100,
    ),
    Planted(
        "no-guard",
        SENDER,
        "txn = Txn((guard,), tuple(p.txn for p in parts), (Get(space.keys.mine),))",
        "txn = Txn((), tuple(p.txn for p in parts), (Get(space.keys.mine),))",
        100,
        "transactions of a node that is out of the domain still apply (rule 2)",
        first=100,
    ),
    Planted(
        "gap-ignored",
        SPACE,
        """            self._watch, self._relisting = None, False
            self.revive()
            return""",
        """            self._watch, self._relisting = None, False
            return""",
        100,
        "a watch that lost events is not begun anew",
    ),
    Planted(
        "stale-incarnation",
        SPACE,
        "return incarnation <= self.revision and self.members.get(node) != incarnation",
        "return incarnation <= self.revision and node not in self.members",
        100,
        "a member's place lives on while a later incarnation of its node does (rule 14)",
    ),
    Planted(
        "longer-lease",
        MEMBER,
        "self.store.open_session(self.name, self.config.ttl_s, self",
        "self.store.open_session(self.name, 2 * self.config.ttl_s, self",
        100,
        "a dead node's locks come free later than a lease time and 2 s (promise 5)",
    ),
    Planted(
        "late-burial",
        HEARING,
        "            lock.member_gone()\n",
        "            space.loop.call_later(space.timing.ttl_s, lock.member_gone)\n",
        100,
        "who waits looks after a death, but not at once (promise 5)",
    ),
    Planted(
        "two-joins",
        DOMAINS,
        "            former.give_up_joining()\n",
        "            pass\n",
        100,
        "two joins of one domain take each other's membership away (found)",
    ),
    Planted(
        "no-fence",
        MEMBER,
        "if state is LeaseState.FENCED:",
        "if state is None:",
        100,
        "a node serves until the store tells it that its lease is over (promise 3)",
    ),
    Planted(
        "fence-by-the-wrong-clock",
        MEMBER,
        "state = lease_state(self.timing, session.renewed_at, self.clock())",
        "state = lease_state(self.timing, session.renewed_at, self.loop.time())",
        100,
        "suspended time does not count towards the deadline",
        first=350,
    ),
    Planted(
        "late-fence",
        "timing.py",
        "return self.ttl_s * 0.67",
        "return self.ttl_s * 0.98",
        100,
        "the deadline leaves no room for clock rates",
        first=100,
    ),
    Planted(
        "two-members",
        LEASE,
        "same = term == self.term and connection is not None and connection == self.connection",
        "same = term == self.term",
        100,
        "a renewal counts that one member answered and another confirmed (found)",
        first=1700,
    ),
    Planted(
        "old-token",
        CHANGES,
        """    members[space.node] = Member(space.incarnation, mode, 0)
    head = head._replace(members=members)
    ops""",
        """    own = members.get(space.node)
    members[space.node] = Member(space.incarnation, mode, own.revision if own else 0)
    head = head._replace(members=members)
    ops""",
        100,
        "a take keeps the token of the grant before (promise 2)",
    ),
    Planted(
        "one-token-for-two",
        CLAIMS,
        "self._counter += exclusive or self._last_exclusive",
        "self._counter += 0",
        100,
        "under holder=file two exclusive holders have one token (rule 12)",
    ),
    Planted(
        "kin-waits",
        CORE,
        """        elif claim.kin:
            return True
        return not self._blocked(claim)""",
        """        return not self._blocked(claim)""",
        100,
        "a process that holds the lock waits for itself behind another node (traps 5)",
    ),
    Planted(
        "no-barrier",
        CORE,
        "            and claim.seq >= self._barrier\n",
        "            and claim.seq > 10 * self._barrier\n",
        100,
        "local programs pass a wish that came before them (promise 5)",
    ),
    Planted(
        "readers-slip-through",
        CORE,
        """        if to is Mode.NL:
            self._barrier = None""",
        """        if True:
            self._barrier = None""",
        100,
        "at a hand-over to readers, later local readers pass a queued writer (found)",
        first=400,
    ),
    Planted(
        "one-notice-for-all",
        CORE,
        """            for claim in self.holders.values():
                self._out.append(Notify(claim))
        self._notified""",
        """            for claim in list(self.holders.values())[:1]:
                self._out.append(Notify(claim))
        self._notified""",
        100,
        "only one of several holders hears that the lock is wanted",
    ),
    Planted(
        "lost-notice",
        CORE,
        "        self._notified = contended",
        "        self._notified = self._notified or contended",
        100,
        "who was told once that somebody waits is never told again",
    ),
    Planted(
        "keeps-what-it-sent-away",
        CORE,
        """        self.level = to
        self.phase = Phase.DROPPING""",
        """        self.phase = Phase.DROPPING""",
        100,
        "a level is believed in until its give-up is confirmed (rule 5)",
    ),
    Planted(
        "broken-lock-served-on",
        "engine/contained.py",
        "            self.wreck(error)\n",
        "            del error\n",
        100,
        "an exception in one lock's state is passed over, and the lock served on",
    ),
    Planted(
        "broken-lock-stays-in-its-head",
        CHANGES,
        "members = {**head.members, space.node: mine._replace(level=Mode.NL)}",
        "members = dict(head.members)",
        100,
        "a lock that broke on a node stays in its head at the level that it had there",
    ),
    Planted(
        "broken-lock-given-away-at-once",
        WRECK,
        "wait = max(space.lock_delay_s, space.grace_s if left.holders else 0.0)",
        "wait = 0.0",
        100,
        "who held a lock that broke has no time to close before others have it",
    ),
    Planted(
        "broken-lock-may-still-send",
        WRECK,
        "        space.revive()\n",
        "        heir.resume()\n",
        100,
        "what a lock that broke had sent still applies: no new epoch (rule 4)",
        first=1700,
    ),
    Planted(
        "kinship-of-the-gone",
        LOCAL,
        "        if claim.stage is Stage.WAITING and claim.kin is None:\n",
        "        if True:\n",
        100,
        "the answer to whose process a waiter is comes when it waits no more",
    ),
    Planted(
        "patient-trylock",
        LOCK,
        "            self.local.time_try()\n",
        "            pass\n",
        100,
        "a trylock waits for a silent holder (traps 13)",
    ),
    Planted(
        "two-converters",
        VIEW,
        "if wish is None or not wish.convert:",
        "if True:",
        100,
        "two processes that hold PR and want EX wait for each other (rule 9)",
    ),
    Planted(
        "unasked-clock",
        FILES,
        "self.serving = self.expire = domains.serving",
        "self.serving = self.expire = lambda: True",
        100,
        "operations are served without a look at the clock: only a timer fences (promise 3)",
    ),
    Planted(
        "place-kept-for-ever",
        OPEN,
        """        if handle.stage is Stage.HELD:
            handle.lock.close(handle)
        elif handle.stage is Stage.WAITING:""",
        """        if handle.stage is Stage.WAITING:""",
        100,
        "what was granted while its opener was away is never closed",
    ),
    Planted(
        "looked-at-once",
        INTERRUPTS,
        "            self._look_at(_Look(now + FIRST_S, unique, now, FIRST_S))\n",
        "",
        100,
        "who was stopped while it waited can be neither signalled nor killed afterwards (promise 7)",
    ),
    Planted(
        "no-patience",
        INTERRUPTS,
        "PATIENCE_S: Final = 1.0",
        "PATIENCE_S: Final = 0.0",
        100,
        "a write fails with EINTR though the store is well (found)",
    ),
    Planted(
        "stop-ends-the-wait",
        OPEN,
        "        if cause is Cause.NOTHING:\n            return False\n",
        "",
        100,
        "a stop ends a waiting open with EINTR (found)",
    ),
    Planted(
        "granted-to-the-dead",
        OPEN,
        """            # release this handle (fuse-notes 2).
            self._close(handle)""",
        """            # release this handle (fuse-notes 2).
            pass""",
        100,
        "an open whose process was killed in the same instant stays open",
        first=200,
    ),
    *ENDS,
    *RESTORES,
    *UNUSED,
    *bugs_records.BUGS,
)


def by_name(name: str) -> Planted | None:
    return next((bug for bug in (*BUGS, *RARE) if bug.name == name), None)
