"""Going into the background without losing what went wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable

from dlmfs import errors
from dlmfs.cli.say import tell_trace
from dlmfs.errors import Bug, DlmfsError, MountFailed


def run_in_background(
    serve: Callable[[Callable[[], None]], int], mountpoint: str, *, keeps_stderr: bool = False
) -> int:
    """Fork; the child calls `serve(ready)`. Returns when it is ready and the mount answers.

    `keeps_stderr`: the daemon goes on to write there.

    Raises the DlmfsError that the child met before that, or MountFailed if it died silently.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_child(serve, writing, (0, 1) if keeps_stderr else (0, 1, 2)))
    os.close(writing)
    with open(reading, "rb") as pipe:
        message = pipe.read()
    if message == b"ready":
        os.stat(mountpoint)  # here, not in the daemon, which must never touch its own mount
        return 0
    _, status = os.waitpid(child, 0)
    if message:
        facts = json.loads(message)
        raise getattr(errors, facts["class"])(facts["message"])
    code = os.waitstatus_to_exitcode(status)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise MountFailed(f"the daemon died before it was ready ({how}): try -f to see why")


def _child(
    serve: Callable[[Callable[[], None]], int], writing: int, closed: tuple[int, ...]
) -> int:
    os.setsid()
    os.chdir("/")

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in closed:
            os.dup2(null, fd)
        os.close(null)
        os.write(writing, b"ready")
        os.close(writing)

    try:
        return serve(ready)
    except DlmfsError as error:
        _tell(writing, type(error).__name__, str(error))
        return error.mount_exit
    except BaseException as error:
        if os.environ.get("DLMFS_DEBUG"):
            tell_trace()
        _tell(writing, "Bug", f"internal error: {type(error).__name__}: {error}")
        return Bug.mount_exit


def _tell(writing: int, name: str, message: str) -> None:
    try:
        os.write(writing, json.dumps({"class": name, "message": message}).encode())
    except OSError:
        return  # after ready the parent is gone
