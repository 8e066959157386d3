"""A process that runs seeds, for `campaign`: `python -m dlmfs.sim.worker FIRST COUNT [BUG]`.

Prints one line of JSON: the sums, and the failures. With the name of a planted bug it stops at the first.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

from dlmfs.sim.bugs import by_name
from dlmfs.sim.planted import plant
from dlmfs.sim.sums import Sums


def work(first: int, count: int, *, stop: bool) -> dict[str, object]:
    """Run the seeds from `first` on; the sums by name, and `failures`: [seed, rule, text]."""
    from dlmfs.sim.run import run  # after planting
    from dlmfs.sim.scenario import draw

    sums = Sums()
    failures: list[list[object]] = []
    seeds = 0
    for seed in range(first, first + count):
        outcome = run(draw(seed))
        seeds += 1
        sums.add(outcome)
        if outcome.failure is not None:
            failures.append([seed, outcome.rule, outcome.failure])
            if stop:
                break
    told = {"seeds": seeds, "failures": failures, "cpu_s": time.process_time()}
    return {**asdict(sums), **told}


def main(args: list[str]) -> int:
    bug = by_name(args[2]) if len(args) > 2 else None
    if bug is not None:
        plant(bug)
    print(json.dumps(work(int(args[0]), int(args[1]), stop=bug is not None)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
