#!/usr/bin/env python3
"""A cron job that runs on one node only.

Put the same line into every node's crontab:

    0 3 * * *  nightly.py jobs/report -- /usr/local/bin/make-report

The lock keeps two from running at once; its value, which travels with it, tells those who come
later that today's run is done, as long as one of the nodes stays mounted. If a node dies in the
middle, the next one does the work again.
"""

import datetime as dt
import subprocess
import sys

from dlmfs.client import DlmfsError, Lock


def main(name: str, *command: str) -> int:
    today = dt.date.today().isoformat().encode()
    with Lock(name) as lock:
        if lock.get_value() == today:
            return 0  # another node has done it
        code = subprocess.run(command, check=False).returncode
        lock.check()  # had it been lost, another node would be at it now
        if code == 0:
            lock.set_value(today)
        return code


if __name__ == "__main__":
    if "--" not in sys.argv[2:3] or len(sys.argv) < 4:
        sys.exit("usage: nightly.py DOMAIN/LOCK -- COMMAND [ARG...]")
    try:
        sys.exit(main(sys.argv[1], *sys.argv[3:]))
    except DlmfsError as error:  # no such lock, nothing mounted, not permitted, or lost
        sys.exit(f"nightly.py: {error}")
