#!/usr/bin/env python3
"""A configuration value that every node reads from memory, and that may change at any time.

    shared_config.py watch config/limit          # on every node
    shared_config.py set config/limit 250        # on any of them

A reader holds the lock shared: while it does, the value cannot change. Who wants to change it waits
for the lock exclusively, which every reader is told: it lets go, and reads anew as soon as it can.
"""

import sys

from dlmfs.client import DlmfsError, Lock


def watch(name: str) -> None:
    known = None
    while True:
        with Lock(name, shared=True) as lock:
            value = lock.get_value()
            if value != known:
                print(value.decode(), flush=True)
                known = value
            lock.wait_wanted()  # use the value as long as nobody wants to change it


def change(name: str, value: str) -> None:
    with Lock(name) as lock:
        lock.set_value(value.encode())


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["watch", name]:
                watch(name)
            case ["set", name, value]:
                change(name, value)
            case _:
                sys.exit("usage: shared_config.py watch DOMAIN/LOCK | set DOMAIN/LOCK VALUE")
    except DlmfsError as error:  # no such lock, nothing mounted, not permitted, or lost
        sys.exit(f"shared_config.py: {error}")
