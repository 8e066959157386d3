"""A container as far as dlmfs can tell: a mount namespace with a /run and a /dev/shm of its own."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fs.nodes import DLMFS

OWN = """
for place in / /run /dev /dev/shm; do mount --make-private $place 2>/dev/null; done
{before}
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
{after}
exec "$@"
"""


def inside(
    *args: str | Path,
    before: str = "",
    after: str = "",
    unshare: Sequence[str] = (),
    propagation: str = "private",
) -> subprocess.CompletedProcess[str]:
    """Run something in there. `before`, `after`: what the shell does before and after it has those."""
    script = OWN.format(before=before, after=after)
    command = ["unshare", "--mount", "--propagation", propagation, *unshare]
    return subprocess.run(
        [*command, "sh", "-c", script, "sh", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def dlmfs(*args: str | Path, **how: str) -> subprocess.CompletedProcess[str]:
    """A command of ours in there."""
    return inside(*DLMFS, *args, **how)


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """What is mounted below the folder, and unmounted, is seen in all namespaces that are made of this
    (mountPropagation: Bidirectional)."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "--make-shared", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
