"""The part of `glance` that touches the mount: a program of its own, which may sleep for ever.

Reads a question from standard input, one JSON object, and answers with one on standard output. Imports
the standard library only: it is run as a file.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from typing import Any

OF_A_LOCK = ("mode", "token", "holders", "waiters", "abandoned")
FILES_MAX = 2000


def main() -> None:
    question = json.load(sys.stdin)
    json.dump(look(question), sys.stdout)


def look(question: dict[str, Any]) -> dict[str, Any]:
    """`life`: as of `glance.Life`. statfs(2) is asked since FUSE never caches it: attributes are, and
    outlive the daemon. Whom the kernel does not let in it answers itself, with zeros."""
    mountpoint = question["mountpoint"]
    try:
        info = os.statvfs(mountpoint)
    except OSError as error:
        return {"life": "dead" if error.errno == errno.ENOTCONN else "untold"}
    if not info.f_bsize:
        return {"life": "untold"}
    told: dict[str, Any] = {"life": "alive"}
    if question.get("status"):
        told["status"] = attribute(mountpoint, "status")
    if "lock" in question:
        told["lock"] = lock(os.path.join(mountpoint, *question["lock"]))
    if question.get("locks"):
        told["locks"], told["more"] = locks(mountpoint, time.monotonic() + question["for_s"])
    return told


def attribute(path: str, name: str) -> str | None:
    """As the daemon answers it, which obeys the modes of the mount's files; None: it is not told."""
    try:
        return os.getxattr(path, f"user.dlmfs.{name}").decode()
    except (OSError, UnicodeDecodeError):
        return None


def lock(path: str) -> dict[str, str | None]:
    return {name: attribute(path, name) for name in OF_A_LOCK}


def locks(mountpoint: str, until: float) -> tuple[list[dict[str, Any]], bool]:
    """The busy locks whose files this user may read, and whether there may be more: only so many files
    are looked at, and only so long."""
    busy: list[dict[str, Any]] = []
    seen = 0
    for domain in listed(mountpoint):
        for name in listed(os.path.join(mountpoint, domain)):
            seen += 1
            if seen > FILES_MAX or time.monotonic() > until:
                return busy, True
            found = lock(os.path.join(mountpoint, domain, name))
            if found["holders"] not in (None, "[]") or found["waiters"] not in (None, "[]"):
                busy.append({"domain": domain, "name": name, **found})
    return busy, False


def listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


if __name__ == "__main__":
    main()
