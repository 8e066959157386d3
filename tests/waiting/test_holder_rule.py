"""Who is an rule: the node (`holder=node`, as dlmfs.txt has it) or each open file (`holder=file`).

Which processes exclude each other, which are served although others wait (engine rule 11),
conversions and EDEADLK (rule 9), and the order of local and remote waiters under both.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlmfs.core.events import Ask, Claim, Fail, Grant, Identify, Stage
from dlmfs.core.lockres import Lockres
from dlmfs.model import HolderRule, Mode
from tests.fs.nodes import DLMFS, PATIENCE_S, Nodes
from tests.waiting.agents import (
    EX,
    PR,
    TRY,
    Agent,
    holding,
    info,
    until,
    waiting,
    wanting,
    wished,
)
from tests.waiting.conftest import Cluster, MakeAgent

pytestmark = pytest.mark.fuse

MODES = {"PR": PR, "EX": EX}


def remote_waits(who: Agent, name: str, at: Path, flags: int, holder: Path) -> Agent:
    """`who` waits at a node for what another has, and the holder's node knows of it."""
    before = len(wanting(holder))
    who.waits(name, at, flags)
    until(lambda: len(wanting(holder)) > before, "the holder's node knows of the wish")
    return who


def refused(who: Agent, path: Path, flags: int) -> int:
    who.start("try", path, flags | TRY)
    return who.fails("try")


# -- holder=node: the processes of a node share its lock -----------------------------------------


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("how", [0, TRY], ids=["wait", "try"])
def test_the_processes_of_a_node_do_not_exclude_each_other(
    cluster: Cluster, agent: MakeAgent, first: str, second: str, how: int
) -> None:
    """In any mix of modes, as in the kernel (kernel-behaviour, "several opens on one node")."""
    (path,) = cluster.lock("node", "a")
    one, two = agent(), agent()
    one.opens("1", path, MODES[first])
    two.opens("2", path, MODES[second] | how)
    assert sorted(holding(path)) == sorted([one.pid, two.pid])


def test_another_node_waits_for_the_last_of_them(cluster: Cluster, agent: MakeAgent) -> None:
    here, there = cluster.lock("node", "ab")
    locals_ = [agent() for _ in range(3)]
    for one in locals_:
        one.opens("x", here, EX)
    remote = remote_waits(agent(), "r", there, EX, here)
    tokens = []
    for n, one in enumerate(locals_):
        assert waiting(there) == [remote.pid]
        assert refused(agent(), there, EX) == errno.ETXTBSY
        tokens.append(one.tokens["x"])
        one.close("x")
        assert len(holding(here)) == 2 - n
    assert remote.held("r") > max(tokens)


def test_a_reader_remains_when_the_writer_of_its_node_closes(
    cluster: Cluster, agent: MakeAgent
) -> None:
    """The node comes down to what is still in use: readers elsewhere are let in, writers are not."""
    here, there = cluster.lock("node", "ab")
    writer, reader, other = agent(), agent(), agent()
    writer.opens("w", here, EX)
    reader.opens("r", here, PR)
    remote_waits(other, "o", there, PR, here)
    writer.close("w")
    other.held("o")
    assert refused(agent(), there, EX) == errno.ETXTBSY
    reader.tell("read", "r")
    assert reader.expect("read", "r") == ""


# -- a process that holds the lock does not wait for itself ---------------------------------------


@pytest.mark.parametrize("what", ["open", "thread", "heir", "child"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["node", "file"])
def test_a_holder_is_served_at_once_although_others_wait(
    cluster: Cluster, agent: MakeAgent, rule: str, mode: str, what: str
) -> None:
    """The thread itself, another one of its process, a child that inherited the descriptor, and one
    that closed it (its parent may be waiting for it). A stranger waits behind the remote wish. With
    holder=file only for readers (rule 11)."""
    here, there = cluster.lock(rule, "ab")
    holder, stranger = agent(), agent()
    holder.opens("h", here, PR)
    remote = remote_waits(agent(), "r", there, EX, here)
    stranger.waits("s", here, PR)
    if mode == "EX" and rule == "file":
        assert refused(holder, here, EX) == errno.ETXTBSY
    else:
        holder.opens("again", here, MODES[mode], what=what)
    assert waiting(here) == [stranger.pid]
    if what in ("open", "thread") and (mode, rule) != ("EX", "file"):
        holder.close("again")
    holder.close("h")
    token = remote.held("r")
    remote.close("r")
    assert stranger.held("s") > token


def test_a_stranger_waits_behind_another_node(cluster: Cluster, agent: MakeAgent) -> None:
    """Although its node holds the lock: first come, first served. It gets its turn after."""
    here, there = cluster.lock("node", "ab")
    holder, stranger = agent(), agent()
    holder.opens("h", here, EX)
    remote = remote_waits(agent(), "r", there, EX, here)
    assert refused(stranger, here, PR) == errno.ETXTBSY
    stranger.waits("s", here, EX)
    holder.close("h")
    token = remote.held("r")
    assert stranger.said_nothing()
    remote.close("r")
    assert stranger.held("s") > token


def test_a_reader_beside_a_remote_reader_need_not_wait(cluster: Cluster, agent: MakeAgent) -> None:
    """A wish to read stands in no reader's way, under a writer of the node either."""
    here, there = cluster.lock("node", "ab")
    holder, stranger = agent(), agent()
    holder.opens("h", here, EX)
    remote = remote_waits(agent(), "r", there, PR, here)
    stranger.opens("s", here, PR)
    holder.close("h")
    remote.held("r")


@pytest.mark.root
def test_a_process_that_cannot_be_told_waits_as_in_the_kernel(
    nodes: Nodes, agent: MakeAgent
) -> None:
    """Seen from daemons in a pid namespace of their own, we have no number: they cannot know that the
    opener holds the lock already, so the opener waits behind the other node (and for itself, until
    it is interrupted or closes)."""
    where, there = nodes.folder / "a", nodes.folder / "b"
    for mount in (where, there):
        mount.mkdir()
        nodes.mounts.append(mount)
    source = f"local:{nodes.state}"
    script = 'm=$1 s=$2 a=$3 b=$4; "$m" "$5" mount "$s" "$b" -o node=b && '
    script += 'exec "$m" "$5" mount "$s" "$a" -o node=a -f'
    words = [DLMFS[0], source, str(where), str(there), *DLMFS[1:]]
    unshare = ["unshare", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", script, "sh"]
    init = subprocess.Popen([*unshare, *words], stdout=subprocess.DEVNULL)
    nodes.children.append(init)
    until(lambda: os.path.ismount(where) or init.poll() is not None, "the mount answers")
    assert init.poll() is None
    for mount in (where, there):
        (mount / "dom").mkdir()
    here, other = where / "dom/x", there / "dom/x"
    holder = agent()
    holder.opens("h", here, PR)
    assert holding(here) == [0]
    remote = agent()
    remote.start("r", other, EX)
    until(lambda: wanting(here) == ["b"], "the other node's wish is known")
    assert refused(holder, here, PR) == errno.ETXTBSY
    holder.start("again", here, PR, what="thread")
    until(lambda: waiting(here) == [0], "it waits for itself")
    holder.close("h")
    token = remote.held("r")
    remote.close("r")
    assert holder.held("again") > token


# -- conversions ----------------------------------------------------------------------------------


def test_a_reader_that_is_alone_gets_more_at_once(cluster: Cluster, agent: MakeAgent) -> None:
    here, _ = cluster.lock("node", "ab")
    reader = agent()
    token = reader.opens("r", here, PR)
    assert reader.opens("w", here, EX) > token
    reader.close("w")
    reader.tell("read", "r")
    assert reader.expect("read", "r") == ""


def test_a_conversion_waits_for_the_other_readers_and_keeps_what_it_has(
    cluster: Cluster, agent: MakeAgent
) -> None:
    here, there = cluster.lock("node", "ab")
    mine, theirs = agent(), agent()
    mine.opens("r", here, PR)
    theirs.opens("r", there, PR)
    mine.waits("w", here, EX, what="thread")
    # It goes on reading while it waits; nobody else may write.
    mine.tell("read", "r")
    assert mine.expect("read", "r") == ""
    assert refused(agent(), there, EX) == errno.ETXTBSY
    theirs.close("r")
    assert mine.held("w") > mine.tokens["r"]


def test_a_conversion_goes_before_plain_wishes(cluster: Cluster, agent: MakeAgent) -> None:
    """In order of arrival each would wait for the other (protocol-traps 4)."""
    first, second, third = cluster.lock("node", "abc")
    mine, theirs, plain = agent(), agent(), agent()
    mine.opens("r", first, PR)
    theirs.opens("r", second, PR)
    remote_waits(plain, "w", third, EX, first)
    mine.waits("w", first, EX, what="thread")
    until(lambda: wished(first) == ["a", "c"], "the conversion stands before the other")
    theirs.close("r")
    token = mine.held("w")
    assert plain.said_nothing()
    mine.close("w")
    mine.close("r")
    assert plain.held("w") > token


def test_of_two_conversions_the_later_gets_edeadlk(cluster: Cluster, agent: MakeAgent) -> None:
    """Each would wait for the other's PR. The later one keeps its PR, and can close it."""
    here, there = cluster.lock("node", "ab")
    first, later = agent(), agent()
    first.opens("r", here, PR)
    token = later.opens("r", there, PR)
    first.waits("w", here, EX, what="thread")
    until(lambda: wanting(there) == ["a"], "the other node knows of the first conversion")
    later.start("w", there, EX)
    assert later.fails("w") == errno.EDEADLK
    assert holding(there) == [later.pid]
    later.tell("read", "r")
    assert later.expect("read", "r") == ""
    assert later.tokens["r"] == token
    assert first.said_nothing()
    later.close("r")
    assert first.held("w") > token


def test_edeadlk_is_only_for_who_holds_the_lock_itself(cluster: Cluster, agent: MakeAgent) -> None:
    """Another process of the later node, which holds nothing, waits on and is granted in the end."""
    here, there = cluster.lock("node", "ab")
    first, reader, writer = agent(), agent(), agent()
    first.opens("r", here, PR)
    reader.opens("r", there, PR)
    first.waits("w", here, EX, what="thread")
    until(lambda: wanting(there) == ["a"], "the other node knows of the first conversion")
    writer.waits("w", there, EX)
    reader.close("r")
    token = first.held("w")
    assert writer.said_nothing()
    first.close("w")
    first.close("r")
    assert writer.held("w") > token


def test_edeadlk_is_not_for_who_has_closed_its_shared_lock_meanwhile() -> None:
    """Another thread closes it while the conversion is on its way; or its place was kept after a
    signal, and the process closed before it came back. It holds nothing now, so it waits on."""
    res = Lockres(HolderRule.NODE)
    reader, writer = Claim(1, Mode.PR, pid=5), Claim(2, Mode.EX, pid=5)
    assert res.open(reader) == [Ask(Mode.PR, trying=False, convert=False)]
    assert res.granted(Mode.PR, 1) == [Grant(reader)]
    assert res.open(writer) == [Identify(writer)]
    assert res.identified(writer, kin=True) == [Ask(Mode.EX, trying=False, convert=True)]
    res.wanted(Mode.EX, Mode.EX, Mode.NL)
    res.close(reader)
    assert Fail(writer, errno.EDEADLK) not in res.refused(errno.EDEADLK)
    assert writer.stage is Stage.WAITING


def test_a_cached_shared_lock_is_no_conversion(cluster: Cluster, agent: MakeAgent) -> None:
    """Nobody gets EDEADLK for a lock that nobody uses (protocol-traps 6)."""
    here, there = cluster.lock("node", "ab")
    one, two, guard = agent(), agent(), agent()
    third = cluster.mount("c", "node") / "dom" / here.name
    for who, path in ((one, here), (two, there)):
        who.opens("r", path, PR)
        who.close("r")
    # A reader elsewhere makes both wait, so that their wishes do meet.
    guard.opens("g", third, PR)
    one.waits("w", here, EX)
    two.waits("w", there, EX)
    until(lambda: wished(third) == ["a", "b"], "both wish")
    guard.close("g")
    token = one.held("w")
    one.close("w")
    assert two.held("w") > token


def test_a_trylock_conversion_is_refused_and_leaves_what_was_there(
    cluster: Cluster, agent: MakeAgent
) -> None:
    here, there = cluster.lock("node", "ab")
    mine, theirs = agent(), agent()
    token = mine.opens("r", here, PR)
    theirs.opens("r", there, PR)
    assert refused(mine, here, EX) == errno.ETXTBSY
    assert (holding(here), info(here)["token"]) == ([mine.pid], token)
    until(lambda: wished(here) == [], "the refused wish is gone")
    theirs.close("r")
    assert mine.opens("w", here, EX | TRY) > token


# -- holder=file: each open file is an rule -------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [("PR", "PR", True), ("PR", "EX", False), ("EX", "PR", False), ("EX", "EX", False)],
)
@pytest.mark.parametrize("places", ["aa", "ab"], ids=["local", "remote"])
@pytest.mark.parametrize("same", [False, True], ids=["two", "same"])
def test_open_files_exclude_each_other(
    cluster: Cluster,
    agent: MakeAgent,
    first: str,
    second: str,
    *,
    together: bool,
    places: str,
    same: bool,
) -> None:
    """On one node as between two, in one process as in two: as with flock(2)."""
    here, there = cluster.lock("file", places)
    one = agent()
    two = one if same else agent()
    token = one.opens("1", here, MODES[first])
    if together:
        two.opens("2", there, MODES[second])
        return
    assert refused(two, there, MODES[second]) == errno.ETXTBSY
    two.waits("2", there, MODES[second], what="thread")
    one.close("1")
    assert two.held("2") > token


def test_a_process_that_waits_for_itself_can_be_interrupted(
    cluster: Cluster, agent: MakeAgent
) -> None:
    """holder=file: its own second exclusive open waits like any other, and promise 7 holds."""
    (path,) = cluster.lock("file", "a")
    one = agent()
    one.opens("1", path, EX)
    one.waits("2", path, EX)
    one.signal()
    assert one.fails("2") == errno.EINTR
    one.close("1")


def test_dup_and_fork_share_their_open_file(cluster: Cluster, agent: MakeAgent) -> None:
    """The lock belongs to the open file: it ends with the last descriptor of it."""
    (path,) = cluster.lock("file", "a")
    waiter = agent()
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    other = os.dup(fd)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=(fd,),
    )
    try:
        waiter.waits("w", path, EX)
        os.close(fd)
        assert waiting(path) == [waiter.pid]
        os.close(other)
        assert waiting(path) == [waiter.pid]
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(PATIENCE_S)
    waiter.held("w")


def test_both_holder_rules_on_one_lock_space(nodes: Nodes, agent: MakeAgent) -> None:
    """Each node has its own rule; between them only the modes count, and tokens compare."""
    by_node, by_file = nodes.mount("a"), nodes.mount("b", "holder=file")
    for where in (by_node, by_file):
        (where / "dom").mkdir()
    first, second = by_node / "dom/x", by_file / "dom/x"
    two = [agent(), agent()]
    for one in two:
        one.opens("x", first, EX)
    others = [remote_waits(agent(), "x", second, EX, first)]
    others.append(agent().waits("x", second, EX))
    two[0].close("x")
    assert others[0].said_nothing()
    two[1].close("x")
    token = others[0].held("x")
    assert token > max(one.tokens["x"] for one in two)
    assert others[1].said_nothing()
    two[0].waits("y", first, EX)
    others[0].close("x")
    assert others[1].held("x") > token
    others[1].close("x")
    assert two[0].held("y") > others[1].tokens["x"]
