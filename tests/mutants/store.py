"""Mutants of the stores: what is durable, who lives, what a server may answer."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

WAKEUPS: Final = "tests/store/test_wakeups.py"
MARK: Final = "tests/store/test_highwater.py"
NONSENSE: Final = "tests/etcd/test_nonsense.py"
REFUSED: Final = "tests/etcd/test_refused.py"
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
    Mutant(
        "descriptors-out-is-death",
        "store/lives.py",
        "return True  # out of descriptors: look again later",
        "return False",
        ("tests/store/test_wakeups.py::test_who_has_no_descriptor_to_look_with_buries_nobody",),
        "a daemon without free descriptors buries its living peers",
    ),
    Mutant(
        "gap-untold",
        "store/sqlite_watch.py",
        "if self.next <= trimmed:",
        "if self.next < trimmed:",
        (
            "tests/store/test_sqlite.py::test_the_log_has_all_that_was_not_trimmed_and_says_what_was",
        ),
        "a watch that fell behind a trimmed log loses one revision in silence",
    ),
    Mutant(
        "trims-too-much",
        "store/schema.py",
        '"DELETE FROM log WHERE rev <= ?", (revision - keep,)',
        '"DELETE FROM log WHERE rev <= ?", (revision - keep + 1,)',
        (
            "tests/store/test_sqlite.py::test_the_log_has_all_that_was_not_trimmed_and_says_what_was",
        ),
        "the log loses a revision that it says it has",
    ),
    Mutant(
        "unended-leaves-no-trace",
        "store/sqlite_session.py",
        "            self._place.leave(remove=over)\n",
        "            self._place.leave(remove=True)\n",
        (
            "tests/store/test_wakeups.py::test_a_session_that_its_own_daemon_cannot_end_is_ended_by_the_others",
        ),
        "a session whose end could not be committed lives as long as its process",
    ),
    Mutant(
        "wrong-order-believed",
        "store/etcd/answers.py",
        "if not inside or kv.key <= before:",
        "if not inside:",
        ("tests/etcd/test_answers.py::test_what_was_not_asked_for_is_no_answer",),
        "keys that a server names twice count twice",
    ),
    Mutant(
        "lease-of-another",
        "store/etcd/answers.py",
        "    if answer.id != request.id:\n",
        "    if not answer.id:\n",
        ("tests/etcd/test_answers.py::test_what_was_not_asked_for_is_no_answer",),
        "the renewal of somebody else's lease passes for ours (promise 3)",
    ),
    Mutant(
        "lease-without-end",
        "store/etcd/answers.py",
        "    if answer.ttl > TTL_MAX_S:\n",
        "    if answer.ttl > TTL_MAX_S << 20:\n",
        ("tests/etcd/test_answers.py::test_what_was_not_asked_for_is_no_answer",),
        "a server's word keeps a lease for centuries",
    ),
    Mutant(
        "event-of-before",
        "store/etcd/answers.py",
        "if not max(revision, 1) <= kv.mod_revision <= REVISION_MAX:",
        "if not 1 <= kv.mod_revision <= REVISION_MAX:",
        ("tests/etcd/test_answers.py::test_what_was_not_watched_is_not_heard",),
        "a watch that goes back is believed",
    ),
    Mutant(
        "renewal-from-its-answer",
        "store/etcd/session.py",
        "counts = self.renewal.confirmed(sent, term, through)",
        "counts = self.renewal.confirmed(self.clock(), term, through)",
        ("tests/etcd/test_nonsense.py::test_a_renewal_counts_from_its_sending",),
        "a renewal counts from its answer: the deadline is later than the lease's end (promise 3)",
    ),
    Mutant(
        "key-not-looked-for",
        "store/etcd/session.py",
        "mine = bool(own.kvs) and own.kvs[0].mod_revision == self.born",
        "mine = True",
        (
            "tests/etcd/test_nonsense.py::test_a_lease_that_is_renewed_but_has_our_key_no_more_is_lost",
        ),
        "a lease that etcd has revoked is kept (promise 3)",
    ),
    Mutant(
        "word-forgotten",
        "store/etcd/watch.py",
        "            self._heard = False  # now: what is asked for may be here before `ask` returns\n"
        "            if asked:\n                await self.ask()\n",
        "            if asked:\n                await self.ask()\n            self._heard = False\n",
        (f"{REFUSED}::test_a_word_that_comes_before_the_question_returned_counts",),
        "an idle node gives its connection to etcd up every few seconds",
    ),
    Mutant(
        "refusal-is-a-fault",
        "store/etcd/store.py",
        "            raise StoreRefuses(str(error)) from None\n",
        "            raise\n",
        (f"{REFUSED}::test_a_refusal_is_definite_and_no_fault",),
        "a right that is taken from etcd's user for a moment breaks every lock that asks meanwhile",
    ),
)
