"""The core against a small oracle: a whole cluster of one lock, in the fewest words.

The oracle is the cluster: it grants what is compatible in the order in which nodes asked. The
cores know nothing of one another but what it tells them. Every rule that a user could see is
checked after every step.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dlmfs.core.claims import COUNTER_MAX
from dlmfs.core.events import (
    POSSIBLE,
    Action,
    Ask,
    Claim,
    Drop,
    Event,
    Fail,
    Grant,
    Identify,
    Notify,
    Phase,
    RefuseTry,
    Stage,
    Withdraw,
)
from dlmfs.core.lockres import Lockres
from dlmfs.model import HolderRule, Mode, compatible

PR, EX, NL = Mode.PR, Mode.EX, Mode.NL


@dataclass
class OracleWish:
    node: int
    mode: Mode
    trying: bool
    convert: bool
    serial: int


@dataclass
class OracleNode:
    res: Lockres
    level: Mode = NL
    """What the cluster believes; never less than what the core serves."""
    inbox: list[tuple[str, int]] = field(default_factory=list)
    told: object = ((NL, NL, NL), ())
    dropping: Drop | None = None


class Cluster(RuleBasedStateMachine):
    """Nodes, claims and an ideal cluster; answers may be delivered late, in order per node."""

    owner = HolderRule.NODE

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[OracleNode] = []
        self.queue: list[OracleWish] = []
        self.revision = 100
        self.claims: dict[int, Claim] = {}
        self.node_of: dict[int, int] = {}
        self.kin: set[int] = set()
        self.last_ex_token = 0
        self.last_token = 0
        self.fh = 0
        self.wishes = 0

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        self.nodes = [OracleNode(Lockres(self.owner)) for _ in range(count)]

    # -- the cluster ----------------------------------------------------------------------

    def carry_out(self, index: int, actions: list[Action]) -> None:
        node = self.nodes[index]
        for action in actions:
            match action:
                case Grant(claim):
                    self.check_grant(index, claim)
                case Fail(claim, reason):
                    assert reason in (errno.ETXTBSY, errno.EDEADLK)
                    assert claim.trying or reason == errno.EDEADLK
                    assert claim.stage is Stage.ENDED
                    del self.claims[claim.fh]
                case Identify(claim):
                    held = any(c.fh in self.kin for c in node.res.holders.values())
                    kin = claim.fh in self.kin and held
                    self.carry_out(index, node.res.identified(claim, kin=kin))
                case Notify(claim):
                    assert claim.stage is Stage.HELD
                case Ask(mode, trying, convert):
                    if not convert and mode > node.level:
                        node.level = NL
                    self.wish(index, mode, trying=trying, convert=convert)
                    self.refuse_second_converter()
                    self.grant_pass()
                    if any(w.node == index for w in self.queue):
                        node.inbox.append(("queued", 0))
                case Withdraw():
                    if any(w.node == index for w in self.queue):
                        self.queue = [w for w in self.queue if w.node != index]
                        node.inbox.append(("refused", 0))
                        self.grant_pass()
                case Drop():
                    node.dropping = action
                    node.inbox.append(("dropped", 0))
                case RefuseTry():
                    for wish in [w for w in self.queue if w.trying and w.node != index]:
                        if not compatible(wish.mode, node.level):
                            self.queue.remove(wish)
                            self.nodes[wish.node].inbox.append(("refused", errno.ETXTBSY))

    def wish(self, index: int, mode: Mode, *, trying: bool, convert: bool) -> None:
        self.wishes += 1
        self.queue.append(OracleWish(index, mode, trying, convert, self.wishes))

    def refuse_second_converter(self) -> None:
        converts = [w for w in self.queue if w.convert]
        for wish in converts[1:]:
            self.queue.remove(wish)
            self.nodes[wish.node].inbox.append(("refused", errno.EDEADLK))

    def grant_pass(self) -> None:
        order = [w for w in self.queue if w.convert] + [w for w in self.queue if not w.convert]
        for wish in order:
            others = [n.level for i, n in enumerate(self.nodes) if i != wish.node]
            if all(compatible(level, wish.mode) for level in others):
                self.queue.remove(wish)
                node = self.nodes[wish.node]
                node.level = wish.mode
                self.revision += 1
                node.inbox.append(("granted", self.revision))
                node.inbox = [m for m in node.inbox if m[0] != "queued"]
            elif not wish.trying:
                break
        self.refuse_hopeless_tries(order)

    def refuse_hopeless_tries(self, order: list[OracleWish]) -> None:
        """A trylock refuses itself behind an incompatible wish (design, engine rule 10)."""
        ahead: list[Mode] = []
        for wish in order:
            if not wish.trying:
                ahead.append(wish.mode)
            elif wish in self.queue and not all(compatible(m, wish.mode) for m in ahead):
                self.queue.remove(wish)
                self.nodes[wish.node].inbox.append(("refused", errno.ETXTBSY))

    def check_grant(self, index: int, claim: Claim) -> None:
        """Promises 1 and 2, at the instant of every grant."""
        node = self.nodes[index]
        assert claim.stage is Stage.HELD
        assert claim.mode <= node.res.level <= node.level
        for other, peer in enumerate(self.nodes):
            if other != index:
                assert compatible(node.res.level, peer.res.level)
        if self.owner is HolderRule.FILE:
            for held in node.res.holders.values():
                assert held is claim or compatible(held.mode, claim.mode)
            floor = self.last_token if claim.mode is EX else self.last_ex_token
            assert claim.token > floor, "a conflicting grant got no larger token"
        else:
            assert claim.token >= self.last_ex_token
        self.last_token = max(self.last_token, claim.token)
        if claim.mode is EX:
            self.last_ex_token = max(self.last_ex_token, claim.token)

    def tell_wanted(self, index: int) -> None:
        node = self.nodes[index]
        order = [w for w in self.queue if w.convert] + [w for w in self.queue if not w.convert]
        others = [w for w in order if w.node != index]
        plain = [w.mode for w in others if not w.trying]
        trying = [w.mode for w in others if w.trying]
        wanted = (plain[0] if plain else NL, max(plain, default=NL), max(trying, default=NL))
        told = (wanted, tuple(w.serial for w in others if w.trying))
        if told != node.told:
            node.told = told
            self.carry_out(index, node.res.wanted(*wanted))

    def deliver(self, index: int) -> bool:
        node = self.nodes[index]
        if not node.inbox:
            return False
        kind, value = node.inbox.pop(0)
        res = node.res
        if kind == "granted":
            self.tell_wanted(index)
            self.carry_out(index, res.granted(node.level, value))
        elif kind == "refused":
            self.carry_out(index, res.refused(value))
        elif kind == "queued":
            if res.phase is Phase.ASKING:
                self.carry_out(index, res.queued())
        else:
            drop = node.dropping
            assert drop is not None
            node.dropping = None
            node.level = drop.to
            if drop.then is not NL:
                self.wish(index, drop.then, trying=False, convert=False)
            self.grant_pass()
            if any(w.node == index for w in self.queue):
                node.inbox.insert(0, ("queued", 0))
            self.carry_out(index, res.dropped())
        return True

    # -- steps ------------------------------------------------------------------------------

    @rule(
        index=st.integers(0, 2),
        mode=st.sampled_from([PR, EX]),
        trying=st.booleans(),
        kin=st.booleans(),
    )
    def open(self, index: int, mode: Mode, trying: bool, kin: bool) -> None:
        index %= len(self.nodes)
        self.fh += 1
        claim = Claim(self.fh, mode, trying=trying, pid=self.fh)
        self.claims[claim.fh] = claim
        self.node_of[claim.fh] = index
        if kin:
            self.kin.add(claim.fh)
        self.carry_out(index, self.nodes[index].res.open(claim))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        fh = data.draw(st.sampled_from(sorted(self.claims)))
        self.end_claim(fh)

    def end_claim(self, fh: int) -> None:
        claim = self.claims.pop(fh)
        index = self.node_of[fh]
        res = self.nodes[index].res
        if claim.stage is Stage.HELD:
            self.carry_out(index, res.close(claim))
        else:
            self.carry_out(index, res.interrupt(claim))

    @rule(index=st.integers(0, 2))
    def message(self, index: int) -> None:
        self.deliver(index % len(self.nodes))

    @rule(index=st.integers(0, 2))
    def notice(self, index: int) -> None:
        self.tell_wanted(index % len(self.nodes))

    @invariant()
    def exclusion(self) -> None:
        levels = [n.res.level for n in self.nodes]
        for i, a in enumerate(levels):
            assert a <= self.nodes[i].level
            for b in levels[i + 1 :]:
                assert compatible(a, b)

    def settle(self) -> None:
        for _ in range(2000):
            moved = False
            for index in range(len(self.nodes)):
                self.tell_wanted(index)
                moved |= self.deliver(index)
            if not moved and not any(node.inbox for node in self.nodes):
                return
        raise AssertionError("the cluster does not come to rest")

    def teardown(self) -> None:
        """Progress: when holders close, everybody who waits is served; nobody is forgotten."""
        self.settle()
        for fh in [f for f, c in self.claims.items() if c.trying and c.stage is Stage.WAITING]:
            raise AssertionError(f"trylock {fh} still waits in a quiet cluster")
        while self.claims:
            held = [f for f, c in self.claims.items() if c.stage is Stage.HELD]
            assert held, f"nobody holds, yet {list(self.claims.values())} wait"
            self.end_claim(held[0])
            self.settle()
        assert not self.queue


class ClusterOfFiles(Cluster):
    owner = HolderRule.FILE


@pytest.mark.parametrize("machine", [Cluster, ClusterOfFiles])
def test_against_the_oracle(machine: type[Cluster]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=400, stateful_step_count=60, deadline=None)
    )


def granted(res: Lockres, actions: list[Action]) -> list[Claim]:
    return [a.claim for a in actions if isinstance(a, Grant)]


def holding(owner: HolderRule, mode: Mode = EX) -> tuple[Lockres, Claim]:
    res = Lockres(owner)
    claim = Claim(1, mode)
    assert res.open(claim) == [Ask(mode, trying=False, convert=False)]
    assert granted(res, res.granted(mode, 7)) == [claim]
    return res, claim


def test_reopening_a_cached_lock_asks_nobody() -> None:
    res, claim = holding(HolderRule.NODE)
    res.close(claim)
    again = Claim(2, EX)
    assert res.open(again) == [Grant(again)]


def test_holder_node_lets_two_programs_hold_it_exclusively() -> None:
    """dlmfs.txt: userspace programs are assumed to handle their own local locking."""
    res, _ = holding(HolderRule.NODE)
    other = Claim(2, EX)
    assert res.open(other) == [Grant(other)]


def test_holder_file_makes_every_open_file_a_holder() -> None:
    res, claim = holding(HolderRule.FILE)
    other = Claim(2, EX)
    assert Grant(other) not in res.open(other)
    assert Grant(other) in res.close(claim)
    assert other.token > claim.token


def test_who_came_before_the_remote_wish_is_served_before_it() -> None:
    res, claim = holding(HolderRule.FILE)
    before, after = Claim(2, EX), Claim(3, EX)
    res.open(before)
    res.wanted(EX, EX, NL)
    res.open(after)
    assert granted(res, res.close(claim)) == [before]
    assert Drop(NL, EX) in res.close(before)
    assert after.stage is Stage.WAITING


def test_a_process_that_holds_the_lock_is_not_put_behind_the_remote_wish() -> None:
    res, _ = holding(HolderRule.NODE)
    res.wanted(EX, EX, NL)
    again = Claim(2, PR, pid=4711)
    assert res.open(again) == [Identify(again)]
    assert res.identified(again, kin=True) == [Grant(again)]


def test_the_holder_is_told_once_when_somebody_waits() -> None:
    res, claim = holding(HolderRule.NODE)
    assert res.wanted(EX, EX, NL) == [Notify(claim)]
    assert res.wanted(PR, EX, NL) == []


def test_a_remote_trylock_never_waits_for_a_user_and_never_for_an_idle_cache() -> None:
    res, claim = holding(HolderRule.NODE)
    assert res.wanted(NL, NL, EX) == [RefuseTry()]
    res.wanted(NL, NL, NL)
    res.close(claim)
    assert res.wanted(NL, NL, EX) == [Drop(NL, NL)]


def test_a_trylock_during_a_hand_over_is_not_refused_by_guess() -> None:
    """Who wanted it has gone: nobody is in the way, and the next request will tell (promise 6)."""
    res, claim = holding(HolderRule.NODE)
    res.close(claim)
    assert res.wanted(PR, PR, NL) == [Drop(PR, NL)]
    res.wanted(NL, NL, NL)
    trying = Claim(2, EX, trying=True)
    assert res.open(trying) == []
    assert res.dropped() == [Ask(EX, trying=True, convert=False)]
    assert trying.stage is Stage.WAITING


def test_an_idle_shared_level_is_given_up_and_a_used_one_converted() -> None:
    res, claim = holding(HolderRule.NODE, PR)
    exclusive = Claim(2, EX)
    assert res.open(exclusive) == [Ask(EX, trying=False, convert=True)]
    assert res.level is PR

    res, claim = holding(HolderRule.NODE, PR)
    res.close(claim)
    assert res.open(Claim(2, EX)) == [Ask(EX, trying=False, convert=False)]
    assert res.level is NL


def test_a_late_grant_that_nobody_wants_is_handed_over_at_once() -> None:
    res = Lockres(HolderRule.NODE)
    claim = Claim(1, EX)
    res.open(claim)
    assert res.interrupt(claim) == [Withdraw()]
    res.wanted(EX, EX, NL)
    assert res.granted(EX, 7) == [Drop(NL, NL)]


def test_lost_lock_fails_waiters_and_wakes_holders() -> None:
    res, claim = holding(HolderRule.FILE)
    waiter = Claim(2, EX)
    res.open(waiter)
    assert set(res.lose(errno.ENOLCK)) == {Fail(waiter, errno.ENOLCK), Notify(claim)}
    assert claim.stage is Stage.ENDED
    assert res.close(claim) == []


def test_tokens_grow_beyond_the_local_counter() -> None:
    """16 bits of counter are used up: a new revision is asked for, in the middle of the queue."""
    res, claim = holding(HolderRule.FILE)
    token = claim.token
    for fh in range(2, COUNTER_MAX + 10):
        res.close(claim)
        claim = Claim(fh, EX)
        actions = res.open(claim)
        if not granted(res, actions):
            assert actions == [Ask(EX, trying=False, convert=False)]
            res.granted(EX, res.revision + 1)
        assert claim.token > token
        token = claim.token


@pytest.mark.parametrize("event", [Event.GRANTED, Event.QUEUED, Event.REFUSED, Event.DROPPED])
def test_an_impossible_event_is_a_broken_invariant(event: Event) -> None:
    res = Lockres(HolderRule.NODE)
    assert Phase.IDLE not in POSSIBLE[event]
    calls = {
        Event.GRANTED: lambda: res.granted(EX, 1),
        Event.QUEUED: res.queued,
        Event.REFUSED: lambda: res.refused(0),
        Event.DROPPED: res.dropped,
    }
    with pytest.raises(AssertionError, match="impossible"):
        calls[event]()
