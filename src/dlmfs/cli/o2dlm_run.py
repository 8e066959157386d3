"""`dlmfs o2dlm-run [-m MOUNTPOINT] [--at DIR | --bare] [--] PROGRAM [ARG...]`: programs of OCFS2's."""

from __future__ import annotations

import argparse
import os
import signal
from typing import Final

from dlmfs.cli.choice import choose
from dlmfs.cli.parser import Parser
from dlmfs.cli.say import complain
from dlmfs.errors import UsageError
from dlmfs.launch import namespace, seccomp, statfs

DESCRIPTION: Final = """\
Run an unmodified program that uses libo2dlm, linked statically or not, on a dlmfs mount: it and all
that it starts see dlmfs mounts as the kernel's own dlmfs, BASTs are announced, and the mount is also
found at /dlm. PROGRAM takes the place of this command: its signals and its exit code are its own."""

CANNOT_RUN: Final = 126
NOT_FOUND: Final = 127
"""As env(1) and the shells."""


def run(args: list[str]) -> int:
    """Does not return, but if PROGRAM cannot be started."""
    parser = Parser(
        prog="dlmfs o2dlm-run",
        usage="dlmfs o2dlm-run [-m MOUNTPOINT] [--at DIR | --bare] [--] PROGRAM [ARG...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", metavar="MOUNTPOINT", help="which mount, where there are several")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--at", metavar="DIR", default="/dlm", help="where PROGRAM finds it too (default /dlm)"
    )
    how.add_argument(
        "--bare",
        action="store_true",
        help="no namespace: no mount at a fixed place and no BASTs, only the file system's type",
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(args)
    program = parsed.program[1:] if parsed.program[:1] == ["--"] else parsed.program
    if not program:
        raise UsageError("which program? (see `dlmfs o2dlm-run --help`)")
    numbers = statfs.numbers()
    mountpoint = choose(parsed.m).mountpoint
    if not parsed.bare:
        namespace.enter(mountpoint, os.path.abspath(parsed.at))
    with statfs.start(mountpoint) as supervisor:
        statfs.hand_over(supervisor, seccomp.install(numbers))
    return _become(program)


def _become(program: list[str]) -> int:
    for sign in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and that is inherited
        signal.signal(sign, signal.SIG_DFL)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        complain(f"{program[0]}: {error.strerror}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
