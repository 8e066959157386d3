"""argparse with our manners: one line per error, the exit codes of the error table."""

from __future__ import annotations

import argparse
from typing import NoReturn

from dlmfs.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")
