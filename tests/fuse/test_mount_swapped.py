"""Paths of mounting and unmounting, when who owns a folder above puts a link in its place."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dlmfs.errors import DlmfsError, MountFailed
from dlmfs.fuse import mount, mountinfo

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="for others fusermount3 mounts"),
]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder, as it is called where it is; nothing is mounted below it afterwards."""
    yield Path(os.path.realpath(tmp_path))
    for entry in reversed(mount.mounts()):
        if entry.mountpoint.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", entry.mountpoint], check=True)


def swap(place: Path) -> None:
    """`theirs` becomes a link to `victim`; what it was is `gone`."""
    (place / "theirs").rename(place / "gone")
    (place / "theirs").symlink_to("victim")


def mounted(place: Path) -> list[str]:
    return [e.mountpoint for e in mount.mounts() if e.mountpoint.startswith(f"{place}/")]


def make(place: Path) -> Path:
    for folder in ("theirs/m", "victim/m"):
        (place / folder).mkdir(parents=True)
    return place / "theirs/m"


def after(call: Callable[..., Any], what: Callable[[], None]) -> Callable[..., Any]:
    """The call, and then something else, once."""
    done: list[bool] = []

    def wrapped(*args: Any) -> Any:
        result = call(*args)
        if not done:
            done.append(True)
            what()
        return result

    return wrapped


@pytest.mark.parametrize("moment", ["_mountpoint", "_libc_mount"])
def test_a_mount_lies_where_it_was_looked_at_or_nowhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    point = make(place)
    if moment == "_mountpoint":
        monkeypatch.setattr(mount, moment, after(mount._mountpoint, lambda: swap(place)))
        with pytest.raises(MountFailed, match="changed while it was looked at"):
            mount.mount("local", str(point), mount.MountFlags())
        assert mounted(place) == []
        return
    libc_mount = mount._libc_mount

    def swapped(*args: Any) -> int:
        swap(place)
        return libc_mount(*args)

    monkeypatch.setattr(mount, moment, swapped)
    os.close(mount.mount("local", str(point), mount.MountFlags()))
    assert mounted(place) == [f"{place}/gone/m"]


def test_nothing_but_what_was_looked_at_is_unmounted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = make(place)
    device = mount.mount("local", str(point), mount.MountFlags())
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place / "victim/m")], check=True)
    monkeypatch.setattr(mount, "resolve", after(mountinfo.resolve, lambda: swap(place)))
    with pytest.raises(DlmfsError):
        mount.unmount(str(point), lazy=True)
    os.close(device)
    assert mounted(place) == [f"{place}/gone/m", f"{place}/victim/m"]
    mount.unmount(f"{place}/gone/m", lazy=True)
    assert mounted(place) == [f"{place}/victim/m"]
