#!/usr/bin/env python3
"""Restart a service on one node at a time.

Start it on all nodes at once, by whatever starts things everywhere:

    rolling_restart.py deploy/web v42 -- sh -c 'systemctl restart web && curl -fsS localhost/healthy'

Each node waits for its turn. The first node on which the command fails leaves word of it in the
lock's value, and those still waiting do nothing; another version starts afresh.
"""

import subprocess
import sys

from dlmfs.client import DlmfsError, Lock


def main(name: str, version: str, *command: str) -> int:
    failed = f"{version} failed".encode()
    with Lock(name) as turn:
        if turn.get_value() == failed:
            print(f"not restarted: {version} has failed on another node", file=sys.stderr)
            return 1
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            turn.set_value(failed)
        return code


if __name__ == "__main__":
    if "--" not in sys.argv[3:4] or len(sys.argv) < 5:
        sys.exit("usage: rolling_restart.py DOMAIN/LOCK VERSION -- COMMAND [ARG...]")
    try:
        sys.exit(main(sys.argv[1], sys.argv[2], *sys.argv[4:]))
    except DlmfsError as error:  # no such lock, nothing mounted, not permitted, or lost
        sys.exit(f"rolling_restart.py: {error}")
