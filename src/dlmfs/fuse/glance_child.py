"""The part of `glance` that touches the mount: a program of its own, which may sleep for ever.

Reads a question from standard input, one JSON object, and answers with one on standard output. Imports
the standard library only: it is run as a file.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Any


def main() -> None:
    question = json.load(sys.stdin)
    json.dump(look(question["mountpoint"]), sys.stdout)


def look(mountpoint: str) -> dict[str, Any]:
    """`life`: as of `glance.Life`. statfs(2) is asked since FUSE never caches it: attributes are, and
    outlive the daemon. Whom the kernel does not let in it answers itself, with zeros."""
    try:
        info = os.statvfs(mountpoint)
    except OSError as error:
        return {"life": "dead" if error.errno == errno.ENOTCONN else "untold"}
    return {"life": "alive" if info.f_bsize else "untold"}


if __name__ == "__main__":
    main()
