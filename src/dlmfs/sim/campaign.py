"""Many seeds, and every planted bug, on all processors; the sums and what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from dlmfs.errors import Bug
from dlmfs.sim.bugs import BUGS
from dlmfs.sim.planted import Planted
from dlmfs.sim.sums import Sums

T = TypeVar("T")

CHUNK: Final = 100
"""Seeds of one worker process: few enough for all processors to have work until the end."""


@dataclass(kw_only=True)
class Totals(Sums):
    """The sums over all seeds. `cpu_s` are spent, `wall_s` waited."""

    seeds: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    """Seed, rule, text."""
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def take_in(self, told: dict[str, Any]) -> None:
        """What a worker has told."""
        self.add(Sums.of(told))
        self.seeds += told["seeds"]
        self.failures += [(seed, rule, text) for seed, rule, text in told["failures"]]
        self.cpu_s += told["cpu_s"]

    @property
    def speed(self) -> float:
        """Simulated seconds per second of one processor."""
        return self.seconds / self.cpu_s if self.cpu_s else 0.0


@dataclass
class Hunt:
    """What became of a planted bug: the seed that caught it and how, or None after all its seeds."""

    bug: Planted
    seed: int | None
    rule: str
    text: str
    cpu_s: float


def _worker(first: int, count: int, bug: str | None = None) -> dict[str, Any]:
    """Run seeds in a process of their own. Raises Bug if it broke down."""
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-m", "dlmfs.sim.worker", str(first), str(count)]
    command += [bug] if bug is not None else []
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise Bug(f"a simulation worker ended with {done.returncode}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _spread(jobs: int, works: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run them, `jobs` at a time; the results as they come. Few are kept waiting: there may be many."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            running: set[Future[T]] = set()
            for work in works:
                running.add(pool.submit(work))
                if len(running) >= 2 * jobs:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            for future in running:
                yield future.result()
        except BaseException:  # Ctrl-C: what has not begun must not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sweep(
    first: int, seeds: int, jobs: int, progress: Callable[[Totals], None] = lambda _totals: None
) -> Totals:
    """Run the seeds from `first` on. The outcome of a seed does not depend on `jobs`."""
    totals, begun = Totals(), time.monotonic()
    chunks = [(at, min(CHUNK, first + seeds - at)) for at in range(first, first + seeds, CHUNK)]
    for told in _spread(jobs, [partial(_worker, *chunk) for chunk in chunks]):
        totals.take_in(told)
        totals.wall_s = time.monotonic() - begun
        progress(totals)
    totals.failures.sort()
    return totals


def _hunt(bug: Planted) -> Hunt:
    told = _worker(bug.first, bug.within, bug.name)
    if not told["failures"]:
        return Hunt(bug, None, "", "", told["cpu_s"])
    seed, rule, text = told["failures"][0]
    return Hunt(bug, seed, rule, text, told["cpu_s"])


def hunt(jobs: int, bugs: Iterable[Planted] = BUGS) -> list[Hunt]:
    """Let the simulator loose on each planted bug, in the order of the list."""
    order = {bug.name: place for place, bug in enumerate(BUGS)}
    # Those that take longest first, or one processor waits for another at the end.
    longest = sorted(bugs, key=lambda bug: -bug.within)
    hunts = list(_spread(jobs, [partial(_hunt, bug) for bug in longest]))
    return sorted(hunts, key=lambda h: order[h.bug.name])
