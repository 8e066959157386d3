"""What mount(8) of this machine hands to a helper, of each option there is.

Run as root, where the helper's place is free. Says what is lost on the way; the exit code is 1 then.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from dlmfs.config import KNOWN, OURS, parse_options, settings, split
from dlmfs.errors import UsageError

HELPER: Final = Path("/usr/sbin/mount.fuse.dlmfs")
TOLD: Final = Path("/run/told")
WHERE: Final = Path("/mnt")
SAY: Final = f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{TOLD}\n"


def words_of(name: str) -> str:
    """An option of that name, as it may be given."""
    try:
        settings(name)
    except UsageError:
        return f"{name}=7"
    return name


def told(options: str) -> list[str]:
    """What the helper gets of these options."""
    TOLD.unlink(missing_ok=True)
    subprocess.run(
        ["mount", "-t", "fuse.dlmfs", "local", str(WHERE), "-o", options], check=True, timeout=60
    )
    words = TOLD.read_text().splitlines()
    assert words[:2] == ["local", str(WHERE)], words
    return split(words[words.index("-o") + 1])


def from_fstab(options: str) -> list[str]:
    """The same of a line in fstab."""
    Path("/etc/fstab").write_text(f"local {WHERE} fuse.dlmfs {options},nofail 0 0\n")
    TOLD.unlink(missing_ok=True)
    subprocess.run(["mount", str(WHERE)], check=True, timeout=60)
    words = TOLD.read_text().splitlines()
    return split(words[words.index("-o") + 1])


def wrong() -> list[str]:
    """What is lost, and what comes that we would refuse."""
    each = [word for word in map(words_of, OURS) if word not in told(word)]
    found = [f"{word} is kept by mount(8)" for word in each]
    every = ",".join(map(words_of, OURS))
    for how in (told, from_fstab):
        lost = set(split(every)) - set(how(every))
        found += [f"{word}, among all, is kept by mount(8) ({how.__name__})" for word in lost]
    for word in [name for name in KNOWN if name not in OURS] + ["x-a=b", "X-mount.mode=755"]:
        try:
            parse_options([",".join(told(word))])
        except UsageError as error:
            found.append(f"given {word}: {error}")
    return found


def main() -> int:
    if HELPER.exists():
        print(f"{HELPER} exists: not ours to replace", file=sys.stderr)
        return 2
    HELPER.write_text(SAY)
    HELPER.chmod(0o755)
    try:
        found = wrong()
    finally:
        HELPER.unlink()
    print(*found, sep="\n", end="\n" * bool(found))
    print(f"{len(OURS)} options of ours through mount(8): {len(found)} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
