"""Going into the background without losing what went wrong on the way."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

from dlmfs import errors
from dlmfs.cli.say import tell_trace
from dlmfs.errors import Bug, DlmfsError, MountFailed

INTERRUPTED: Final = 8
"""As mount(8)'s."""
PR_SET_PDEATHSIG: Final = 1
prctl: Final = ctypes.CDLL(None).prctl


def run_in_background(
    serve: Callable[[Callable[[], None]], int],
    mountpoint: str,
    *,
    keeps_stderr: bool = False,
    automount: bool = False,
) -> int:
    """Fork; the child calls `serve(ready)`. Returns when it is ready and the mount answers. Until then
    the child ends with this process, as by SIGINT: nobody is to meet a mount that he gave up.

    `keeps_stderr`: the daemon goes on to write there. `automount`: a trigger is at the mount point. It
    lets the process group of whom it asked to mount pass, and has all others wait for the mount: so the
    daemon leaves that group when it is mounted.

    Raises the DlmfsError that the child met before that, or MountFailed if it died silently.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        closed = (0, 1) if keeps_stderr else (0, 1, 2)
        os._exit(_child(serve, writing, parent, closed, automount=automount))
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            message = pipe.read()
    except KeyboardInterrupt:
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        raise
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


def _end_with(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() not in (parent, 0):  # 0: it is in another pid namespace
        os._exit(INTERRUPTED)


def _child(
    serve: Callable[[Callable[[], None]], int],
    writing: int,
    parent: int,
    closed: tuple[int, ...],
    *,
    automount: bool,
) -> int:
    def ready() -> None:
        prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
        if automount:
            os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in closed:
            os.dup2(null, fd)
        os.close(null)
        os.write(writing, b"ready")
        os.close(writing)

    try:
        _end_with(parent)
        if not automount:
            os.setsid()
        os.chdir("/")
        return serve(ready)
    except DlmfsError as error:
        known = next(each for each in type(error).__mro__ if hasattr(errors, each.__name__))
        _tell(writing, known.__name__, str(error))
        return error.mount_exit
    except KeyboardInterrupt:
        return INTERRUPTED
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
