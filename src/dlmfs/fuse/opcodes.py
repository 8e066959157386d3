"""Numbers of the FUSE protocol (Linux `include/uapi/linux/fuse.h`, 7.32 to 7.45). No code."""

from __future__ import annotations

from typing import Final

MAJOR: Final = 7
MINOR: Final = 45
"""The newest minor version whose structures this package knows."""
MINOR_MIN: Final = 23
"""The oldest whose structures have the sizes that `wire` uses. Linux 5.10 speaks 7.32."""

ROOT_NODE: Final = 1

# Requests.
LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
GETLK: Final = 31
SETLK: Final = 32
SETLKW: Final = 33
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
BMAP: Final = 37
DESTROY: Final = 38
IOCTL: Final = 39
POLL: Final = 40
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SETUPMAPPING: Final = 48
REMOVEMAPPING: Final = 49
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52
COPY_FILE_RANGE_64: Final = 53

UNANSWERED: Final = frozenset({FORGET, BATCH_FORGET, INTERRUPT, NOTIFY_REPLY})
"""Requests to which the kernel wants no reply, not even an error."""

# Notifications: the daemon speaks first.
NOTIFY_POLL: Final = 1
NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_DELETE: Final = 6

# INIT flags.
DONT_MASK: Final = 1 << 6
"""MKDIR and MKNOD bring the mode as it was asked for, and the umask beside it."""
PARALLEL_DIROPS: Final = 1 << 18
HANDLE_KILLPRIV: Final = 1 << 19
ABORT_ERROR: Final = 1 << 21
INIT_EXT: Final = 1 << 30

# SETATTR: which members are valid.
FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8

GETATTR_FH: Final = 1 << 0
FSYNC_DATASYNC: Final = 1 << 0
POLL_SCHEDULE_NOTIFY: Final = 1 << 0

# OPEN and OPENDIR replies.
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NONSEEKABLE: Final = 1 << 2
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_STREAM: Final = 1 << 4
FOPEN_NOFLUSH: Final = 1 << 5

ERRNO_MAX: Final = 511
"""The kernel refuses a reply with a larger errno, and the request then stays unanswered."""
