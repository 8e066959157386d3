"""The commands that README shows, for whoever runs them as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = "## First steps"


class Block(NamedTuple):
    """Lines to paste into a shell, or into a crontab (`kind`)."""

    kind: str
    text: str


def blocks(text: str, section: str = SECTION) -> list[Block]:
    """The fenced blocks of kind sh and crontab in that section, in their order."""
    found = re.search(rf"^{re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"README has no section {section!r}"
    fences = re.findall(r"^```(sh|crontab)\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)
    return [Block(kind, text) for kind, text in fences]


def commands(block: Block) -> list[str]:
    """The commands of a crontab's lines, with its escapes taken away."""
    lines = [line for line in block.text.splitlines() if line and not line.startswith("#")]
    return [line.split(None, 5)[5].replace("\\%", "%") for line in lines]
