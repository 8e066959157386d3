"""What a mount is told: SOURCE and `-o` options, parsed and checked. Pure, but for the names of users and
groups, which this host's tables tell."""

from __future__ import annotations

import difflib
import grp
import pwd
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlmfs.errors import UsageError
from dlmfs.model import NODE_NAME, DeadValue, HolderRule, Limits, OnLost
from dlmfs.modes import Modes
from dlmfs.timing import GRACE_S, TTL_DEFAULT_S, TTL_MAX_S, TTL_MIN_S

LIMIT_MAX: Final = 1_000_000_000
LOGS: Final = ("stderr", "syslog")
LOG_LEVELS: Final = ("error", "warning", "info", "debug")
ID_MAX: Final = (1 << 32) - 2
"""The largest user or group id; the next one is "no change" to chown(2)."""
RUN_MAX: Final = 88
"""A socket's path has 107 bytes (unix(7))."""
DELAY_MAX_S: Final = 3600.0
FORGET_MAX_S: Final = 365 * 86400.0
RETRY_MAX_S: Final = 1_000_000.0
RETRY_S: Final = 60.0
"""How long mounting waits for an etcd that is not there yet: longer than it takes to start or to elect a
leader, and less than the 90 s that a service manager gives us, so that the reason is told by us."""
ETCD_PORT: Final = 2379
ENDPOINT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
CLUSTER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


DEFAULT_LIMITS: Final = Limits()
DEFAULT_MODES: Final = Modes()


@dataclass(frozen=True, slots=True)
class MountOptions:
    """`-o`, with the meaning of mount(8) where it has one."""

    node: str | None = None
    holder: HolderRule = HolderRule.NODE
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
    modes: Modes = DEFAULT_MODES
    lock_delay_s: float | None = None
    """None: `lock_delay_of` says."""
    grace_s: float = GRACE_S
    forget_s: float | None = None
    """None: files stay that nobody uses, but for transient ones."""
    dead_value: DeadValue = DeadValue.KEEP
    on_lost: OnLost = OnLost.NONE
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    credentials: str | None = None
    insecure_password: bool = False
    retry_s: float | None = None
    """None: `retry_of` says."""
    bg: bool = False
    run: str | None = None
    """The folder of control socket and deadline; None: the default one (`rundir`)."""
    log: str | None = None
    """"stderr", "syslog" or a file; None: as it is usual for a daemon, or in the foreground."""
    log_level: str | None = None
    log_json: bool = False


@dataclass(frozen=True, slots=True)
class LocalSource:
    """The embedded engine. `path` is None for a lock space in the default place."""

    path: Path | None
    name: str


@dataclass(frozen=True, slots=True)
class EtcdSource:
    """A cluster on etcd: its members as HOST:PORT, and the name of the lock space there."""

    endpoints: tuple[str, ...]
    cluster: str


Source = LocalSource | EtcdSource


def lock_delay_of(source: Source, options: MountOptions) -> float:
    """Seconds between the notice of a node's death and the grant of its locks to others. By default what
    holders have at an end in order, where a death leaves them no time: on one host it is known at
    once. A lease gives them that time before it runs out, and so does who ends it earlier."""
    if options.lock_delay_s is not None:
        return options.lock_delay_s
    return 0.0 if isinstance(source, EtcdSource) else GRACE_S


def retry_of(options: MountOptions) -> float:
    """Seconds that the mounting process waits for a store that is not there. With `bg` none: then the
    mount stands without it, and goes on waiting."""
    if options.retry_s is not None:
        return options.retry_s
    return 0.0 if options.bg else RETRY_S


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One mount."""

    source_text: str
    source: Source
    mountpoint: str
    options: MountOptions
    words: tuple[str, ...] = ()
    """What `options` was made of: those that were given, one by one."""
    log_to: str = "stderr"
    """Where the log goes: as the option `log`, or "nowhere"."""


_MOUNT_FLAGS: Final[dict[str, dict[str, object]]] = {
    "ro": {"ro": True},
    "rw": {"ro": False},
    "nodev": {"nodev": True},
    "nosuid": {"nosuid": True},
    "noexec": {"noexec": True},
    "exec": {"noexec": False},
    "noatime": {"noatime": True},
    "atime": {"noatime": False},
}
"""Mount flags, as mount(8) names them."""
_OWN_FLAGS: Final[dict[str, dict[str, object]]] = {
    "allow_other": {"allow_other": True},
    "default_permissions": {"default_permissions": True},
    "insecure-password": {"insecure_password": True},
    "bg": {"bg": True},
    "fg": {"bg": False},
}
_FLAGS: Final = {**_MOUNT_FLAGS, **_OWN_FLAGS}
_IGNORED: Final = frozenset(
    "dev suid relatime norelatime strictatime nostrictatime lazytime nolazytime diratime nodiratime"
    " sync async dirsync mand nomand silent loud defaults auto noauto user users nouser nousers"
    " group nogroup owner noowner _netdev nofail iversion noiversion symfollow nosymfollow".split()
)
"""Accepted from mount(8) and fstab without effect; `dev` and `suid` are what it passes for
`defaults`, and a lock's file is never a device or a program."""


def split(text: str) -> list[str]:
    """The options of one `-o`; a backslash takes the special meaning from a comma."""
    parts = re.findall(r"(?:\\.|[^,\\]|\\$)+", text)
    return [re.sub(r"\\(.)", r"\1", part) for part in parts]


def parse_options(texts: list[str]) -> MountOptions:
    """Parse all `-o` arguments; the last of duplicates wins. Raises UsageError by name."""
    return options_of(split_all(texts))


def split_all(texts: list[str]) -> list[str]:
    """The options of all `-o` arguments."""
    return [word for text in texts for word in split(text)]


def options_of(words: Iterable[str]) -> MountOptions:
    """The same of options that are split already."""
    found: dict[str, object] = {}
    for word in words:
        found |= settings(word)
    limits = Limits(**{name: found.pop(name) for name in _LIMITS if name in found})  # type: ignore[arg-type]
    modes = Modes(**{name: found.pop(name) for name in _MODES if name in found})  # type: ignore[arg-type]
    return MountOptions(**found, limits=limits, modes=modes)  # type: ignore[arg-type]


def settings(option: str) -> dict[str, object]:
    """What one option sets: fields of `MountOptions`, `Limits`, `Modes`, and their values; nothing if it
    is one of mount(8) and fstab without meaning here. Raises UnknownOption, UsageError for its value."""
    name, equals, value = option.partition("=")
    if equals and name in _LIMITS:
        return {name: _limit(name, value)}
    if equals and name in _PARSERS:
        return _PARSERS[name](name, value)
    if not equals and name in _FLAGS:
        return _FLAGS[name]
    if (not equals and name in _IGNORED) or name.startswith(("x-", "X-")) or name == "comment":
        return {}
    if name == "owner":
        raise UsageError(
            f"mount option '{option}': it is called holder={value or 'node'}, since mount(8) keeps "
            "owner= for itself"
        )
    raise _unknown(option, name)


class UnknownOption(UsageError):
    """An option whose name means nothing here."""


def _unknown(option: str, name: str) -> UsageError:
    if name in KNOWN:
        takes = "no" if name in _FLAGS or name in _IGNORED else "a"
        return UsageError(f"mount option '{option}': '{name}' takes {takes} value")
    close = difflib.get_close_matches(name, KNOWN, 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return UnknownOption(f"unknown mount option '{option}'{hint} (`dlmfs mount --help` lists them)")


def _parse_node(_name: str, value: str) -> dict[str, object]:
    if not NODE_NAME.fullmatch(value):
        raise UsageError(
            f"node name '{value}': use up to 63 letters, digits, '.', '_', '-', starting with "
            "a letter or digit"
        )
    return {"node": value}


def _parse_holder(_name: str, value: str) -> dict[str, object]:
    try:
        return {"holder": HolderRule(value)}
    except ValueError:
        raise UsageError(f"holder={value}: choose holder=node or holder=file") from None


def _parse_on_lost(_name: str, value: str) -> dict[str, object]:
    try:
        return {"on_lost": OnLost(value)}
    except ValueError:
        raise UsageError(f"on-lost={value}: choose none, term or kill") from None


def _parse_dead_value(_name: str, value: str) -> dict[str, object]:
    try:
        return {"dead_value": DeadValue(value)}
    except ValueError:
        raise UsageError(f"dead-value={value}: choose keep or invalid") from None


def _seconds(name: str, value: str, least: float, most: float) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not least <= seconds <= most:
        raise UsageError(f"{name}={value}: give seconds from {least:g} to {most:g}")
    return seconds


def _parse_ttl(name: str, value: str) -> dict[str, object]:
    return {"ttl_s": _seconds(name, value, TTL_MIN_S, TTL_MAX_S)}


def _parse_lock_delay(name: str, value: str) -> dict[str, object]:
    return {"lock_delay_s": _seconds(name, value, 0, DELAY_MAX_S)}


def _parse_grace(name: str, value: str) -> dict[str, object]:
    return {"grace_s": _seconds(name, value, 0, DELAY_MAX_S)}


def _parse_forget(name: str, value: str) -> dict[str, object]:
    seconds = _seconds(name, value, 0, FORGET_MAX_S)
    return {"forget_s": seconds or None}


def _parse_retry(name: str, value: str) -> dict[str, object]:
    return {"retry_s": _seconds(name, value, 0, RETRY_MAX_S)}


def _parse_file(name: str, value: str) -> dict[str, object]:
    if not value.startswith("/"):
        raise UsageError(f"{name}={value}: give the file's absolute path")
    return {name: value}


def _parse_folder(name: str, value: str) -> dict[str, object]:
    if not value.startswith("/") or value == "/" or len(value) > RUN_MAX:
        raise UsageError(
            f"{name}={value}: give a folder's absolute path, of up to {RUN_MAX} characters"
        )
    return {name: value}


def _parse_log(name: str, value: str) -> dict[str, object]:
    if value not in LOGS and not value.startswith("/"):
        raise UsageError(f"{name}={value}: choose {', '.join(LOGS)} or a file's absolute path")
    return {"log": value}


def _parse_log_level(name: str, value: str) -> dict[str, object]:
    if value not in LOG_LEVELS:
        raise UsageError(f"{name}={value}: choose {', '.join(LOG_LEVELS)}")
    return {"log_level": value}


def _parse_log_format(name: str, value: str) -> dict[str, object]:
    if value not in ("text", "json"):
        raise UsageError(f"{name}={value}: choose text or json")
    return {"log_json": value == "json"}


def _parse_octal(name: str, value: str) -> dict[str, object]:
    most = 0o3777 if name in ("mode", "dmode") else 0o777
    if not re.fullmatch("[0-7]{1,5}", value) or int(value, 8) > most:
        raise UsageError(f"{name}={value}: give an octal number up to {most:o}, as to chmod(1)")
    return {name: int(value, 8)}


def _parse_id(name: str, value: str) -> dict[str, object]:
    """A user's or group's number, or its name on this host."""
    if value.isascii() and value.isdigit():
        number = int(value.lstrip("0")[:11] or "0")
        if number > ID_MAX:
            raise UsageError(f"{name}={value}: give a number up to {ID_MAX}")
        return {name: number}
    try:
        if name == "uid":
            return {name: pwd.getpwnam(value).pw_uid}
        return {name: grp.getgrnam(value).gr_gid}
    except (KeyError, ValueError):
        what = "user" if name == "uid" else "group"
        raise UsageError(
            f"{name}={value}: this host has no such {what} (`{what}add` makes one); or give a number"
        ) from None


def _parse_fsname(_name: str, value: str) -> dict[str, object]:
    return {"fsname": value}


def _parse_subtype(_name: str, value: str) -> dict[str, object]:
    if value != "dlmfs":
        raise UsageError(f"subtype={value}: this is dlmfs")
    return {}


_PARSERS: Final[dict[str, Callable[[str, str], dict[str, object]]]] = {
    "node": _parse_node,
    "holder": _parse_holder,
    "ttl": _parse_ttl,
    "lock-delay": _parse_lock_delay,
    "grace": _parse_grace,
    "forget": _parse_forget,
    "retry": _parse_retry,
    "dead-value": _parse_dead_value,
    "on-lost": _parse_on_lost,
    "ca": _parse_file,
    "cert": _parse_file,
    "key": _parse_file,
    "credentials": _parse_file,
    "run": _parse_folder,
    "log": _parse_log,
    "log-level": _parse_log_level,
    "log-format": _parse_log_format,
    **dict.fromkeys(("uid", "gid"), _parse_id),
    **dict.fromkeys(("mode", "umask", "dmode", "fmode"), _parse_octal),
    "fsname": _parse_fsname,
    "subtype": _parse_subtype,
}
_MODES: Final = tuple(Modes.__dataclass_fields__)
_LIMITS: Final = tuple(Limits.__dataclass_fields__)
KNOWN: Final = tuple(sorted({*_FLAGS, *_IGNORED, *_PARSERS, *_LIMITS}))
OURS: Final = tuple(sorted({*_OWN_FLAGS, *_PARSERS, *_LIMITS}))
"""Those that mean something here only. libmount must not know them: mount(8) keeps what is its own."""


def _limit(name: str, value: str) -> int:
    most = 100 if name == "user_share" else LIMIT_MAX
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= most):
        raise UsageError(f"{name}={value}: give a whole number from 1 to {most}")
    return int(value)


def parse_source(text: str) -> Source:
    """What SOURCE names. Raises UsageError for anything but local, local:NAME, local:/path and
    etcd://HOST[:PORT][,...]/CLUSTER."""
    if text == "local":
        return LocalSource(None, "default")
    if text.startswith("local:"):
        rest = text.removeprefix("local:")
        if rest.startswith("/"):
            return LocalSource(Path(rest), "")
        if "/" in rest:
            raise UsageError(f"SOURCE '{text}': give the state file's absolute path")
        if rest:
            return LocalSource(None, rest)
        raise UsageError("SOURCE 'local:' needs a NAME or a /path after the colon")
    if text.startswith("etcd://"):
        return _parse_etcd(text)
    raise UsageError(
        f"SOURCE '{text}' is not known: use local, local:NAME, local:/path/state.db or "
        "etcd://HOST:PORT,.../CLUSTER"
    )


def _parse_etcd(text: str) -> EtcdSource:
    if "@" in text:
        # Not repeated in the message: it would be in a log next.
        raise UsageError(
            "SOURCE: a password in the URL is refused, since ps shows it; use -o credentials=FILE"
        )
    hosts, slash, cluster = text.removeprefix("etcd://").partition("/")
    if not slash or not CLUSTER_NAME.fullmatch(cluster):
        raise UsageError(
            f"SOURCE '{text}': name the cluster's lock space after the hosts, as in "
            "etcd://host:2379/prod (letters, digits, '.', '_', '-')"
        )
    endpoints = []
    for host in hosts.split(","):
        match = ENDPOINT.fullmatch(host)
        if match is None or int(match["port"] or 1) not in range(1, 65536):
            raise UsageError(f"SOURCE '{text}': '{host}' is not HOST:PORT (IPv6 as [::1]:2379)")
        endpoints.append(host if match["port"] else f"{host}:{ETCD_PORT}")
    return EtcdSource(tuple(endpoints), cluster)
