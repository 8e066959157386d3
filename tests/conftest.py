"""What every test needs: skips that say why, and no log warning that nobody declared."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

import dlmfs.store.etcd  # noqa: F401 - before anything imports grpc
from tests.private import own_mounts

# The examples are the same in every run, so that a change alone can turn a run red; DLMFS_RANDOM=1
# draws new ones (a failure then prints how to repeat it).
# How long one takes says nothing on a machine that does something else, too.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("random", print_blob=True, deadline=None)
settings.load_profile("random" if os.environ.get("DLMFS_RANDOM") else "fixed")


def pytest_configure() -> None:
    """Workers of one run share no mount, socket or state: some tests ask about all that there are."""
    if "PYTEST_XDIST_WORKER" in os.environ and os.getuid() == 0:
        own_mounts()


def _lacking() -> dict[str, str]:
    """Markers whose need is not met here, and what is missing."""
    lacking = {}
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        lacking["fuse"] = (
            f"/dev/fuse: {error.strerror} (modprobe fuse; in a container: --device /dev/fuse "
            "--cap-add SYS_ADMIN)"
        )
    if os.getuid() != 0:
        lacking["root"] = "needs root"
    return lacking


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here; where DLMFS_NO_SKIP is set that is a failure of the place."""
    lacking = _lacking()
    for marker, why in lacking.items():
        if os.environ.get("DLMFS_NO_SKIP") and any(i.get_closest_marker(marker) for i in items):
            pytest.exit(f"no skips are allowed here, but tests cannot run: {why}", returncode=3)
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def _no_undeclared_warnings(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("allow_warnings"):
        return
    records = [r for when in ("setup", "call") for r in caplog.get_records(when)]
    loud = [r for r in records if r.name.startswith("dlmfs") and r.levelno >= logging.WARNING]
    assert not loud, f"undeclared log: {[r.getMessage() for r in loud]}"
