"""Deliberate faults of the product, which the tests must catch: each by those that are named with it.

`dlmfs.sim.bugs` lists those that simulated clusters must catch; here are the ones that only a real file
system, store, process or clock shows, or that a unit test should show first. A mutant is a replacement
in one file of a copy of the checkout; pytest runs there, in a process forked from this one, which has
imported everything but the product. First the tests run without any mutant: a test that fails anyway
notices nothing.

    scripts/mutants                     all of them; the exit code is 1 if a test lets one pass
    scripts/mutants NAME ...            these
    scripts/mutants --seconds 180       as many as fit, begun at another one each hour

As root the tests have mounts of their own, so that nothing else that runs here is disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import hypothesis
import pytest
import pytest_timeout  # type: ignore[import-untyped]

from tests.mutants.mutant import Mutant
from tests.mutants.rows import MUTANTS
from tests.private import own_mounts

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = "src/dlmfs"
LEFT_OUT: Final = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
HANGS_S: Final = 60
"""A test that runs so long has noticed."""
BATCH: Final = 16
"""So many mutants' tests are tried together without any."""
BROKEN: Final = 70
SKIPPED: Final = 71
PR_SET_CHILD_SUBREAPER: Final = 36
IMPORTED: Final = (hypothesis, pytest_timeout)
"""Once for all, since they take long."""


class Passed:
    """Counts the tests that passed: where all are skipped none could notice."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count += report.when == "call" and report.passed


class Tree:
    """A copy of the checkout, with one mutant at a time in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stamp = int(time.time())

    def write(self, file: str, text: str) -> None:
        """Each writing gets a second of its own, or a cached module would pass for the new one."""
        path = self.root / SOURCES / file
        path.write_text(text)
        self._stamp += 10
        os.utime(path, (self._stamp, self._stamp))

    def run(self, mutant: Mutant) -> int:
        """Exit code of pytest with the mutant: 1 if a test fails, 0 if all pass, SKIPPED if none ran."""
        source = (ROOT / SOURCES / mutant.file).read_text()
        self.write(mutant.file, mutant.applied(source))
        try:
            return self.pytest(mutant.tests)
        finally:
            self.write(mutant.file, source)

    def pytest(self, tests: Sequence[str], *, loud: bool = False) -> int:
        """The same, of the tree as it is. `loud`: its words are shown."""
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._in_child(tests, loud=loud))
            finally:
                os._exit(BROKEN)
        ended = 0
        try:
            while (
                ended != child
            ):  # daemons that it leaves are ours, and somebody may wait for their end
                ended, status = os.waitpid(-1, 0)
        finally:
            _end_children()
        return os.waitstatus_to_exitcode(status)

    def _in_child(self, tests: Sequence[str], *, loud: bool) -> int:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getuid() == 0:
            own_mounts()
        os.chdir(self.root)
        sys.path[:0] = [str(self.root / "src"), str(self.root)]
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0,) if loud else (0, 1, 2):
            os.dup2(null, fd)
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={HANGS_S}"]
        imported = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
        passed = Passed()
        code = int(pytest.main([*options, *imported, *tests], plugins=[passed]))
        return SKIPPED if code == pytest.ExitCode.OK and not passed.count else code


def _end_children() -> None:
    """What a test that failed has left behind: all of it is this process's by now."""
    with contextlib.suppress(ChildProcessError):
        while True:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in map(int, children):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


@contextmanager
def copied() -> Iterator[Tree]:
    """A copy of this checkout, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="dlmfs-mutants-") as folder:
        root = Path(folder) / "dlmfs"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (root / ".venv").symlink_to(ROOT / ".venv")
        yield Tree(root)


def _chosen(names: Sequence[str], *, turned: bool) -> list[Mutant]:
    """Those of these names, or all; `turned`: begun at another one each hour, or some would never run."""
    if names:
        known = {m.name: m for m in MUTANTS}
        if unknown := [n for n in names if n not in known]:
            sys.exit(f"mutants: there is none named {', '.join(unknown)}")
        return [known[n] for n in names]
    first = int(time.time() // 3600 * 7) % len(MUTANTS) if turned else 0
    return [*MUTANTS[first:], *MUTANTS[:first]]


def _cpu_s() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


class Campaign:
    """Some mutants, one after the other, for so many seconds."""

    def __init__(self, seconds: float, *, verbose: bool) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._verbose = verbose
        self.ran = self.skipped = 0
        self.survived: list[str] = []
        self.sound = True
        """The tests pass without any mutant."""

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._began

    def run(self, tree: Tree, mutants: Sequence[Mutant]) -> None:
        for start in range(0, len(mutants), BATCH):
            batch = mutants[start : start + BATCH]
            if self.took_s > self._seconds or not self._try_tests(tree, batch):
                return
            for mutant in batch:
                if self.took_s <= self._seconds:
                    self._try(tree, mutant)

    def _try_tests(self, tree: Tree, batch: Sequence[Mutant]) -> bool:
        tests = sorted({test for mutant in batch for test in mutant.tests})
        self.sound = tree.pytest(tests) in (pytest.ExitCode.OK, SKIPPED)
        if not self.sound:
            print("mutants: without any mutant these tests fail:", flush=True)
            tree.pytest(tests, loud=True)
        return self.sound

    def _try(self, tree: Tree, mutant: Mutant) -> None:
        before = _cpu_s()
        code = tree.run(mutant)
        self.ran += 1
        if self._verbose:
            print(f"{_cpu_s() - before:6.1f} s  {mutant.name}", flush=True)
        if code == SKIPPED:
            self.skipped += 1
        elif code != pytest.ExitCode.TESTS_FAILED:
            why = "no test noticed" if code == pytest.ExitCode.OK else f"pytest ended with {code}"
            self.survived.append(mutant.name)
            print(f"{mutant.name}: {why}: {mutant.what}", flush=True)
            print(f"    {' '.join(mutant.tests)}", flush=True)


def main() -> int:
    """Run them; the exit code is the number of a shell: 0 if each was caught."""
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument(
        "--verbose", action="store_true", help="a line for each, with its seconds of CPU"
    )
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    chosen = _chosen(options.names, turned=options.seconds < float("inf"))
    campaign = Campaign(options.seconds, verbose=options.verbose)
    with copied() as tree:
        campaign.run(tree, chosen)
    left = f", {len(chosen) - campaign.ran} not run" if campaign.ran < len(chosen) else ""
    left += f", {campaign.skipped} whose tests are skipped here" if campaign.skipped else ""
    caught = campaign.ran - campaign.skipped - len(campaign.survived)
    took = f"{campaign.took_s:.0f} s, {_cpu_s():.0f} s of CPU"
    print(f"mutants: {caught} of {campaign.ran} caught in {took}{left}")
    return 0 if campaign.sound and not campaign.survived else 1


if __name__ == "__main__":
    sys.exit(main())
