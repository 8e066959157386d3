"""Whether each option of ours gets through mount(8): libmount keeps what is its own.

Here against its list of names; scripts/releases passes each through the mount(8) of newer releases.
"""

from __future__ import annotations

import pytest

from dlmfs.config import KNOWN, OURS, parse_options, settings
from dlmfs.errors import UsageError

LINUX = (
    "ro rw exec noexec suid nosuid dev nodev sync async dirsync remount bind rbind sub nosub silent loud"
    " mand nomand atime noatime iversion noiversion diratime nodiratime relatime norelatime strictatime"
    " nostrictatime lazytime nolazytime unbindable runbindable private rprivate slave rslave shared"
    " rshared symfollow nosymfollow move"
)
USERSPACE = (
    "defaults auto noauto user[=] nouser users nousers owner noowner group nogroup _netdev comment= x- X-"
    " loop[=] offset= sizelimit= encryption= nofail uhelper= helper= verity.hashdevice= verity.roothash="
    " verity.hashoffset= verity.roothashfile= verity.fecdevice= verity.fecoffset= verity.fecroots="
    " verity.roothashsig= verity.oncorruption="
)
LIBMOUNT = f"{LINUX} {USERSPACE}".split()
"""The names that libmount 2.43 knows (linux_flags_map and userspace_opts_map in its optmap.c)."""


def is_libmounts(option: str) -> bool:
    """By its own rule: the name decides, with or without a value."""
    name = option.partition("=")[0]
    return any(
        name.startswith(known) if known in ("x-", "X-") else known.rstrip("[=]") == name
        for known in LIBMOUNT
    )


def test_libmount_has_no_option_of_ours() -> None:
    """`owner=file` reached nobody: libmount 2.41 took it for `owner`."""
    assert [name for name in OURS if is_libmounts(name)] == []
    assert is_libmounts("owner=file")
    assert {"holder", "node", "ttl", "allow_other", "max_locks", "insecure-password"} <= set(OURS)


def test_an_option_is_ours_or_mounts() -> None:
    assert [name for name in KNOWN if name not in OURS and not is_libmounts(name)] == []


GIVEN = (
    "ro rw exec noexec suid nosuid dev nodev sync async dirsync silent loud mand nomand atime noatime"
    " iversion noiversion diratime nodiratime relatime norelatime strictatime nostrictatime lazytime"
    " nolazytime symfollow nosymfollow user nouser users nousers owner noowner group nogroup _netdev"
    " nofail x-systemd.automount X-mount.mkdir comment=x"
).split()
"""What mount(8) may hand to a helper: not what it does by itself (bind, loop and their like)."""


@pytest.mark.parametrize("word", GIVEN)
def test_what_mount_may_pass_is_taken(word: str) -> None:
    assert is_libmounts(word)
    parse_options([word])


@pytest.mark.parametrize("word", ["owner=file", "owner=node", "owner="])
def test_the_former_name_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="called holder="):
        settings(word)
