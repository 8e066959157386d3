"""From a mount's SOURCE and options to what gRPC needs: endpoints, certificates, credentials.

Rules of this file
------------------
* A secret is read from the descriptor that was looked at, and sent in clear text to nobody but this
  host, unless that is asked for by name.
* What root's daemon reads again, long after root gave the paths, lies where nobody else could have put
  another file since.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from dlmfs import folders
from dlmfs.errors import BadState, NotPermitted, UsageError
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


_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Without waiting: it may be a fifo."""


def _read(
    option: str, path: str | None, *, secret: bool = False, again: bool = False
) -> bytes | None:
    if path is None:
        return None
    try:
        fd = _found(path) if again and os.geteuid() == ROOT else os.open(path, _OPEN)
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise UsageError(f"{option}={path}: it is no file")
            if secret:
                _demand_secret(option, path, info)
            text = file.read(FILE_MAX + 1)
    except BadState as error:
        raise NotPermitted(f"{option}={path} is not read again: {error}") from None
    except PermissionError:
        raise NotPermitted(f"{option}={path}: no permission to read it") from None
    except OSError as error:
        raise UsageError(f"{option}={path}: {error.strerror}") from None
    if len(text) > FILE_MAX:
        raise UsageError(f"{option}={path}: it is too large for what it should be")
    return text


def _found(path: str) -> int:
    """Open a file that only root can have put there. Raises BadState, OSError."""
    found = folders.walk(path)
    try:
        return os.open(found.name or ".", _OPEN | os.O_NOFOLLOW, dir_fd=found.fd)
    finally:
        os.close(found.fd)


def _demand_secret(option: str, path: str, info: os.stat_result) -> None:
    """Raises NotPermitted for a file that others may read, or may have written."""
    if info.st_uid not in (ROOT, os.geteuid()):
        raise NotPermitted(f"{option}={path}: it belongs to another user; make it your own")
    if info.st_mode & (ROOTS_MODE if info.st_uid == ROOT else OWN_MODE):
        raise NotPermitted(f"{option}={path}: other users may read it; `chmod 600 {path}`")


def credentials(path: str, *, again: bool = False) -> tuple[str, str]:
    """User and password from a file with the line `user:password`. Raises UsageError, and
    NotPermitted if anybody else may read it."""
    text = _read("credentials", path, secret=True, again=again)
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


def access(source: EtcdSource, options: MountOptions, *, again: bool = False) -> Access:
    """`again`: not for the first time. Raises UsageError for files that cannot be read or do not go
    together, and for a password that would be sent in clear text; NotPermitted."""
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
        user, password = credentials(options.credentials, again=again)
    ca = _read("ca", options.ca, again=again)
    cert = _read("cert", options.cert, again=again)
    key = _read("key", options.key, secret=True, again=again)
    if ca is not None:
        _demand_authorities(f"ca={options.ca}", ca)
    if cert is not None and key is not None:
        _demand_pair(f"cert={options.cert}", f"key={options.key}", cert, key)
    return Access(source.endpoints, ca, cert, key, user, password)


@functools.lru_cache(maxsize=1)
def _demand_authorities(option: str, text: bytes) -> None:
    """Raises UsageError for what is no list of certificates, or one that breaks off."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text.decode())
    except (ssl.SSLError, ValueError):
        raise UsageError(f"{option}: there is no whole certificate in it (PEM)") from None
    if text.count(b"-----BEGIN") != text.count(b"-----END"):
        raise UsageError(f"{option}: it breaks off in the middle of a certificate")


@functools.lru_cache(maxsize=1)  # what is read again is the same, most of the time
def _demand_pair(cert_option: str, key_option: str, cert: bytes, key: bytes) -> None:
    """Raises UsageError unless the key is that of the certificate: of files that are being renewed one
    may be the new one already."""
    import ssl

    memory = os.memfd_create("pair", os.MFD_CLOEXEC)  # for OpenSSL, which takes paths only
    try:
        os.write(memory, cert + b"\n" + key)
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            f"/proc/self/fd/{memory}", password=lambda: ""
        )
    except (ssl.SSLError, OSError, ValueError):
        raise UsageError(
            f"{cert_option} and {key_option} do not belong together, or are not whole (PEM, without a "
            "passphrase)"
        ) from None
    finally:
        os.close(memory)
