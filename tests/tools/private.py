"""A private place to run whole daemons in as other users, without touching the machine.

Mount and process namespaces of their own: /dev/fuse that everybody may open, a fuse.conf to write to,
an empty /dev/shm, and this Python and this checkout where any user can reach them. When the
first process of the namespace ends, the kernel kills the others and the mounts go with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fs.nodes import PATIENCE_S, ROOT

USER, OTHER = 12345, 54321
USERS = (USER, OTHER, USER + 1, USER + 2, USER + 3)
"""Made up: /etc/passwd in there names them, since fusermount3 wants a name."""

SETUP = """
set -e
mount -t tmpfs -o mode=755 tmpfs "$BASE"
cd "$BASE"
mkdir python repo home tmp host
chmod 1777 home tmp
mknod fuse c $FUSE
chmod 666 fuse
mount --bind fuse /dev/fuse
{ cat /etc/passwd; echo "$USERS"; } >passwd
mount --bind passwd /etc/passwd
test ! -e /etc/fuse.conf || { : >fuse.conf; mount --bind fuse.conf /etc/fuse.conf; }
mount --bind "$PYTHON" python
mount --bind "$REPO" repo
test -z "$SHARED" || mount --bind "$SHARED" host
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t proc proc /proc
echo ready
cat
exit 0
"""
"""The shell that waits for cat is the namespace's init, and reaps what daemons leave behind."""

Done = subprocess.CompletedProcess[str]
Holding = contextlib.AbstractContextManager[subprocess.Popen[str]]


def missing() -> str | None:
    """What this needs and this machine has not."""
    needs = {"unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
    needs |= {"fusermount3": "fuse3"}
    for tool, package in needs.items():
        if shutil.which(tool) is None:
            return f"{tool} is missing: install the package {package}"
    command = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    return f"no namespaces of one's own here: {done.stderr.strip()}" if done.returncode else None


@dataclass
class Private:
    """The namespaces. Paths are as inside of them."""

    base: Path
    process: subprocess.Popen[str]
    init: int

    @property
    def home(self) -> Path:
        """Where everybody may make folders."""
        return self.base / "home"

    @property
    def python(self) -> str:
        prefix = Path(sys.base_prefix)
        return str(self.base / "python" / Path(sys._base_executable).relative_to(prefix))  # type: ignore[attr-defined]

    def command(
        self, *args: str | Path, uid: int | None = USER, pids: bool = True, unshare: str = ""
    ) -> list[str]:
        """How to run something inside. `pids` False: from the machine's process namespace."""
        words = ["nsenter", "--mount", *(["--pid"] * pids), "-t", str(self.init), "--"]
        if uid is not None:
            words += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        words += ["env", "-i", "LC_ALL=C", f"PATH={os.environ['PATH']}"]
        if unshare:
            words += ["unshare", *unshare.split()]
        return [*words, *(str(arg) for arg in args)]

    def run(
        self, *args: str | Path, uid: int | None = USER, check: bool = False, **how: Any
    ) -> Done:
        return subprocess.run(
            self.command(*args, uid=uid, **how),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=check,
        )

    def sh(self, script: str, uid: int | None = USER, **how: Any) -> Done:
        return self.run("sh", "-c", script, uid=uid, **how)

    def py(self, script: str, *args: str | Path, uid: int | None = USER, **how: Any) -> Done:
        return self.run(self.python, "-I", "-S", "-c", script, *args, uid=uid, **how)

    def dlmfs(self, *args: str | Path, uid: int | None = USER, **how: Any) -> Done:
        return self.run(self.python, "-I", self.base / "repo/scripts/dlmfs", *args, uid=uid, **how)

    def mount(self, name: str, *options: str, uid: int = USER, source: str = "local") -> Path:
        """A mount of that user. Fails with what dlmfs says."""
        where = self.home / name
        self.sh(f"mkdir -p {where}", uid=uid, check=True)
        opts = ",".join([f"node={name}", "holder=node", *options])
        done = self.dlmfs("mount", source, where, "-o", opts, uid=uid)
        assert (done.returncode, done.stderr) == (0, "")
        return where

    def status(self, where: Path, uid: int = USER) -> dict[str, Any]:
        done = self.dlmfs("status", "--json", where, uid=uid)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)[0]
        return report

    def errno(self, path: Path, flags: int, uid: int = USER, **how: Any) -> int:
        """What open(2) of that user answers; 0 if it succeeds."""
        script = (
            "import os, sys\ntry: os.close(os.open(sys.argv[1], int(sys.argv[2]), 0o644))\n"
            "except OSError as error: print(error.errno)\nelse: print(0)"
        )
        done = self.py(script, path, str(flags), uid=uid, **how)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    @contextlib.contextmanager
    def running(self, *args: str | Path, says: str, **how: Any) -> Iterator[subprocess.Popen[str]]:
        """Something that says one line and then goes on until its standard input ends."""
        process = subprocess.Popen(
            self.command(*args, **how),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == says + "\n"
            yield process
        finally:
            process.communicate(timeout=PATIENCE_S)

    def holding(self, path: Path, uid: int = USER, **how: Any) -> Holding:
        """A shell of that user that holds the lock exclusively."""
        script = f"exec 9<>{path}; echo held; read line"
        return self.running("sh", "-c", script, says="held", uid=uid, **how)


@contextlib.contextmanager
def private(shared: Path | None = None) -> Iterator[Private]:
    """Make the place; nothing of it is left afterwards. `shared`: a folder of the machine's that is
    its folder `host`, as a container's volume."""
    base = Path(tempfile.mkdtemp(prefix="dlmfs-private-"))
    device = os.stat("/dev/fuse").st_rdev
    variables = {
        "BASE": str(base),
        "USERS": "\n".join(f"u{uid}:x:{uid}:{uid}::/:/bin/sh" for uid in USERS),
        "FUSE": f"{os.major(device)} {os.minor(device)}",
        "PYTHON": sys.base_prefix,
        "REPO": str(ROOT),
        "SHARED": str(shared or ""),
    }
    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", SETUP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said == "ready\n", "the namespaces could not be made"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield Private(base, process, int(children.split()[0]))
    finally:
        process.stdin.close()
        process.wait(PATIENCE_S)
        process.stdout.close()
        base.rmdir()
