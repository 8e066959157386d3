"""Mutants of the stores: what is durable, who lives, what a server may answer."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

WAKEUPS: Final = "tests/store/test_wakeups.py"
MARK: Final = "tests/store/test_highwater.py"
NONSENSE: Final = "tests/etcd/test_nonsense.py"
SECRETS: Final = "tests/etcd/test_secrets.py"

STORE: Final = (
    Mutant(
        "disk-not-synced",
        "store/schema.py",
        'else "FULL"',
        'else "NORMAL"',
        (f"{WAKEUPS}::test_on_a_disk_a_commit_is_on_the_medium_before_it_is_answered",),
        "a commit on a disk is acknowledged before it is durable (promise 4)",
    ),
    Mutant(
        "missing-file-is-death",
        "store/lives.py",
        "return may_live(pid)  # somebody tidied up",
        "return False",
        (f"{WAKEUPS}::test_a_missing_lock_file_is_no_death",),
        "who removes a lock file of STATE.d gives a living daemon's locks away",
    ),
    Mutant(
        "zombie-lives",
        "store/lives.py",
        'found.state not in ("Z", "X")',
        'found.state not in ("X",)',
        (f"{WAKEUPS}::test_a_missing_lock_file_is_no_death",),
        "a dead daemon that nobody reaps keeps its locks for ever",
    ),
    Mutant(
        "sweep-hears-nothing",
        "store/sqlite_session.py",
        "            self.store.sweep()\n",
        "            pass\n",
        (f"{WAKEUPS}::test_a_missed_bell_costs_a_second",),
        "a missed bell is missed for ever: a waiter sleeps on",
    ),
    Mutant(
        "folder-not-made-anew",
        "store/sqlite_session.py",
        "            self._stay_findable()\n",
        "",
        (f"{WAKEUPS}::test_who_was_there_before_the_folder_was_deleted_is_found_in_the_new_one",),
        "after rm -r STATE.d newcomers ring nobody",
    ),
    Mutant(
        "mark-falls",
        "store/highwater.py",
        "max(revision, excluded.revision)",
        "excluded.revision",
        (f"{MARK}::test_nobody_lowers_the_mark",),
        "tokens go back: a second state lowers the high-water mark",
    ),
    Mutant(
        "mark-too-late",
        "store/highwater.py",
        "return revision + AHEAD // 2 > self.value",
        "return revision > self.value + AHEAD // 2",
        (f"{MARK}::test_the_mark_is_raised_in_time_and_never_in_the_event_loop",),
        "a revision is given that the mark does not know: after a reboot tokens go back",
    ),
    Mutant(
        "mark-not-kept",
        "store/highwater.py",
        "self._at_least(revision + AHEAD)",
        "self._at_least(revision)",
        (f"{MARK}::test_the_mark_is_raised_in_time_and_never_in_the_event_loop",),
        "the mark follows the revision instead of going ahead of it",
    ),
    Mutant(
        "too-many-operations",
        "store/check.py",
        "return longest + max(inside, default=0)",
        "return longest",
        (
            "tests/store/test_bounds.py::test_every_store_takes_as_many_operations_as_etcd_and_no_more",
        ),
        "stores take transactions that etcd refuses: nobody gets the lock there",
    ),
    Mutant(
        "jump-believed",
        "store/etcd/answers.py",
        "if known and revision > known + JUMP_MAX:",
        "if not known and revision > known + JUMP_MAX:",
        (
            "tests/etcd/test_nonsense.py::test_a_transaction_is_unknown_and_the_next_member_is_asked",
        ),
        "one wrong revision of a server is believed, and no later one",
    ),
)
