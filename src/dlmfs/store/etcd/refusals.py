"""What an error of gRPC or etcd means: whether a request may have been applied, and what is said."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import grpc

from dlmfs.errors import Bug, DlmfsError, LockLost, NotPermitted, NotTrusted, OutcomeUnknown
from dlmfs.store.etcd.trouble import CURES, REFUSALS, Kind, Trouble, kind_of

NO_USER: Final = "user name is empty"
WRONG_USER: Final = "authentication failed"
OLD_REVISION: Final = "revision of auth store is old"
NOT_ENABLED: Final = "authentication is not enabled"

_UNVERIFIED: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]*)")
_ALERT: Final = re.compile(r"_ALERT_([A-Z_]+)")


class LoginRefused(NotPermitted):
    """The server does not know who asks, so nothing was applied. An operator's next step mends it, if he
    changes a password or switches users on."""


class Meaning(NamedTuple):
    """`error`: for the caller. `trouble`: what is wrong with the store, for people; None if nothing is.
    `broken`: whether another member may do better."""

    error: DlmfsError
    trouble: str | None = None
    broken: bool = False


def meaning(code: grpc.StatusCode, details: str, endpoint: str) -> Meaning:
    """Of what the server at `endpoint` answered, or gRPC in its stead."""
    invalid = code is grpc.StatusCode.INVALID_ARGUMENT
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return Meaning(LockLost("the lease has ended"))
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        cure = CURES[Kind.RIGHTS] if kind_of(details) is Kind.RIGHTS else "see -o credentials=FILE"
        says = f"etcd at {endpoint} refuses this user ({details}): {cure}"
        return Meaning(NotPermitted(says), details)
    if invalid and NO_USER in details:
        says = f"etcd at {endpoint} wants a user and a password: give -o credentials=FILE"
        return Meaning(LoginRefused(says), says)
    if invalid and OLD_REVISION not in details:
        return Meaning(Bug(f"etcd refused a request: {details}"))
    if (kind := kind_of(details)) in REFUSALS:
        words = f"{endpoint}: {Trouble(kind, details).words()}"
        # Not definite: "no space" is said after applying, too (protocol-traps 14).
        return Meaning(OutcomeUnknown(words), details)
    distrust = tls(details)
    says = f"etcd at {endpoint} did not answer ({distrust or details})"
    # A certificate may not be good yet while this host's clock is behind: at boot, say.
    lasting = distrust is not None and "not yet valid" not in distrust
    unknown = NotTrusted(says) if lasting else OutcomeUnknown(says)
    return Meaning(unknown, distrust or f"{code.name.lower()}: {details}", broken=True)


def tls(details: str) -> str | None:
    """In words, what failed between two who should have proved to each other who they are; None if
    nothing did."""
    if found := _UNVERIFIED.search(details):
        return f"its certificate is not accepted ({found[1].strip()}): see ca=FILE, and what it presents"
    if found := _ALERT.search(details):
        return (
            f"it refuses this node's certificate ({found[1].replace('_', ' ').lower()}): "
            "see cert=FILE, whether it has ended, and whom the server believes"
        )
    return None
