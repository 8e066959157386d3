"""What a mount is told: SOURCE and `-o` options, parsed and checked. Pure."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dlmfs.errors import UsageError
from dlmfs.model import Limits, Owner
from dlmfs.timing import TTL_DEFAULT_S, TTL_MAX_S, TTL_MIN_S

LIMIT_MAX: Final = 1_000_000_000
NODE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class MountOptions:
    """`-o`, with the meaning of mount(8) where it has one."""

    node: str | None = None
    owner: Owner = Owner.NODE
    ttl_s: float = TTL_DEFAULT_S
    allow_other: bool | None = None
    default_permissions: bool = True
    fsname: str | None = None
    ro: bool = False
    nodev: bool = True
    nosuid: bool = True
    noexec: bool = False
    noatime: bool = False
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One mount. `state_path` is None for a lock space in the default place."""

    source_text: str
    state_path: Path | None
    state_name: str
    mountpoint: str
    options: MountOptions


_FLAGS: Final[dict[str, dict[str, bool]]] = {
    "ro": {"ro": True},
    "rw": {"ro": False},
    "nodev": {"nodev": True},
    "nosuid": {"nosuid": True},
    "noexec": {"noexec": True},
    "exec": {"noexec": False},
    "noatime": {"noatime": True},
    "atime": {"noatime": False},
    "allow_other": {"allow_other": True},
    "default_permissions": {"default_permissions": True},
}
_IGNORED: Final = frozenset(
    "dev suid relatime norelatime strictatime nostrictatime lazytime nolazytime diratime nodiratime"
    " sync async dirsync mand nomand silent loud defaults auto noauto user users nouser group owner"
    " _netdev nofail iversion noiversion".split()
)
"""Accepted from mount(8) and fstab without effect; `dev` and `suid` are what it passes for
`defaults`, and a lock's file is never a device or a program."""
_VALUED: Final = ("node", "owner", "ttl", "fsname", "subtype")
_LIMITS: Final = tuple(Limits.__dataclass_fields__)
KNOWN: Final = tuple(sorted({*_FLAGS, *_IGNORED, *_VALUED, *_LIMITS}))


def split(text: str) -> list[str]:
    """The options of one `-o`; a backslash takes the special meaning from a comma."""
    parts = re.findall(r"(?:\\.|[^,\\]|\\$)+", text)
    return [re.sub(r"\\(.)", r"\1", part) for part in parts]


def parse_options(texts: list[str]) -> MountOptions:
    """Parse all `-o` arguments; the last of duplicates wins. Raises UsageError by name."""
    options = MountOptions()
    for option in (o for text in texts for o in split(text)):
        name, equals, value = option.partition("=")
        if equals and name in _LIMITS:
            options = replace(options, limits=_limited(options.limits, name, value))
        elif equals and name in _VALUED:
            options = _valued(options, name, value)
        elif not equals and name in _FLAGS:
            options = replace(options, **_FLAGS[name])  # type: ignore[arg-type]
        elif (
            (not equals and name in _IGNORED) or name.startswith(("x-", "X-")) or name == "comment"
        ):
            continue
        else:
            raise UsageError(_unknown(option, name))
    return options


def _unknown(option: str, name: str) -> str:
    close = difflib.get_close_matches(name, KNOWN, 1)
    if name in KNOWN:
        takes = "no" if name in _FLAGS or name in _IGNORED else "a"
        return f"mount option '{option}': '{name}' takes {takes} value"
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown mount option '{option}'{hint} (`dlmfs mount --help` lists them)"


def _valued(options: MountOptions, name: str, value: str) -> MountOptions:
    if name == "node":
        if not NODE_NAME.fullmatch(value):
            raise UsageError(
                f"node name '{value}': use up to 63 letters, digits, '.', '_', '-', starting with "
                "a letter or digit"
            )
        return replace(options, node=value)
    if name == "owner":
        try:
            return replace(options, owner=Owner(value))
        except ValueError:
            raise UsageError(f"owner={value}: choose owner=node or owner=file") from None
    if name == "ttl":
        try:
            ttl = float(value)
        except ValueError:
            ttl = 0.0
        if not TTL_MIN_S <= ttl <= TTL_MAX_S:
            raise UsageError(f"ttl={value}: give seconds from {TTL_MIN_S:g} to {TTL_MAX_S:g}")
        return replace(options, ttl_s=ttl)
    if name == "fsname":
        return replace(options, fsname=value)
    if value != "dlmfs":
        raise UsageError(f"subtype={value}: this is dlmfs")
    return options


def _limited(limits: Limits, name: str, value: str) -> Limits:
    most = 100 if name == "user_share" else LIMIT_MAX
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= most):
        raise UsageError(f"{name}={value}: give a whole number from 1 to {most}")
    return replace(limits, **{name: int(value)})


def parse_source(text: str) -> tuple[Path | None, str]:
    """The state file (None: the default place) and the lock space's name.

    Raises UsageError for anything but local, local:NAME and local:/path.
    """
    if text == "local":
        return None, "default"
    if text.startswith("local:"):
        rest = text.removeprefix("local:")
        if rest.startswith("/"):
            return Path(rest), ""
        if "/" in rest:
            raise UsageError(f"SOURCE '{text}': give the state file's absolute path")
        if rest:
            return None, rest
        raise UsageError("SOURCE 'local:' needs a NAME or a /path after the colon")
    if text.startswith("etcd://"):
        if "@" in text:
            raise UsageError("SOURCE: a password in the URL is refused; it would be seen in ps")
        raise UsageError("SOURCE etcd://: this version has the embedded engine only; use local")
    raise UsageError(f"SOURCE '{text}' is not known: use local, local:NAME or local:/path/state.db")
