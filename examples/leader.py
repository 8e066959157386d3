#!/usr/bin/env python3
"""Leader election: of all who run this, one leads; when it ends or its node is lost, the next does."""

import sys

from dlmfs import DlmfsError, Election


def lead(name: str) -> None:
    with Election(name) as leader:  # waits until elected
        while not leader.lock.wait_lost(1.0):
            print("leading with token", leader.token, flush=True)
    # Here it ends by LockLost if another may lead by now.


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: leader.py DOMAIN/LOCK")
    try:
        lead(sys.argv[1])
    except DlmfsError as error:  # no such lock, nothing mounted, not permitted, or lost
        sys.exit(f"leader.py: {error}")
