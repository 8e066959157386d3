"""libo2dlm's calls between two nodes, in a program that knows nothing of this project."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes, dlmfs
from tests.o2dlm.conftest import Begin, Start
from tests.o2dlm.programs import Programs, Run, o2dlm_run
from tests.tools.bench import until

pytestmark = [pytest.mark.fuse, pytest.mark.root]


@pytest.fixture
def pair(nodes: Nodes, start: Start, at: Path, linked: str) -> tuple[Run, Run]:
    """The program on two nodes, in one domain."""
    runs = start(nodes.mount("a"), linked), start(nodes.mount("b"), linked)
    for run in runs:
        assert run.ask(f"init {at} dom") == "ok"
    return runs


def answers(run: Run, line: str) -> bool:
    return run.ask(line) == "ok"


def test_locks(pair: tuple[Run, Run]) -> None:
    """Exclusive keeps the other out, trylock says so, a waiter gets it, shared is shared."""
    one, other = pair
    assert one.ask("lock x ex") == "ok"
    assert other.ask("lock x ex try") == "TRYLOCK_FAILED"
    assert other.ask("lock x pr try") == "TRYLOCK_FAILED"
    other.tell("lock x ex")
    assert other.heard(0.3) is None
    assert one.ask("unlock x") == "ok"
    assert other.heard() == "ok"
    assert one.ask("lock x pr try") == "TRYLOCK_FAILED"
    assert other.ask("unlock x") == "ok"
    # close(2) tells its daemon later (fuse-notes 3): until then a trylock elsewhere is refused.
    for run in pair:
        until("it is idle elsewhere", partial(answers, run, "lock x pr try"))
    assert [run.ask("unlock x") for run in pair] == ["ok", "ok"]
    until("it is handed over", partial(answers, one, "lock x ex try"))


def test_no_signal_makes_a_write_fail(nodes: Nodes, start: Start, at: Path) -> None:
    """The library does not write again after EINTR, and the kernel's dlmfs gives it none."""
    run = start(nodes.mount("a"))
    assert run.ask(f"init {at} dom") == "ok"
    assert run.ask("lock x ex") == "ok"
    assert run.ask("storm x") == "ok 0"


def test_value(pair: tuple[Run, Run]) -> None:
    """64 bytes, zeros at first, travel with the lock; a shared holder cannot write them."""
    one, other = pair
    assert one.ask("lock x ex") == "ok"
    assert one.ask("read x") == "ok 64 "
    assert one.ask("write x hello") == "ok"
    assert one.ask("unlock x") == "ok"
    assert other.ask("lock x pr") == "ok"
    assert other.ask("read x") == "ok 64 hello"
    assert other.ask("write x bye") == "LVB_WRITE"


def test_a_value_whose_writer_died(nodes: Nodes, start: Start, at: Path) -> None:
    """Its node dies having the lock exclusively, before it has written the next version: by default the
    last one is read as any other, with dead-value=invalid the library says that it is none."""
    writer = nodes.mount("a", "lock-delay=0")
    one = start(writer)
    unsure = start(nodes.mount("b", "lock-delay=0", "dead-value=invalid"))
    believer = start(nodes.mount("c", "lock-delay=0", "dead-value=keep"))
    for run in (one, unsure, believer):
        assert run.ask(f"init {at} dom") == "ok"
    for line in ("lock x ex", "write x version-1"):
        assert one.ask(line) == "ok"
    nodes.kill(writer)
    for run, says in ((believer, "ok 64 version-1"), (unsure, "LVB_INVALID")):
        assert run.ask("lock x pr") == "ok"
        assert run.ask("read x") == says
        assert run.ask("unlock x") == "ok"
    assert unsure.ask("lock x ex") == "ok"
    assert unsure.ask("write x version-2") == "ok"
    assert unsure.ask("read x") == "ok 64 version-2"


def test_notices(pair: tuple[Run, Run]) -> None:
    """lock_with_bast, poll, process_bast: none while nobody waits, one when the other does."""
    one, other = pair
    assert one.ask("caps") == "ok 1 1"
    assert one.ask("bast x ex") == "ok"
    assert one.ask("poll 0") == "ok 0"
    other.tell("lock x ex")
    assert one.ask(f"poll {int(PATIENCE_S * 1000)}") == "ok 1"
    assert one.ask("unlock x") == "ok"
    assert other.heard() == "ok"


def test_drop_and_destroy(pair: tuple[Run, Run], nodes: Nodes) -> None:
    """A lock in use is busy; an idle one is dropped; the last to leave removes the domain."""
    one, other = pair
    assert one.ask("lock x ex") == "ok"
    assert one.ask("drop x") == "BUSY_LOCK"
    assert one.ask("unlock x") == "ok"
    assert one.ask("drop x") == "ok"
    assert one.ask("drop x") == "UNLINK"
    assert one.ask("lock y ex") == "ok"
    assert one.ask("destroy") == "ok"
    assert not (nodes.folder / "a/dom").exists()
    assert other.ask("lock y ex try") == "ok"
    assert other.ask("destroy") == "ok"
    assert not (nodes.folder / "b/dom").exists()
    assert one.end() == other.end() == (0, "")


def test_a_lock_that_another_process_of_the_node_has_is_busy(
    start: Start, nodes: Nodes, at: Path
) -> None:
    """drop_lock of it, and destroy, which leaves it and the domain alone."""
    where = nodes.mount("a")
    one, other = start(where), start(where)
    for run in (one, other):
        assert run.ask(f"init {at} dom") == "ok"
    assert one.ask("lock x pr") == "ok"
    assert other.ask("drop x") == "BUSY_LOCK"
    assert other.ask("destroy") == "ok"
    assert one.ask("read x") == "ok 64 "
    assert one.ask("destroy") == "ok"
    assert not (where / "dom").exists()


def test_error_codes(start: Start, nodes: Nodes, at: Path, linked: str) -> None:
    run = start(nodes.mount("a"), linked)
    assert run.ask("init /nosuch dom") == "OPEN_DLM_DIR"
    assert run.ask("init /etc/passwd dom") == "NO_FS_DIR"
    assert run.ask("init / dom") == "NO_FS"
    assert run.ask(f"init {at} {'d' * 64}") == "DOMAIN_CREATE"
    assert run.ask(f"init {at} {'d' * 255}") == "NAME_TOO_LONG"
    (at / "file").touch()
    assert run.ask(f"init {at} dom") == "ok"
    assert run.ask("lock .x ex") == "INVALID_LOCK_NAME"
    assert run.ask("lock $x ex") == "LOCKING"
    assert run.ask(f"lock {'x' * 32} ex") == "INVALID_LOCK_NAME"
    assert run.ask("unlock x") == "UNKNOWN_LOCK"
    assert run.ask("read x") == "UNKNOWN_LOCK"
    assert run.ask("lock x ex") == "ok"
    assert run.ask("lock x pr") == "RECURSIVE_LOCK"


def test_children_and_threads(start: Start, nodes: Nodes, at: Path, linked: str) -> None:
    """The filter is theirs too: a child and a thread see the kernel's dlmfs, and join."""
    run = start(nodes.mount("a"), linked)
    for how in ("fork", "thread"):
        assert run.ask(f"{how} statfs {at}").startswith("ok 76a9f425 ")
        assert run.ask(f"{how} init {at} {how}") == "ok"


def test_the_example_counts_on_two_nodes(
    begin: Begin, nodes: Nodes, programs: Programs, at: Path
) -> None:
    """examples/o2dlm/counter.c: no count is lost, whoever counts where at once."""
    program = programs.path("counter")
    a, b = nodes.pair()
    keeper = nodes.mount("c")
    (keeper / "dom").mkdir()
    (keeper / "dom/orders").touch()
    counts = []
    for _ in range(3):
        runs = [
            begin(o2dlm_run("-m", where, "--at", at, program, at, "dom", "orders", "3"))
            for where in (a, b)
        ]
        for run in runs:
            code, out, err = run.output()
            assert (code, err) == (0, "")
            counts.append(int(out))
    assert sorted(counts) == [3, 6, 9, 12, 15, 18]


def test_the_example_in_plain_c(begin: Begin, nodes: Nodes, programs: Programs) -> None:
    """examples/c/turns.c: one at a time over two nodes, exit codes, a larger token each time."""
    a, b = nodes.pair()
    log = nodes.folder / "log"
    turns = programs.path("turns")
    script = f"echo in >>{log}; sleep 0.1; echo out >>{log}; exit 3"
    done = [
        run.output() for run in [begin([turns, n / "dom/x", "sh", "-c", script]) for n in (a, b)]
    ]
    assert [code for code, _, _ in done] == [3, 3]
    assert log.read_text().split() == ["in", "out"] * 2
    assert len({err.split()[-1] for _, _, err in done}) == 2
    holder = nodes.hold(b / "dom/x")
    assert holder.wait() == "held"
    waiting = begin([turns, a / "dom/x", "sh", "-c", "kill -9 $$"])
    until("it waits", lambda: "wanted by" in dlmfs("status", str(b)).stdout)
    assert waiting.process.poll() is None
    holder.release()
    assert waiting.end()[0] == 128 + 9
    assert begin([turns]).end()[0] == 2
