"""Whether what mounts a dlmfs by itself, fstab and systemd's units, says what it seems to say.

mount(8) keeps options that are its own, or were ours once, without a word: whoever wrote them has another
mount than he thinks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dlmfs.cli.checks.finding import Finding, fail, ok, warn
from dlmfs.cli.text import plain
from dlmfs.config import parse_source, settings, split
from dlmfs.errors import UsageError

TYPES: Final = ("fuse.dlmfs", "dlmfs")
UNITS: Final = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "etc/systemd/user",
)
CONFIGURED: Final = "etc/dlmfs"
"""Where the units that come with dlmfs have their variables."""
SIZE_MAX: Final = 1 << 18
OWNER: Final = re.compile(r"(?<![\w.-])owner=\w*")
"""The name that `holder=` had; not X-mount.owner=, which is mount(8)'s."""


def check(root: Path = Path("/")) -> Iterator[Finding]:
    """What is wrong in fstab, in units and in their variables, below `root`."""
    found = [*_fstab(root / "etc/fstab"), *_units(root)]
    yield from found
    if not found:
        yield ok("configured", "fstab and systemd's units have no option that dlmfs would not get")


def _text(path: Path) -> str:
    """A file's text; nothing if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(SIZE_MAX)
    except OSError:
        return ""


def _fstab(path: Path) -> Iterator[Finding]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        fields = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f) for f in line.split()]
        if len(fields) < 3 or fields[0].startswith("#") or fields[2] not in TYPES:
            continue
        source, words = fields[0], split(fields[3]) if len(fields) > 3 else []
        where = f"{path}, line {number}"
        yield from _wrong(where, source, words)
        if source.startswith("etcd:") and "_netdev" not in words:
            says = f"{plain(where)}: {plain(source)} is mounted before there is a network"
            yield warn("netdev", "configured", says, "add _netdev,nofail to its options")


def _wrong(where: str, source: str | None, words: list[str]) -> Iterator[Finding]:
    """What the mount would refuse, or mount(8) would not tell it."""
    wrong = []
    try:
        if source is not None:
            parse_source(source)
    except UsageError as error:
        wrong.append(str(error))
    for word in words:
        try:
            settings(word)
        except UsageError as error:
            wrong.append(str(error))
    for what in wrong:
        yield fail("configured", f"{plain(where)}: {plain(what)}", "correct it, then mount it anew")


def _units(root: Path) -> Iterator[Finding]:
    seen = set()
    for path, text in _written(root).items():
        real = path.resolve()
        if real in seen:
            continue
        seen.add(real)
        lines = [line for line in text.splitlines() if not line.lstrip().startswith(("#", ";"))]
        told = dict(line.split("=", 1) for line in lines if "=" in line)
        if path.suffix == ".mount" and told.get("Type", "").strip() in TYPES:
            options = split(told.get("Options", "").strip())
            yield from _wrong(str(path), told.get("What", "").strip(), options)
        elif old := OWNER.search("\n".join(lines)):
            yield from _wrong(str(path), None, [old[0]])


def _written(root: Path) -> dict[Path, str]:
    """What is written in units that have to do with dlmfs, in what is added to them, and in the files
    with their variables, of whichever instance."""
    texts: dict[Path, str] = {}
    for folder in UNITS:
        for path in _found(root / folder, "*.mount", "*.service"):
            if "dlmfs" in (text := _text(path)):
                texts[path] = text
    named = {path.name for path in texts}
    for folder in UNITS:
        for path in _found(root / folder, "*.d/*.conf"):
            unit = path.parent.name.removesuffix(".d")
            if unit in named or "dlmfs" in unit or "dlmfs" in _text(path):
                texts[path] = _text(path)
    variables = _found(root / CONFIGURED, "*.conf")
    for text in texts.values():
        for name in re.findall(r"^EnvironmentFile=-?/+(\S+)", text, re.MULTILINE):
            variables += _found(root, re.sub(r"%.", "*", name))
    return texts | {path: _text(path) for path in variables}


def _found(folder: Path, *patterns: str) -> list[Path]:
    try:
        return [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    except (OSError, ValueError, NotImplementedError):  # not to be looked at; no pattern
        return []
