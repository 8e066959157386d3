"""Tokens over restores, and stamps: whatever happened, what comes later is larger, and what is told apart
is told apart rightly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dlmfs.core.timeline import KEPT, Stamp, follows
from dlmfs.core.tokens import PLAIN, ROOM, Raise, Tokens, covers, raised
from dlmfs.model import TOKEN_SHIFT


def test_a_store_that_was_never_restored_has_its_revisions() -> None:
    assert PLAIN.of(5) == 5 << TOKEN_SHIFT
    assert PLAIN.of(0) == 0
    assert PLAIN.offset == 0


def test_a_grant_of_before_keeps_its_token() -> None:
    """What a head tells of one who died before the restore is what that one was given."""
    tokens = Tokens((Raise(100, 7), Raise(300, 50)))
    assert [tokens.of(r) >> TOKEN_SHIFT for r in (99, 101, 299, 301)] == [99, 108, 306, 351]


@given(st.lists(st.tuples(st.integers(1, 10**10), st.integers(0, 10**10)), min_size=1, max_size=8))
def test_tokens_grow_over_every_restore(story: list[tuple[int, int]]) -> None:
    """Each restore: how far grants had come, and at which revision the store is then, lower or higher."""
    offset, largest, seen = 0, 0, 0
    for grown, now in story:
        seen = max(seen, grown)
        largest = max(largest, seen + offset)
        new = raised(offset, offset, seen, now)
        assert covers(new, offset, seen, now)
        assert now + new > largest
        assert not covers(offset, offset, seen, now), "one who has not been told must tell"
        offset, largest, seen = new, now + new, max(seen, now)


def test_a_raise_leaves_room_for_what_others_were_given() -> None:
    assert raised(0, 0, 500, 100) + 100 >= 500 + ROOM


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_a_stamp_is_known_again_and_another_history_is_told(
    before: int, since: int, elsewhere: int
) -> None:
    def stamped(stamp: Stamp, times: int, who: str) -> Stamp:
        for number in range(times):
            stamp = stamp.next(f"{who}.{number}")
        return stamp

    common = stamped(Stamp(0, ()).next("first"), before, "a")
    known = common.next("known")
    later = stamped(known, since, "b")
    assert follows(known, later) is (True if since < KEPT else None)
    # Restored to `common`, and stamped by others since.
    other = stamped(common, elsewhere, "c")
    assert follows(known, other) is (False if elsewhere <= KEPT else None)
