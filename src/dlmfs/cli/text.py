"""Words for people: names that may hold anything, ages, and who a process is."""

from __future__ import annotations

from typing import Any


def plain(name: str) -> str:
    """A name on one line that any terminal shows: what does not print is written as in a shell's
    $'...', bytes that are no UTF-8 (os.fsdecode) as \\xHH, a backslash as two."""
    return harmless(name.replace("\\", "\\\\"))


def harmless(text: str) -> str:
    """The same for a text in which names may be `plain` already: its backslashes stay as they are."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or char.encode(
        "unicode_escape"
    ).decode()


def age(seconds: float) -> str:
    """3.2s, 2m10s, 5h03m: short, and enough."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m{int(seconds) % 60:02}s"
    return f"{int(seconds) // 3600}h{int(seconds) % 3600 // 60:02}m"


def who(claim: dict[str, Any]) -> str:
    """The process of a claim."""
    if not claim["pid"]:
        return "pid unknown (another pid namespace)"
    return f"pid {claim['pid']} {plain(claim['command'])}".rstrip()
