"""Mutants of the library: what `acquire` answers, fences waited through, slots, elections."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

LIBRARY: Final = (
    Mutant(
        "fence-not-waited-for",
        "client/logic.py",
        "if request.trying or refused == REFUSALS:",
        "if request.trying or refused == 0:",
        ("tests/client/test_logic.py::test_who_waits_goes_on_trying_and_who_would_not_is_refused",),
        "every acquire fails at once while the node is fenced, whatever its time-out",
    ),
    Mutant(
        "refusals-without-end",
        "client/logic.py",
        "return refused + 1 if serves else 0",
        "return 1",
        ("tests/client/test_logic.py::test_a_node_that_says_it_serves_is_not_asked_for_ever",),
        "who waits for a lock whose head cannot be read waits for ever in silence",
    ),
    Mutant(
        "zero-gives-up-first",
        "client/sync.py",
        "keeper = self._made(trying=limit == 0)\n        try:\n            return",
        "keeper = self._made(trying=False)\n        try:\n            return",
        ("tests/client/test_acquire.py::test_a_busy_lock",),
        "acquire(timeout=0) waits for its holder",
    ),
    Mutant(
        "try-overtakes",
        "client/semaphore.py",
        "if turn.acquire(blocking=limit != 0, timeout=left() if limit else None):",
        "if limit == 0 or turn.acquire(timeout=left()):",
        ("tests/client/test_slots.py::test_there_are_as_many_slots_as_it_says",),
        "a try for a slot ends in an error",
    ),
    Mutant(
        "late-word",
        "client/election.py",
        "if said(word.get_value())[0] < self.lock.token:",
        "if word:",
        ("tests/client/test_slots.py::test_a_late_word_of_a_former_leader_is_not_believed",),
        "a former leader says that it leads",
    ),
    Mutant(
        "nested-by-hearsay",
        "cli/nested.py",
        "if held.order[:3] in wanted and _is_ours(held):",
        "if held.order[:3] in wanted:",
        ("tests/client/test_more.py::test_who_only_inherited_the_environment_is_not_refused",),
        "what an ended `dlmfs lock` left in an environment refuses a free lock",
    ),
)
