"""No waiter is lost, whatever comes: random opens, closes, signals and kills on two nodes.

Ten seconds by default; DLMFS_CHURN_S=600 goes on for ten minutes, DLMFS_CHURN_SEED=N draws other
opens (how they meet is up to the machine). What the workers check with every grant is told in
worker.py; here is who disturbs them, and what must be true at the end.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fs.nodes import PATIENCE_S, Nodes
from tests.waiting import worker
from tests.waiting.agents import at_rest, info, status, until

pytestmark = pytest.mark.fuse

CHURN_S = float(os.environ.get("DLMFS_CHURN_S", "10"))
SEED = int(os.environ.get("DLMFS_CHURN_SEED", "1"))
EACH = 5
"""Workers on each node."""
STUCK_S = 45.0
"""An open that is not over by then is lost: the worst it may meet are kept places, a second each."""


class Churn:
    """The workers, one after the other in each slot, and who sends them signals."""

    def __init__(self, mounts: list[Path], record: Path, rule: str, rng: random.Random) -> None:
        self.record = record
        self.rng = rng
        self.record.write_bytes(bytes(worker.SLOT_SIZE * worker.OWNERS))
        self.where = [where / "dom" for where in mounts for _ in range(EACH)]
        by_node = [n for n in range(len(mounts)) for _ in range(EACH)]
        self.owners = by_node if rule == "node" else list(range(len(self.where)))
        self.children = [self._start(slot) for slot in range(len(self.where))]
        self.kills = self.signals = 0
        self.seen = [(0, 0.0)] * len(self.where)

    def _start(self, slot: int) -> subprocess.Popen[str]:
        words = [
            str(self.where[slot]),
            str(self.record),
            str(slot),
            ",".join(map(str, self.owners)),
            str(self.rng.getrandbits(32)),
        ]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(worker.__file__)), *words],
            stdout=subprocess.PIPE,
            text=True,
        )

    def _end(self, slot: int) -> str:
        """Wait for a worker's end; what it said."""
        child = self.children[slot]
        try:
            out, _ = child.communicate(timeout=STUCK_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.stuck(slot)) from None
        return out.strip()

    def stuck(self, slot: int) -> str:
        told = [info(self.where[slot] / f"c{n}") for n in range(worker.LOCKS)]
        return f"worker {slot + 1}, process {self.children[slot].pid}, is stuck: {told}"

    def disturb(self, stopped: list[int]) -> None:
        """One signal to one of them."""
        slot = self.rng.randrange(len(self.children))
        child = self.children[slot]
        if child.poll() is not None:
            said = self._end(slot)
            # A signal that it was not yet ready for ends it, too.
            assert child.returncode in (-signal.SIGKILL, -signal.SIGUSR1), said
            self.children[slot] = self._start(slot)
            return
        draw = self.rng.random()
        if draw < 0.05:
            child.kill()
            self.kills += 1
        elif draw < 0.1:
            child.send_signal(signal.SIGSTOP)
            stopped.append(slot)
        else:
            child.send_signal(signal.SIGUSR1)
            self.signals += 1

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        stopped: list[int] = []
        while (now := time.monotonic()) < end:
            self.disturb(stopped)
            self.look(now)
            time.sleep(self.rng.uniform(0, 0.01))  # a rate, not a wait for something
            if len(stopped) > 1 or self.rng.random() < 0.3:
                self.go_on(stopped)
        self.go_on(stopped)

    def go_on(self, stopped: list[int]) -> None:
        for slot in stopped:
            self.children[slot].send_signal(signal.SIGCONT)
        stopped.clear()

    def count(self, what: int, slot: int) -> int:
        with self.record.open("rb") as file:
            file.seek((slot + 1) * worker.SLOT_SIZE + 8 * what)
            return int(struct.unpack("=Q", file.read(8))[0])

    def look(self, now: float) -> None:
        """Nobody stands still for long."""
        for slot, (rounds, since) in enumerate(self.seen):
            if now - since > 1:
                done = self.count(0, slot)
                if done != rounds or not since:
                    self.seen[slot] = (done, now)
                else:
                    assert now - since < STUCK_S, self.stuck(slot)

    def finish(self) -> None:
        """The last round of everybody alive, undisturbed: each is granted each lock."""
        with self.record.open("r+b") as file:
            file.write(b"\1")
        for slot, child in enumerate(self.children):
            said = self._end(slot)
            assert said == "done" or child.returncode in (-signal.SIGKILL, -signal.SIGUSR1), said
            assert said != "done" or self.count(1, slot) >= worker.LOCKS

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait(PATIENCE_S)
            if child.stdout is not None:
                child.stdout.close()


@pytest.mark.timeout(CHURN_S + 240)
@pytest.mark.parametrize("rule", ["node", "file"])
def test_no_waiter_is_lost(nodes: Nodes, rule: str) -> None:
    mounts = list(nodes.pair(f"holder={rule}"))
    daemons = [status(where)["pid"] for where in mounts]
    churn = Churn(mounts, nodes.folder / "record", rule, random.Random(SEED))
    try:
        churn.run(CHURN_S / 2)
        churn.finish()
        grants = [churn.count(1, slot) for slot in range(len(churn.children))]
        print(f"grants {grants}, signals {churn.signals}, kills {churn.kills}")
    finally:
        churn.close()
    for where in mounts:
        for n in range(worker.LOCKS):
            path = where / "dom" / f"c{n}"
            until(lambda path=path: at_rest(path), f"nothing is left at {path}")  # type: ignore[misc]
    for where, pid in zip(mounts, daemons, strict=True):
        report = status(where)
        assert (report["pid"], report["lease"]["fences"]) == (pid, 0)
        for n in range(worker.LOCKS):
            # And it is really free: handed over at once, without anybody's timer.
            os.close(os.open(where / "dom" / f"c{n}", os.O_RDWR | os.O_NONBLOCK))
