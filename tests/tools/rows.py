"""What the standard tools do on a dlmfs mount, as data: each row is a test and a line of the docs.

LOCK is a lock's file, DOMAIN its folder, MOUNT the mount point; SMALL is a file of six bytes and
BIG one of 100 outside of the mount, ARCHIVE a tar file that has a file named as the lock, OUT a
name outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FINE: Final = "works"
SAME: Final = "the same"
WAITS: Final = "waits"


@dataclass(frozen=True, slots=True)
class Row:
    """One tool and one way to use it.

    `takes` is what it takes of an idle lock: nothing, shared, exclusive, or with "try" in front
    if it does not wait. `idle` is FINE or the words of its complaint; `busy`, while another node
    holds the lock exclusively, is SAME, WAITS, FINE, or the words of its complaint. `shows` is
    part of what it writes on an idle lock.
    """

    tool: str
    command: str
    takes: str = "nothing"
    idle: str = FINE
    busy: str = SAME
    shows: str = ""
    package: str = ""


def _look() -> list[Row]:
    """Tools that look at names and attributes only."""
    return [
        Row("ls", "ls MOUNT DOMAIN"),
        Row("ls", "ls -l DOMAIN", shows=" 64 "),
        Row("ls", "ls -lZ LOCK"),
        Row("stat", "stat LOCK", shows="Size: 64"),
        Row("stat", "stat -f MOUNT", shows="Namelen: 255"),
        Row("find", "find MOUNT -type f -size 64c", shows="/dom/"),
        Row("du", "du -a MOUNT"),
        Row("df", "df MOUNT", shows="local:"),
        Row("mountpoint", "mountpoint MOUNT", shows="is a mountpoint"),
        Row("findmnt", "findmnt -n MOUNT", shows="fuse.dlmfs"),
        Row("test", "test -r LOCK -a -s LOCK"),
        Row("realpath", "realpath LOCK"),
        Row("getfattr", "getfattr -d LOCK", package="attr"),
        Row("getfattr", "getfattr -n user.dlmfs.mode LOCK", shows="user.dlmfs", package="attr"),
        Row("getfacl", "getfacl -p LOCK", shows="user::rw-", package="acl"),
        Row("lsof", "lsof LOCK", idle="", package="lsof"),
        Row("fuser", "fuser LOCK", idle="", package="psmisc"),
        Row("inotifywait", WATCH, package="inotify-tools"),
        Row("busybox", "busybox ls -l DOMAIN", shows=" 64 ", package="busybox"),
        Row("busybox", "busybox stat LOCK", package="busybox"),
    ]


WATCH: Final = (
    "inotifywait -e attrib LOCK 2>OUT & "
    "until grep -q established OUT; do sleep 0.02; done; chmod 640 LOCK; wait $!"
)
"""It is told of what this mount does to the file; the change comes once it listens."""


def _change() -> list[Row]:
    """Tools that change names and attributes, or would like to."""
    unable, unsupported = "Operation not permitted", "Operation not supported"
    return [
        Row("chmod", "chmod 600 LOCK"),
        Row("chown", "chown 1:1 LOCK"),
        Row("touch", "touch -c LOCK"),
        Row("busybox", "busybox touch LOCK", package="busybox"),
        Row("ln", "ln LOCK DOMAIN/new", idle=unable),
        Row("ln", "ln -s LOCK DOMAIN/new", idle=unable),
        Row("mv", "mv LOCK DOMAIN/new", idle=unable),
        Row("mv", "mv DOMAIN MOUNT/new", idle=unable),
        Row("mkfifo", "mkfifo DOMAIN/new", idle=unable),
        Row("setfattr", "setfattr -n user.x -v 1 LOCK", idle=unsupported, package="attr"),
        Row("setfacl", "setfacl -m u:1:r LOCK", idle=unsupported, package="acl"),
        Row("rm", "rm LOCK"),
        Row("rm", "rm -r DOMAIN"),
        Row("rmdir", "rmdir DOMAIN", idle="Directory not empty"),
        Row("find", "find DOMAIN -type f -delete"),
    ]


def _read() -> list[Row]:
    """Tools that read: each opens the file, and so takes the lock."""
    unable = "Operation not supported"
    refused = "Text file busy"
    return [
        Row("cat", "cat LOCK", "shared", busy=WAITS),
        Row("head", "head -c 4 LOCK", "shared", busy=WAITS),
        Row("wc", "wc -c LOCK", "shared", busy=WAITS, shows="64"),
        Row("grep", "grep -c x LOCK", "shared", idle="", busy=WAITS),
        Row("grep", "grep -rc x DOMAIN", "try shared", idle="", busy=refused),
        Row("cmp", "cmp LOCK SMALL", "shared", idle="", busy=WAITS),
        Row("dd", "dd if=LOCK of=OUT", "shared", busy=WAITS),
        Row("dd", "dd if=LOCK of=OUT iflag=nonblock", "try shared", busy=refused),
        Row("cp", "cp LOCK OUT", "shared", busy=WAITS),
        Row("cp", "cp -a LOCK OUT", "shared", busy=WAITS),
        Row("cp", "cp -r DOMAIN OUT", "shared", busy=WAITS),
        Row("mv", "mv LOCK OUT", "shared", busy=WAITS),
        Row("rsync", "rsync -a LOCK OUT", "shared", busy=WAITS, package="rsync"),
        Row("rsync", "rsync -a DOMAIN/ OUT", "shared", busy=WAITS, package="rsync"),
        Row("tar", "tar cPf OUT DOMAIN", "try shared", busy=refused),
        Row("flock", "flock LOCK true", "shared", busy=WAITS),
        Row("flock", "flock -n LOCK true", "shared", busy=WAITS),
        Row("sync", "sync LOCK", "try shared", busy=refused),
        Row("lsattr", "lsattr LOCK", "try shared", idle=unable, busy=refused, package="e2fsprogs"),
        Row(
            "chattr", "chattr +i LOCK", "try shared", idle=unable, busy=refused, package="e2fsprogs"
        ),
        Row("sed", "sed -i s/a/b/ LOCK", "shared", idle="cannot rename", busy=WAITS),
        Row("bash", "bash -c ': <LOCK'", "shared", busy=WAITS, package="bash"),
        Row("dash", "dash -c ': <LOCK'", "shared", busy=WAITS, package="dash"),
        Row("busybox", "busybox sh -c ': <LOCK'", "shared", busy=WAITS, package="busybox"),
        Row("busybox", "busybox cat LOCK", "shared", busy=WAITS, package="busybox"),
    ]


def _write() -> list[Row]:
    """Tools that write: they take the lock exclusively."""
    refused, full = "Text file busy", "No space left on device"
    rows = [
        Row("touch", "touch LOCK", "try exclusive", busy=FINE),
        Row("truncate", "truncate -s 0 LOCK", "try exclusive", busy=refused),
        Row("tee", "tee LOCK <SMALL", "exclusive", busy=WAITS),
        Row("tee", "tee -a LOCK <SMALL", "exclusive", busy=WAITS),
        Row("dd", "dd if=SMALL of=LOCK", "exclusive", busy=WAITS),
        Row("dd", "dd if=SMALL of=LOCK oflag=nonblock", "try exclusive", busy=refused),
        Row("cp", "cp SMALL LOCK", "exclusive", busy=WAITS),
        Row("cp", "cp -a SMALL LOCK", "exclusive", busy=WAITS),
        Row("cp", "cp BIG LOCK", "exclusive", idle=full, busy=WAITS),
        Row("mv", "mv SMALL LOCK", "exclusive", busy=WAITS),
        Row("install", "install SMALL LOCK", "exclusive", busy=WAITS),
        Row("rsync", "rsync --inplace SMALL LOCK", "exclusive", busy=WAITS, package="rsync"),
        Row(
            "rsync",
            "rsync -I SMALL LOCK",
            "shared",
            idle="Operation not permitted",
            busy=WAITS,
            package="rsync",
        ),
        Row("tar", "tar xf ARCHIVE -C DOMAIN", "try exclusive", busy=refused),
        Row(
            "fallocate",
            "fallocate -l 10 LOCK",
            "exclusive",
            idle="Operation not supported",
            busy=WAITS,
        ),
    ]
    for shell in ("bash", "dash", "busybox sh"):
        tool = shell.split()[0]
        for how in (">", ">>", "<>"):
            command = f"{shell} -c ': {how}LOCK'"
            rows.append(Row(tool, command, "exclusive", busy=WAITS, package=tool))
    return rows


ROWS: Final = [*_look(), *_change(), *_read(), *_write()]


def phrase(row: Row, result: str) -> str:
    """One result, as the docs say it."""
    if result in (FINE, SAME, WAITS):
        return result
    return f"fails: {result}" if result else "exit 1"


def table() -> list[str]:
    """The table of the docs."""
    lines = ["| tool | command | lock | idle | held by another node |", "| --- " * 5 + "|"]
    for row in ROWS:
        command = row.command.replace("|", "\\|")
        cells = (row.tool, f"`{command}`", row.takes, phrase(row, row.idle), phrase(row, row.busy))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
