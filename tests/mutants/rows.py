"""The list of mutants: what each breaks, and the tests that notice (see `run`)."""

from __future__ import annotations

from typing import Final

from tests.mutants.doors import DOORS
from tests.mutants.library import LIBRARY
from tests.mutants.mounting import MOUNTING
from tests.mutants.mutant import Mutant
from tests.mutants.programs import PROGRAMS
from tests.mutants.protocol import PROTOCOL
from tests.mutants.store import STORE

MUTANTS: Final[tuple[Mutant, ...]] = (*PROTOCOL, *STORE, *PROGRAMS, *DOORS, *MOUNTING, *LIBRARY)
