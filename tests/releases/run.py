"""dlmfs on fresh Debian releases, in folders: README's first steps as pasted, every option through their
mount(8), and the tests under their Python, util-linux and fuse3.

    scripts/releases                          bookworm, trixie and sid: everything
    scripts/releases trixie                   one of them
    scripts/releases trixie -- tests/core -x  these tests, with these options of pytest
    scripts/releases trixie --only readme     one step: options, readme or tests
    scripts/releases --python /usr/bin/python3.12 [-- ...]
                                              the tests on this machine, under another Python

Needs root, debootstrap and Debian's packages. What was built is kept in ~/.cache/dlmfs/releases. The exit
code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Final

from tests.releases import pasted
from tests.releases.root import CACHE, Root

HERE: Final = Path(__file__).resolve().parents[2]
RELEASES: Final = ("bookworm", "trixie", "sid")
STEPS: Final = ("options", "readme", "tests")
LEFT_OUT: Final = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
PYTEST: Final = ("-n", "3", "--dist", "loadfile", "-rs", "-p", "no:cacheprovider")

USER: Final = """
useradd --create-home --shell /bin/bash me
echo 'me ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/me
cp -r /checkout /home/me/dlmfs
printf '#!/bin/sh\\necho the backup runs\\n' >/usr/local/bin/backup.sh
chmod 755 /usr/local/bin/backup.sh
chown -R me: /home/me
"""
AS_USER: Final = """
set -e
cd ~/dlmfs
. /checkout/pasted.sh
dlmfs status | grep -F holder=file
echo "all of README was pasted"
"""
AS_CRON: Final = "env -i HOME=/root LOGNAME=root SHELL=/bin/sh PATH=/usr/bin:/bin sh -c "


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One run at a time has that release, or Python: the others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def copied(to: Path) -> Path:
    """This checkout, as it is. The environment that a former run made there stays."""
    to.mkdir(exist_ok=True)
    for path in to.iterdir():
        if path.name != ".venv":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(
        HERE, to, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True, symlinks=True
    )
    return to


def options(root: Root) -> int:
    checkout = copied(CACHE / f"{root.release}.checkout")
    inside = "mount --version; cd /checkout; python3 -B -m tests.releases.through"
    env = {"PYTHONPATH": "/checkout/src:/checkout"}
    return root.run("sh", "-c", inside, checkout=checkout, env=env)


def readme(root: Root) -> int:
    """Every block of README's first steps in one shell, in order; a crontab's line as cron runs it."""
    checkout = copied(CACHE / f"{root.release}.checkout")
    script = ""
    for block in pasted.blocks(pasted.README.read_text()):
        if block.kind == "sh":
            script += block.text
        for command in pasted.commands(block) if block.kind == "crontab" else []:
            script += f"sudo {AS_CRON} {quote(command)}\n"
    (checkout / "pasted.sh").write_text(script)
    as_user = f"su - me -c {quote(f'bash -xc {quote(AS_USER)}')}"
    return root.run("bash", "-c", f"{USER}\n{as_user}", checkout=checkout)


def tests(root: Root, words: Sequence[str]) -> int:
    """The tests in an environment made there, as scripts/test would start them."""
    checkout = copied(CACHE / f"{root.release}.checkout")
    inside = f"cd /checkout && scripts/env && nice .venv/bin/python -m pytest {' '.join(words)}"
    return root.run("bash", "-c", inside, tools=True, checkout=checkout)


def under(python: str, words: Sequence[str]) -> int:
    """The tests on this machine, under another Python."""
    checkout = copied(CACHE / f"{Path(python).name}.checkout")
    env = {"PYTHON": python, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(Path.home())}
    subprocess.run([checkout / "scripts/env"], check=True, env=env)
    private = (
        "mount -t tmpfs tmpfs /run; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mkdir -p /run/lock"
    )
    inside = f"{private}; cd {checkout}; nice .venv/bin/python -m pytest {' '.join(words)}; exit $?"
    unshare = "unshare --mount --pid --propagation private --fork --kill-child --mount-proc".split()
    return subprocess.run([*unshare, "--", "bash", "-c", inside], check=False).returncode


def main() -> int:
    args = sys.argv[1:]
    given = args[args.index("--") + 1 :] if "--" in args else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("release", nargs="*", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--only", choices=STEPS)
    parser.add_argument("--python", metavar="PATH")
    parsed = parser.parse_args(args[: args.index("--")] if "--" in args else args)
    words = [*PYTEST, *given]
    if parsed.python:
        with alone(Path(parsed.python).name):
            return under(parsed.python, words)
    steps: dict[str, Callable[[Root], int]] = {
        "options": options,
        "readme": readme,
        "tests": partial(tests, words=words),
    }
    failed = []
    for release in parsed.release or RELEASES:
        with alone(release):
            root = Root(release)
            root.make()
            for step in steps if parsed.only is None else (parsed.only,):
                about = f"== {release}: {step}"
                print(about, flush=True)
                start = time.monotonic()
                code = steps[step](root)
                took = time.monotonic() - start
                print(f"{about}: {'failed' if code else 'passed'} in {took:.0f} s", flush=True)
                failed += [f"{release}: {step}"] * (code != 0)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
