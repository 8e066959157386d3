"""A program that uses a lock as its documentation says, for `test_workload`. Run as
`python worker.py LOCK FOLDER NUMBER`; ends when FOLDER/stop exists.

Under the exclusive lock it increments a counter in the lock's value, and tells the new count to a
register outside, which refuses a token that is older than one it has seen. What it does goes to
FOLDER/NUMBER.log, a line for each step *before* the next one begins, so that a killed worker has
not done more than one step beyond what is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import sys
import time

VALUE_SIZE = 64
WAIT_S = 0.02
"""After an error: the mount may be away, or its node fenced."""


class Log:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def say(self, step: str, **facts: object) -> None:
        os.write(
            self.fd, json.dumps({"step": step, "at": time.monotonic(), **facts}).encode() + b"\n"
        )


def register(path: str, token: int, count: int) -> bool:
    """The resource that the lock protects: false if the token is of the past."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        tail = os.pread(fd, 200, max(0, size - 200)).split(b"\n")
        seen = int(tail[-2].split()[0]) if len(tail) > 1 else 0
        if token < seen:
            return False
        os.write(fd, b"%d %d\n" % (token, count))
        return True
    finally:
        os.close(fd)


def parse(value: bytes) -> tuple[int, int]:
    """The count, and the number of the attempt that wrote it."""
    words = value.rstrip(b"\0").split()
    return (int(words[0]), int(words[1])) if words else (0, 0)


class Worker:
    def __init__(self, lock: str, folder: str, number: int) -> None:
        self.lock = lock
        self.register = f"{folder}/register"
        self.stop = f"{folder}/stop"
        self.log = Log(f"{folder}/{number}.log")
        self.random = random.Random(number)
        self.attempt = os.getpid() * 1_000_000

    def run(self) -> None:
        while not os.path.exists(self.stop):
            self.attempt += 1
            reading = self.random.random() < 0.2
            flags = (os.O_RDONLY if reading else os.O_RDWR) | os.O_CREAT
            if self.random.random() < 0.2:
                flags |= os.O_NONBLOCK
            try:
                fd = os.open(self.lock, flags, 0o644)
            except OSError as error:
                self.log.say("refused", errno=error.errno)
                time.sleep(WAIT_S)
                continue
            granted = time.monotonic()
            try:
                self._read(fd, granted) if reading else self._count(fd, granted)
            except OSError as error:
                self.log.say("lost", errno=error.errno)
            finally:
                with contextlib.suppress(OSError):
                    os.close(fd)
            time.sleep(self.random.random() * 0.005)

    def _hold(self) -> None:
        """Mostly short, now and then long enough for a fault to come in between."""
        time.sleep(self.random.random() * (0.5 if self.random.random() < 0.05 else 0.005))

    def _read(self, fd: int, granted: float) -> None:
        count, by = parse(os.pread(fd, VALUE_SIZE, 0))
        self.log.say("read", granted=granted, count=count, by=by)

    def _count(self, fd: int, granted: float) -> None:
        token = int(os.getxattr(fd, "user.dlmfs.token") or b"0")
        count, by = parse(os.pread(fd, VALUE_SIZE, 0))
        mine = {"attempt": self.attempt, "token": token, "granted": granted}
        self._hold()
        self.log.say("write", count=count + 1, after=by, **mine)
        value = (b"%d %d" % (count + 1, self.attempt)).ljust(VALUE_SIZE, b"\0")
        os.pwrite(fd, value, 0)
        self.log.say("written", attempt=self.attempt)
        if not register(self.register, token, count + 1):
            self.log.say("old", attempt=self.attempt)
        self._hold()
        used = time.monotonic()
        found = parse(os.pread(fd, VALUE_SIZE, 0))
        self.log.say("used", attempt=self.attempt, since=used, found=found)


if __name__ == "__main__":
    Worker(sys.argv[1], sys.argv[2], int(sys.argv[3])).run()
