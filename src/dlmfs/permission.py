"""What an asker may be told: what the modes and owners of the mount's own files let him see.

Rules of this file
------------------
* Each door to a thing has the same lock: what the kernel keeps from a user who opens, lists or reads
  attributes, no question to the daemon tells him. `may` is the kernel's rule, and everything here
  is made of it.
* To know a lock (its value, who holds it, who waits) its file must be readable, as for its extended
  attributes. Where this node has no such file, he must be able to make it, and to read what he made:
  `-o uid=` and its like may give it to somebody else.
* A lock or domain is told to somebody who did not name it only if listing the folders would tell it.
* What is hidden is counted, never named.
* Root and the user who mounted may know everything.

Other nodes answer this node, not its users: this node's tree decides what of their answers is told.
Folders above the mount point are not looked at: a look may hang, and there may be other ways to a mount.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dlmfs import proc
from dlmfs.errors import NotPermitted, UsageError
from dlmfs.fs.tree import Directory, Inode
from dlmfs.fuse import mountinfo
from dlmfs.names import domain_fault, lock_fault

if TYPE_CHECKING:
    from dlmfs.fs.tree import Tree

READ: Final = 4
WRITE: Final = 2
SEARCH: Final = 1

Facts = dict[str, Any]


class Asker(NamedTuple):
    """Who asks, as the kernel names the process that connected. `trusted`: root, or the user who
    mounted."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    trusted: bool = False


def may(asker: Asker, inode: Inode, want: int) -> bool:
    """Whether the kernel would let the asker do `want` (READ, WRITE, SEARCH) with an inode that he
    reaches by its path (path_resolution(7), "Permissions")."""
    if asker.trusted:
        return True
    if inode.parent is not None and not may(asker, inode.parent, SEARCH):
        return False
    if asker.uid == inode.uid:
        granted = inode.mode >> 6
    elif inode.gid == asker.gid or inode.gid in asker.groups:
        granted = inode.mode >> 3
    else:
        granted = inode.mode
    return granted & want == want


class Sight:
    """What one asker may be told of one mount. `secret`: the host keeps its users' processes from
    each other (see `hides_processes`)."""

    def __init__(self, asker: Asker, tree: Tree, *, secret: bool = False) -> None:
        self.asker = asker
        self.tree = tree
        self.secret = secret and not asker.trusted

    @property
    def whole(self) -> bool:
        """Nothing is hidden from this asker."""
        return self.asker.trusted

    def _domain(self, name: bytes) -> Directory | None:
        found = self.tree.root.children.get(name)
        return found if isinstance(found, Directory) else None

    # -- named by the asker -----------------------------------------------------------------------

    def knows(self, domain: bytes, lock: bytes) -> bool:
        """Whether he may know all about this lock."""
        if self.whole:
            return True
        folder: Inode | None = self._domain(domain)
        if folder is None:
            folder = self._made(self.tree.root, domain, stat.S_IFDIR)
        if folder is None:
            return False
        assert isinstance(folder, Directory)
        file = folder.children.get(lock) or self._made(folder, lock, stat.S_IFREG)
        return file is not None and may(self.asker, file, READ)

    def _made(self, folder: Directory, name: bytes, kind: int) -> Inode | None:
        """What he would make there, as open as he could; None if he may not."""
        if not may(self.asker, folder, WRITE | SEARCH):
            return None
        mode = kind | stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO
        made = self.tree.draft(folder, name, mode, self.asker.uid, self.asker.gid)
        if made.uid == self.asker.uid:
            made.mode |= stat.S_IRWXU  # its owner may chmod it
        return made

    def demand(self, domain: bytes, lock: bytes) -> None:
        """Raises NotPermitted where `knows` says no, UsageError for what is no lock's name. Which of
        the two, and the words, tell nothing of what is there."""
        for fault in (domain_fault(domain), lock_fault(lock)):
            if fault is not None:
                raise UsageError(fault)
        if not self.knows(domain, lock):
            raise NotPermitted(
                f"the modes and owners on the mount do not let user {self.asker.uid} read this lock"
            )

    # -- not named by him --------------------------------------------------------------------------

    def names(self, domain: bytes) -> bool:
        """Whether he may hear of a domain that he has not named."""
        if self.whole:
            return True
        folder = self._domain(domain)
        return (
            folder is not None
            and may(self.asker, self.tree.root, READ)
            and may(self.asker, folder, SEARCH)
        )

    def lists(self, domain: bytes) -> Callable[[bytes], bool]:
        """Which locks of a domain he may hear of without having named them."""
        if self.whole:
            return _everything
        folder = self._domain(domain)
        if folder is None or not self.names(domain) or not may(self.asker, folder, READ):
            return _nothing
        files = folder.children

        def listed(lock: bytes) -> bool:
            file = files.get(lock)
            return file is not None and may(self.asker, file, READ)

        return listed

    # -- processes ---------------------------------------------------------------------------------

    def claim(self, told: Facts, *, elsewhere: bool = False, secret: bool | None = None) -> Facts:
        """A claim's row for this asker: without the process where that is another user's business.
        `elsewhere`: the process is on another host, whose users are not ours; `secret`: that host keeps
        them from each other (default: as this one)."""
        hide = self.secret if secret is None else secret and not self.whole
        if not hide or not told["pid"] or (not elsewhere and self._is_own(told["pid"])):
            return told
        hidden: Facts = {"pid": 0, "command": "", "thread": 0, "run": ""}
        return told | {key: value for key, value in hidden.items() if key in told}

    def _is_own(self, pid: int) -> bool:
        return proc.user(pid) == self.asker.uid


def _everything(_lock: bytes) -> bool:
    return True


def _nothing(_lock: bytes) -> bool:
    return False


def hides_processes() -> bool:
    """Whether this host's /proc keeps processes from other users (proc(5), "hidepid")."""
    for entry in mountinfo.mounts():
        if entry.fstype == "proc" and entry.mountpoint == "/proc":
            for option in entry.super_options:
                if option.startswith("hidepid="):
                    return option.removeprefix("hidepid=") not in ("0", "off")
    return False
