"""What keeps the cluster from taking our writes, in words, and what an operator does about it. Pure.

A lease goes on being renewed where nothing can be written any more: out of space, with corrupt data,
without the right. So what a server refuses is kept apart from what did not answer.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple


class Kind(enum.Enum):
    """By what it takes to mend it."""

    SPACE = "space"
    CORRUPT = "corrupt"
    RIGHTS = "rights"
    LEARNER = "learner"
    USER = "user"
    CERTIFICATE = "certificate"
    SILENT = "silent"


class Trouble(NamedTuple):
    """`details`: what etcd, or gRPC, said."""

    kind: Kind
    details: str

    def words(self) -> str:
        return f"{_WORDS[self.kind]} ({self.details})" if self.kind in _WORDS else self.details


REFUSALS: Final = (Kind.SPACE, Kind.CORRUPT, Kind.RIGHTS)
"""Said by the cluster, whichever member is asked."""
_WORDS: Final = {
    Kind.SPACE: "etcd is out of space and refuses writes",
    Kind.CORRUPT: "etcd has found its data corrupt and refuses writes",
    Kind.RIGHTS: "etcd does not let this user write here",
}
_SIGNS: Final = (
    ("database space exceeded", Kind.SPACE),
    ("alarm:NOSPACE", Kind.SPACE),
    ("etcdserver: corrupt", Kind.CORRUPT),
    ("alarm:CORRUPT", Kind.CORRUPT),
    ("etcdserver: permission denied", Kind.RIGHTS),
    ("supported for learner", Kind.LEARNER),
    *((words, Kind.USER) for words in ("know this user and password", "wants a user")),
    *((words, Kind.CERTIFICATE) for words in ("its certificate is", "this node's certificate")),
)

_USERS: Final = "see docs/etcd.md"
_PAGE: Final = 'docs/reference.md, "When etcd takes no writes"'
CURES: Final = {
    Kind.SPACE: f"etcdctl alarm list; compact, defrag, then etcdctl alarm disarm ({_PAGE})",
    Kind.CORRUPT: f"etcdctl alarm list; replace the member that differs, then disarm ({_PAGE})",
    Kind.RIGHTS: "as etcd's root: etcdctl role grant-permission ROLE readwrite --prefix=true dlmfs/",
    Kind.LEARNER: "etcdctl member promote, or leave it out of SOURCE until then",
    Kind.USER: f"mend credentials= (it is read again), or the password in etcd ({_USERS})",
    Kind.CERTIFICATE: f"renew what has ended, or mend ca=, cert=, key= ({_USERS})",
    Kind.SILENT: "start it, or see its log, its listen-client-urls and the firewall",
}


def kind_of(details: str) -> Kind:
    """Which trouble etcd's own words tell of; SILENT if none that is known."""
    return next((kind for sign, kind in _SIGNS if sign in details), Kind.SILENT)
