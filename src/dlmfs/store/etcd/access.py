"""From a mount's SOURCE and options to what gRPC needs: endpoints, certificates, credentials."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from dlmfs.errors import NotPermitted, UsageError
from dlmfs.store.etcd.rpc import Access

if TYPE_CHECKING:
    from dlmfs.config import EtcdSource, MountOptions


def _read(option: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except PermissionError:
        raise NotPermitted(f"{option}={path}: no permission to read it") from None
    except OSError as error:
        raise UsageError(f"{option}={path}: {error.strerror}") from None


def credentials(path: str) -> tuple[str, str]:
    """User and password from a file with the line `user:password`. Raises UsageError, and
    NotPermitted if anybody else may read it."""
    text = _read("credentials", path)
    assert text is not None
    if os.stat(path).st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise NotPermitted(f"credentials={path}: other users may read it; `chmod 600 {path}`")
    try:
        user, colon, password = text.decode().splitlines()[0].partition(":")
    except (UnicodeDecodeError, IndexError):
        user = colon = password = ""
    if not user or not colon:
        raise UsageError(f"credentials={path}: its first line must be user:password")
    return user, password


def access(source: EtcdSource, options: MountOptions) -> Access:
    """Raises UsageError for files that cannot be read or do not go together."""
    if options.ca is None and (options.cert or options.key):
        raise UsageError("cert= and key= need ca= as well: without it nothing is encrypted")
    if (options.cert is None) != (options.key is None):
        raise UsageError("cert= and key= go together: give both or none")
    user, password = None, ""
    if options.credentials is not None:
        user, password = credentials(options.credentials)
    return Access(
        source.endpoints,
        _read("ca", options.ca),
        _read("cert", options.cert),
        _read("key", options.key),
        user,
        password,
    )
