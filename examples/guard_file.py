#!/usr/bin/env python3
"""A file that refuses writers of the past: what comes from standard input replaces it, under a lock.

    make-report | guard_file.py jobs/report /srv/share/report.txt

Should this process be stopped for an hour in the middle, and its lock be another's meanwhile, then
its late write is refused: the other one's token is larger. Exit code 75 then.
"""

import sys

from dlmfs.client import DlmfsError, Lock
from dlmfs.client.guard import FileGuard


def main(name: str, path: str) -> int:
    try:
        with Lock(name) as lock:
            FileGuard(path).replace(lock.token, sys.stdin.buffer.read())
    except DlmfsError as error:  # LockLost too, and the guard's word for it, StaleToken
        print(error, file=sys.stderr)
        return error.exit
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: guard_file.py DOMAIN/LOCK FILE")
    sys.exit(main(sys.argv[1], sys.argv[2]))
