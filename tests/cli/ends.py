"""Every way in which a daemon ends while commands run under its locks; for either engine.

The commands ignore SIGTERM and note the time as long as they run. Whoever is granted a lock next notes
the time, too: never before the last sign of life of the command before (promise 1 for `dlmfs lock`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from dlmfs.errors import LockLost
from tests.cli.jobs import Job
from tests.cli.programs import until
from tests.fs.nodes import Nodes, dlmfs
from tests.robust.helpers import entry_of

WORK: Final = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("works", flush=True)
while True:
    os.pwrite(fd, b"%d" % time.clock_gettime_ns(time.CLOCK_BOOTTIME), 0)
    time.sleep(0.01)
"""
NEXT: Final = "import time; print(time.clock_gettime_ns(time.CLOCK_BOOTTIME), flush=True)"

STOPPED: Final = "stopped"
"""In a name: the process that looks after the command stands still, too."""

End = Callable[[Path, Path], object]
"""Ends the daemon of the first mount; may use the second, of another node."""


def ways(nodes: Nodes, connections: Path) -> dict[str, End]:
    """All that end a daemon by somebody's will."""

    def send(number: int) -> End:
        return lambda where, _other: os.kill(nodes.pid(where), number)

    def by_force(where: Path, _other: Path) -> object:
        # Its open files keep the mount there, dead.
        return subprocess.run(["umount", "-f", str(where)], check=False, capture_output=True)

    def abort(where: Path, _other: Path) -> object:
        number = entry_of(where).dev.partition(":")[2]
        return (connections / number / "abort").write_text("1")

    def evict(where: Path, other: Path) -> object:
        return dlmfs("evict", where.name, str(other))

    def evict_stopped(where: Path, other: Path) -> object:
        os.kill(nodes.pid(where), signal.SIGSTOP)
        return evict(where, other)

    return {
        "term": send(signal.SIGTERM),
        "int": send(signal.SIGINT),
        "hup": send(signal.SIGHUP),
        "kill": send(signal.SIGKILL),
        "force": by_force,
        "abort": abort,
        "evict": evict,
        "frozen": evict_stopped,
        f"term-{STOPPED}": send(signal.SIGTERM),
        f"kill-{STOPPED}": send(signal.SIGKILL),
    }


class Case(NamedTuple):
    """One lock: a command that works under it on a node that ends, and who comes next."""

    name: str
    log: Path
    worker: Job
    heir: Job

    def check(self) -> None:
        began = int(self.heir.line())
        last = int(self.log.read_text())
        assert began > last, f"{self.name}: both worked for {(last - began) / 1e6:.0f} ms"


def overlap_nowhere(nodes: Nodes, ends: dict[str, End], safe: Path) -> None:
    """End a node in each of these ways, all at once."""
    victims = {name: nodes.mount(name) for name in ends}
    with cases(nodes, victims, safe) as made:
        threads = [
            threading.Thread(target=end, args=(victims[name], safe)) for name, end in ends.items()
        ]
        for thread in threads:
            thread.start()
        for case in made:
            case.check()
            assert case.worker.over()[0] == LockLost.exit, case.name
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def cases(nodes: Nodes, victims: dict[str, Path], safe: Path) -> Iterator[list[Case]]:
    """On each victim one command that works alone and one that works shared; for each somebody waits
    on the safe node to work alone."""
    jobs: list[Job] = []

    def start(*args: object) -> Job:
        jobs.append(Job(*args))
        return jobs[-1]

    found = []
    try:
        for name, where in victims.items():
            for mode in ("-x", "-s"):
                lock = f"dom/{name}{mode}"
                log = nodes.folder / f"{name}{mode}.log"
                command = (sys.executable, "-ISc", WORK, log)
                worker = start(mode, where / lock, "--", *command)
                heir = ("-x", safe / lock, "--", sys.executable, "-ISc", NEXT)
                found.append((f"{name}{mode}", log, worker, heir))
        made = []
        for what, log, worker, heir in found:
            assert worker.line() == "works"
            if STOPPED in what:
                os.kill(worker.behind(), signal.SIGSTOP)
            made.append(Case(what, log, worker, start(*heir)))

        def all_wait() -> bool:
            locks = [lock for domain in nodes.status(safe)["domains"] for lock in domain["locks"]]
            return sum(len(lock["waiters"]) for lock in locks) == len(made)

        until(all_wait, "somebody does not wait")
        yield made
    finally:
        for job in jobs:
            job.close()
