"""Deliberate faults of the protocol, the lease and the core, which the simulation must catch.

A bug is a replacement in a source file of the product, made while that file is imported, in a process
of its own (`worker`). A replacement whose text is not there exactly once fails loudly, so that the list
follows the code. Nothing here imports the product.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent


class Planted(NamedTuple):
    """It must be caught `within` so many seeds from `first` on. Most are caught at once; for a rare one
    `first` is near a seed that shows it, so that a campaign need not spend its time on it."""

    name: str
    file: str
    old: str
    new: str
    within: int
    what: str
    first: int = 0


def apply(bug: Planted, source: str) -> str:
    """The faulty source. Raises ValueError if the text is not there exactly once."""
    found = source.count(bug.old)
    if found != 1:
        raise ValueError(f"planted bug {bug.name}: its text is {found} times in {bug.file}")
    return source.replace(bug.old, bug.new)


def module_of(file: str) -> str:
    return "dlmfs." + file.removesuffix(".py").replace("/", ".")


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the faulty source; never from or to a cache."""

    def __init__(self, name: str, path: str, bug: Planted) -> None:
        super().__init__(name, path)
        self._bug = bug

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = Path(path).read_text("utf-8")
        return compile(apply(self._bug, source), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, bug: Planted) -> None:
        self._bug = bug

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - part of the interface
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != module_of(self._bug.file):
            return None
        file = str(ROOT / self._bug.file)
        return importlib.util.spec_from_loader(fullname, _Loader(fullname, file, self._bug))


def plant(bug: Planted) -> None:
    """From now on in this process the product has the bug. Its file must not be imported yet."""
    assert module_of(bug.file) not in sys.modules, f"{bug.file} is imported already"
    sys.meta_path.insert(0, _Finder(bug))
