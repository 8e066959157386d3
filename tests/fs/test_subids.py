"""Whose a subordinate user id is, and that a user's limits are his with all of them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlmfs.fs.limits import Usage
from dlmfs.fs.subids import LOOK_S, SubordinateIds
from dlmfs.model import Limits


class Files:
    """The two files, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.subuid, self.passwd = folder / "subuid", folder / "passwd"
        self.passwd.write_bytes(
            b"root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:\n\xff:x:1001:1:::\nx\n"
        )
        self.ids = SubordinateIds(lambda: self.now, str(self.subuid), str(self.passwd))

    def owners(self, *uids: int) -> list[int]:
        return [self.ids.owner_of(uid) for uid in uids]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_whose_an_id_is(files: Files) -> None:
    files.subuid.write_bytes(
        b"alice:100000:65536\n1005:300000:10\n\xff:200000:65536\nroot:400000:65536\n"
        b"nobody-knows:500000:65536\nalice:1001:5\n\nalice:x:y\nalice:7\nalice:600000:1"
    )
    assert files.owners(0, 1000, 1001, 1002, 99_999) == [0, 1000, 1001, 1002, 99_999]
    assert files.owners(100_000, 165_535, 600_000) == [1000] * 3
    assert files.owners(165_536, 600_001, 1 << 31) == [165_536, 600_001, 1 << 31]
    assert files.owners(300_009, 300_010, 200_000) == [1005, 300_010, 1001]
    assert files.owners(400_000, 500_000) == [400_000, 500_000]


def test_what_is_written_later_counts_for_who_comes_a_minute_later(files: Files) -> None:
    assert files.owners(100_000) == [100_000]
    files.subuid.write_bytes(b"alice:100000:65536\n")
    assert files.owners(100_000) == [100_000]
    files.now += LOOK_S
    assert files.owners(100_000) == [1000]
    files.subuid.unlink()
    files.now += LOOK_S
    assert files.owners(100_000) == [100_000]


@given(text=st.binary(max_size=200), uid=st.integers(0, (1 << 32) - 1))
def test_whatever_is_written_there_is_no_error(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, uid: int
) -> None:
    files = Files(tmp_path_factory.mktemp("subids"))
    files.subuid.write_bytes(b"alice:" + text)
    assert isinstance(files.ids.owner_of(uid), int)


def test_ids_that_own_each_other_are_users_all_the_same(files: Files) -> None:
    files.subuid.write_bytes(b"70000:80000:1\n80000:70000:1\n")
    usage = Usage(Limits(), own=7)
    usage.owner_of = files.ids.owner_of
    assert usage.user(70_000) is usage.user(80_000)


def test_a_user_has_one_share_with_all_ids_of_his(files: Files) -> None:
    files.subuid.write_bytes(b"alice:100000:65536\n")
    usage = Usage(Limits(max_locks=8, user_share=50), own=7)
    usage.owner_of = files.ids.owner_of
    for uid in (1000, 100_000, 100_001, 100_002):
        assert usage.refuse_lock(uid) == 0
        usage.count_lock(uid, 1)
    for uid in (1000, 100_000, 165_535):
        assert usage.refuse_lock(uid) == errno.EDQUOT
    assert usage.refuse_lock(165_536) == 0
