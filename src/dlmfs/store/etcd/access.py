"""From a mount's SOURCE and options to what gRPC needs: endpoints, certificates, credentials.

A secret is read from the descriptor that was looked at, and sent in clear text to nobody but this host,
unless that is asked for by name.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from dlmfs.errors import NotPermitted, UsageError
from dlmfs.store.etcd.rpc import Access

if TYPE_CHECKING:
    from dlmfs.config import EtcdSource, MountOptions

FILE_MAX: Final = 1 << 20
"""Bytes of a file with certificates; none is as long."""
ROOT: Final = 0
ROOTS_MODE: Final = 0o037
"""Bits that must not be set in a secret file of root's: he may let a group read it (0640). libpq has the
same rule, so that one file serves both."""
OWN_MODE: Final = 0o077
"""The same for one's own file (0600)."""


def _read(option: str, path: str | None, *, secret: bool = False) -> bytes | None:
    if path is None:
        return None
    try:
        # Without waiting: it may be a fifo.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise UsageError(f"{option}={path}: it is no file")
            if secret:
                _demand_secret(option, path, info)
            text = file.read(FILE_MAX + 1)
    except PermissionError:
        raise NotPermitted(f"{option}={path}: no permission to read it") from None
    except OSError as error:
        raise UsageError(f"{option}={path}: {error.strerror}") from None
    if len(text) > FILE_MAX:
        raise UsageError(f"{option}={path}: it is too large for what it should be")
    return text


def _demand_secret(option: str, path: str, info: os.stat_result) -> None:
    """Raises NotPermitted for a file that others may read, or may have written."""
    if info.st_uid not in (ROOT, os.geteuid()):
        raise NotPermitted(f"{option}={path}: it belongs to another user; make it your own")
    if info.st_mode & (ROOTS_MODE if info.st_uid == ROOT else OWN_MODE):
        raise NotPermitted(f"{option}={path}: other users may read it; `chmod 600 {path}`")


def credentials(path: str) -> tuple[str, str]:
    """User and password from a file with the line `user:password`. Raises UsageError, and
    NotPermitted if anybody else may read it."""
    text = _read("credentials", path, secret=True)
    assert text is not None
    try:
        user, colon, password = text.decode().splitlines()[0].partition(":")
    except (UnicodeDecodeError, IndexError):
        user = colon = password = ""
    if not user or not colon:
        raise UsageError(f"credentials={path}: its first line must be user:password")
    return user, password


def host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def is_here(endpoint: str) -> bool:
    """Whether what is sent to HOST:PORT stays on this host, whoever answers there."""
    host = host_of(endpoint)
    try:
        if host != "localhost":
            return _is_loopback(host)
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (ValueError, OSError):  # another host's name, or not even this one is known
        return False
    return all(_is_loopback(str(address[0])) for *_, address in found)


def _is_loopback(address: str) -> bool:
    """Raises ValueError for what is no address."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def access(source: EtcdSource, options: MountOptions) -> Access:
    """Raises UsageError for files that cannot be read or do not go together, and for a password that
    would be sent in clear text."""
    if options.ca is None and (options.cert or options.key):
        raise UsageError("cert= and key= need ca= as well: without it nothing is encrypted")
    if (options.cert is None) != (options.key is None):
        raise UsageError("cert= and key= go together: give both or none")
    user, password = None, ""
    if options.credentials is not None:
        if options.ca is None and not options.insecure_password:
            for endpoint in source.endpoints:
                if not is_here(endpoint):
                    raise UsageError(
                        f"credentials= without ca= would send the password to {endpoint} in clear text: "
                        "give ca=FILE, or insecure-password if nobody else is on that network"
                    )
        user, password = credentials(options.credentials)
    return Access(
        source.endpoints,
        _read("ca", options.ca),
        _read("cert", options.cert),
        _read("key", options.key, secret=True),
        user,
        password,
    )
