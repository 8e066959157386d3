"""The one program: `dlmfs VERB ...`, and what mount(8) calls as a mount helper."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

from dlmfs.cli.say import complain, say, tell_trace
from dlmfs.errors import Bug, DlmfsError, OutputFailed, UsageError

VERBS: Final = {
    "mount": "join a lock service: mount it on a folder",
    "umount": "leave it",
    "status": "who holds what, who waits for whom, on this host's mounts",
    "lock": "run a command while it has a lock",
    "top": "the busy locks, live",
    "info": "one lock, as the whole cluster knows it",
    "why": "why a lock is not free: who blocks whom, across nodes, and deadlocks",
    "value": "get, set or watch the 64 bytes that travel with a lock",
    "doctor": "is everything there that a mount and a cluster need; how to mend what is not",
    "nodes": "the nodes of a lock space, and the domains each is in",
    "evict": "put a node out of the cluster",
    "simulate": "run whole clusters from a seed, and check every promise",
    "domain": "remove what a domain left behind when all its nodes had crashed",
    "o2dlm-run": "run an unmodified program of OCFS2's dlmfs (libo2dlm) on a mount",
}
HELPERS: Final = ("mount.dlmfs", "mount.fuse.dlmfs", "mount.fuse3.dlmfs")
MOUNTING: Final = ("mount", "umount")
HANDING_ON: Final = ("lock", "o2dlm-run")
"""They run a command, which is to have the standard streams as we got them."""
UNWRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What write(2) says of standard output. An error of a file has its name; this one has none."""


def usage() -> str:
    verbs = "\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items())
    return f"usage: dlmfs VERB ...   (`dlmfs VERB --help` for each)\n\n{verbs}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (mount and umount: as mount(8), else docs/reference.md)."""
    program = os.path.basename(sys.argv[0])
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    helper = program in HELPERS
    if helper or _as_mount_calls_us(args):
        args.insert(0, "mount")
        if helper:
            args.insert(1, "--helper")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # as standard error: a name may hold anything
    return _guard(args)


def _as_mount_calls_us(args: list[str]) -> bool:
    """mount(8) runs the program of a `fuse.dlmfs` entry as `dlmfs SOURCE DIR -o ...`, no verb."""
    return (
        len(args) >= 2
        and args[0] not in VERBS
        and not args[0].startswith("-")
        and args[1].startswith("/")
    )


def _guard(args: list[str]) -> int:
    """The command's exit code; what goes wrong is told in one line."""
    mounting = bool(args) and args[0] in MOUNTING
    try:
        try:
            return _dispatch(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at the interpreter's exit nobody could catch what it raises
    except DlmfsError as error:
        complain(str(error))
        return error.mount_exit if mounting else error.exit
    except KeyboardInterrupt:
        return 8 if mounting else 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None:
            _drop_output()
            complain(f"the output cannot be written: {error.strerror}")
            return OutputFailed.mount_exit if mounting else OutputFailed.exit
        if os.environ.get("DLMFS_DEBUG"):
            tell_trace()
        complain(f"internal error: {type(error).__name__}: {error} (DLMFS_DEBUG=1 shows where)")
        return Bug.mount_exit if mounting else Bug.exit


def _drop_output() -> None:
    """What is still buffered goes nowhere, instead of failing again at the interpreter's exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("help", "-h", "--help"):
        say(*usage().splitlines())
        return 0 if args else 2
    if args[0] == "--version":
        from dlmfs import __version__

        say(f"dlmfs {__version__}")
        return 0
    verb = args.pop(0)
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"unknown verb '{verb}'{hint} (`dlmfs help` lists them)")
    if verb not in HANDING_ON:
        _fill_streams()
    return int(importlib.import_module(f"dlmfs.cli.{verb.replace('-', '_')}").run(args))


def _fill_streams() -> None:
    """What we were started without (`>&-`) is None in Python, and its number would go to the next
    file that is opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
