"""What domains and locks can be called, and what is wrong with a name that none can have. Pure, and quick
to import.

A lock's name may be as long as a file's on any Linux file system: a UUID, a hash, a pod's name fit. (The
kernel's dlmfs has 31 bytes, a bound of its lock manager; libo2dlm keeps to it by itself.) A domain's
has the kernel's 63: it is in every key of the store, and is written by a person.
"""

from __future__ import annotations

from typing import Final

LOCK_NAME_MAX: Final = 255
"""Bytes: NAME_MAX of Linux."""

DOMAIN_NAME_MAX: Final = 63
"""Bytes."""


def is_domain(name: bytes) -> bool:
    """Whether a domain can be called so."""
    return domain_fault(name) is None


def is_lock(name: bytes) -> bool:
    """Whether a lock in the store can be called so; that none is *made* whose name begins with '$' is
    the file system's own rule."""
    return _fault("lock", name, LOCK_NAME_MAX) is None


def domain_fault(name: bytes) -> str | None:
    """Why no domain can be called so, in words; None if one can."""
    return _fault("domain", name, DOMAIN_NAME_MAX)


def lock_fault(name: bytes) -> str | None:
    """Why no lock can be made that is called so, in words; None if one can."""
    if name.startswith(b"$"):
        return "the name of a lock cannot begin with '$'"
    return _fault("lock", name, LOCK_NAME_MAX)


def _fault(what: str, name: bytes, most: int) -> str | None:
    if not name:
        return f"the name of a {what} cannot be empty"
    if len(name) > most:
        return f"the name of a {what} has up to {most} bytes, this one has {len(name)}"
    if b"/" in name or b"\0" in name:
        return f"the name of a {what} cannot contain a slash or a zero byte"
    return None
