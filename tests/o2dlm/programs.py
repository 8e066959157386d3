"""A C program on Debian's libo2dlm, built twice, and runs of it by `dlmfs o2dlm-run`."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fs.nodes import DLMFS, PATIENCE_S, ROOT

SOURCES = {
    "prog": ROOT / "tests/o2dlm/prog.c",
    "counter": ROOT / "examples/o2dlm/counter.c",
    "turns": ROOT / "examples/c/turns.c",
}
LINKED = {"dynamic": [], "static": ["-static"]}
LIBRARIES = ["-lo2dlm", "-lcom_err"]
TYPE = "76a9f425"


def missing() -> str | None:
    """What the programs need and this machine has not."""
    if shutil.which("gcc") is None:
        return "gcc is missing: install the packages gcc and libc6-dev"
    headers = {"o2dlm/o2dlm.h": "ocfs2-tools-dev", "et/com_err.h": "comerr-dev"}
    for header, package in headers.items():
        if not Path("/usr/include", header).exists():
            return f"{header} is missing: install the package {package}"
    return None


@dataclass(frozen=True)
class Programs:
    """Where they were built."""

    folder: Path

    def path(self, name: str, linked: str = "dynamic") -> Path:
        return self.folder / f"{name}-{linked}"


def build(folder: Path) -> Programs:
    """Both ways each, and no warning but the linker's about dlopen in a static program."""
    made = Programs(folder)
    for name, source in SOURCES.items():
        for linked, flags in LINKED.items():
            command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", *flags]
            command += ["-o", str(made.path(name, linked)), str(source), *LIBRARIES]
            subprocess.run(command, check=True, timeout=PATIENCE_S)
    return made


class Run:
    """One run of a program that answers each line with a line."""

    def __init__(self, command: Sequence[str | Path], cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=cwd,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def heard(self, within_s: float = PATIENCE_S) -> str | None:
        """The next answer, or None if none comes in that time."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], within_s)[0]:
            return None
        return self.process.stdout.readline().removesuffix("\n")

    def ask(self, line: str) -> str:
        self.tell(line)
        answer = self.heard()
        assert answer is not None, f"no answer: {line}"
        return answer

    def output(self) -> tuple[int, str, str]:
        """End of input; the exit code, what it wrote, and to standard error."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def end(self) -> tuple[int, str]:
        """End of input; the exit code, and what it wrote to standard error."""
        code, _out, err = self.output()
        return code, err

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)


def o2dlm_run(*args: str | Path) -> list[str]:
    return [*DLMFS, "o2dlm-run", *(str(arg) for arg in args)]


def supervisors(where: Path) -> list[int]:
    """The processes that have a listener and keep that mount in use."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{name}/fd/{fd}") for fd in os.listdir(f"/proc/{name}/fd")]
        except OSError:
            continue
        if "anon_inode:seccomp notify" in links and str(where) in links:
            found.append(int(name))
    return found
