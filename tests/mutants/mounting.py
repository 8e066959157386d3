"""Slips at the door to mount(8): what it hands over, and what it asks."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

CONFIGURED: Final = "tests/cli/test_configured.py"
REMOUNT: Final = "tests/cli/test_remount.py"

MOUNTING: Final = (
    Mutant(
        "option-of-libmount",
        "config.py",
        '    "holder": _parse_holder,\n',
        '    "holder": _parse_holder,\n    "owner": _parse_holder,\n',
        ("tests/cli/test_libmount.py",),
        "an option that mount(8) keeps for itself: two programs get the exclusive lock",
    ),
    Mutant(
        "drop-ins-unread",
        "cli/checks/configured.py",
        'if unit in named or "dlmfs" in unit or "dlmfs" in _text(path):',
        "if False:",
        (CONFIGURED,),
        "doctor does not see owner= in what is added to a unit",
    ),
    Mutant(
        "rules-that-differ",
        "cli/checks/mounted.py",
        'if node["holder_rule"] not in (None, status["holder_rule"]):',
        "if False:",
        (f"{CONFIGURED}::test_which_rule_holds_is_told",),
        "nobody is told that nodes of one lock space differ in holder=",
    ),
    Mutant(
        "rule-by-default-untold",
        "cli/mount.py",
        "        log.warning(BY_DEFAULT)\n",
        "        log.info(BY_DEFAULT)\n",
        (f"{CONFIGURED}::test_which_rule_holds_is_told",),
        "a mount whose holder= was kept by mount(8) says nothing",
    ),
    Mutant(
        "remount-forgets",
        "fuse/mount.py",
        "told.get(name, name in shown)",
        "told.get(name, False)",
        (f"{REMOUNT}::test_flags_change_and_others_stay",),
        "a remount to read-only takes noexec away",
    ),
    Mutant(
        "remount-passes-over",
        "cli/remount.py",
        "    _check_kept(entry, source, kept)\n",
        "",
        (f"{REMOUNT}::test_what_would_be_another_daemon_is_refused_whole",),
        "fstab says holder=file, the remount succeeds, the daemon has holder=node",
    ),
    Mutant(
        "fake-clears",
        "cli/mount.py",
        "    if parsed.fake:\n",
        "    fuse_mount.clear_stale(mountpoint)\n    if parsed.fake:\n",
        (f"{REMOUNT}::test_a_fake_mount_looks_and_mounts_nothing",),
        "mount -f unmounts",
    ),
    Mutant(
        "namespace-ignored",
        "cli/mount.py",
        "    if parsed.namespace:\n",
        "    if False:\n",
        (f"{REMOUNT}::test_a_mount_in_another_namespace",),
        "mount -N mounts here",
    ),
    Mutant(
        "helper-without-path",
        "fuse/glance.py",
        'sys.executable or os.path.realpath("/proc/self/exe")',
        "sys.executable",
        (f"{REMOUNT}::test_a_fake_mount_looks_and_mounts_nothing",),
        "mount(8) over a dead mount ends with an internal error",
    ),
)
